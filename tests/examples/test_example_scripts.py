"""The example script and `trl-vicur train`, run as a user would: on a local model and dataset, with the recipes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from tiny_models import make_qwen3_vl, make_rows


pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parents[2] / "examples" / "scripts"


@pytest.fixture(scope="module")
def local(tmp_path_factory, processor):
    """A folder with a tiny model, a teacher, and a dataset in Parquet."""
    folder = tmp_path_factory.mktemp("local")
    make_qwen3_vl().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    make_qwen3_vl(num_layers=6, seed=1).save_pretrained(folder / "teacher")
    (folder / "dataset").mkdir()
    Dataset.from_list(make_rows(4)).to_parquet(folder / "dataset" / "train.parquet")
    return folder


def run_script(local, output_dir, *arguments, script=(str(SCRIPTS / "vicur.py"),)):
    small = ["--max_steps", "1", "--max_completion_length", "4", "--per_device_train_batch_size", "2"]
    cpu = ["--use_cpu", "--bf16", "False", "--report_to", "none", "--gradient_accumulation_steps", "1"]
    command = [
        *(sys.executable, *script, *arguments),
        *("--model_name_or_path", str(local / "model"), "--dataset_name", str(local / "dataset")),
        *("--output_dir", str(output_dir), *small, *cpu),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"Model saved to {output_dir}." in result.stdout


def adapter_config(output_dir):
    return json.loads((output_dir / "adapter_config.json").read_text())


@pytest.mark.parametrize("recipe", ["vicur_geometry3k.yaml", "vicur_vision_r1.yaml"])
def test_recipes_run(local, tmp_path, recipe):
    # The tiny model has four layers
    run_script(local, tmp_path, "--config", str(SCRIPTS / recipe), "--layer_interval", "2")
    config = adapter_config(tmp_path)
    assert config["peft_type"] == "CUE_RECOVERY" and config["train_base"] and config["r"] == 0


def test_lora_with_the_module_and_a_stronger_teacher(local, tmp_path):
    run_script(
        local,
        tmp_path,
        "--use_peft",
        "--lora_r",
        "4",
        "--layer_interval",
        "1",
        "--sink_token",
        "<|im_end|>",
        "--teacher_model_name_or_path",
        str(local / "teacher"),
        "--privilege",
        "answer",
    )
    config = adapter_config(tmp_path)
    assert config["r"] == 4 and config["lora_alpha"] == 32 and config["sink_token"] == "<|im_end|>"
    assert "language_model" in config["target_modules"]


def test_without_the_module(local, tmp_path):
    run_script(local, tmp_path, "--cue_recovery", "False", "--privilege", "none", "--distillation_mode", "full_logits")
    assert (tmp_path / "model.safetensors").is_file() and not (tmp_path / "adapter_config.json").exists()


def test_train_command_equals_the_script(local, tmp_path):
    """Bit for bit, though the command reads options from a file, passes some to accelerate, and launches itself."""
    run_script(local, tmp_path / "script", "--layer_interval", "1", "--seed", "7")
    (tmp_path / "config.yaml").write_text("layer_interval: 1\nnum_processes: 1\nmixed_precision: 'no'\n")
    options = ["--config", str(tmp_path / "config.yaml"), "--num_cpu_threads_per_process", "1", "--seed", "7"]
    run_script(local, tmp_path / "command", *options, script=("-m", "trl_vicur.cli", "train"))
    of_script, of_command = (tmp_path / name / "adapter_model.safetensors" for name in ("script", "command"))
    assert of_script.read_bytes() == of_command.read_bytes()
