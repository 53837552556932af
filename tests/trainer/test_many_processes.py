"""Two processes train like one with twice the batch: on a CPU over gloo, with DDP, FSDP2 and ZeRO-2."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import transformers
from accelerate.commands.config.config_args import load_config_from_file
from distributed_runs import BF16, RUNS, train
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import encode, make_image, make_qwen3_vl, user
from torch import nn
from transformers import AutoModelForImageTextToText

import trl_vicur


pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate_configs"
# On CPUs, transformers before 5.18 loads the optimizer's state onto "cpu:0", which torch does not accept
CAN_RESUME = Version(transformers.__version__) >= Version("5.18")
DDP = [name for name in RUNS if CAN_RESUME or not name.startswith("resumed")]
SHARDED = [name for name in RUNS if name not in ("ema_teacher", "videos")]


def in_both_precisions(runs: Iterable[str]) -> list[str]:
    return [name for run in runs for name in (run, run + BF16)]


@pytest.fixture(scope="module")
def models(tmp_path_factory, processor):
    """A folder with a teacher and two students, whose completions end early and at different lengths."""
    folder = tmp_path_factory.mktemp("models")
    teacher = make_qwen3_vl(num_layers=2, hidden_size=64, seed=5)
    student, tied_student = make_qwen3_vl(), make_qwen3_vl()
    student.config.tie_word_embeddings = student.config.text_config.tie_word_embeddings = False
    generator = torch.Generator().manual_seed(1)
    student.lm_head.weight = nn.Parameter(0.1 * torch.randn(student.lm_head.weight.shape, generator=generator))
    student.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, *range(40)]
    for name, model in {"student": student, "tied_student": tied_student, "teacher": teacher}.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def one_process(models, tmp_path_factory):
    output = tmp_path_factory.mktemp("one_process")
    for name in in_both_precisions(RUNS):
        train(name, models, output / name, batch_size=4)
    return output


def launch(config: str, models: Path, output: Path, runs: list[str]) -> Path:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config)]
    command += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    script = str(ROOT / "tests" / "support" / "distributed_runs.py")
    command += [script, str(models), str(output), "--runs", *in_both_precisions(runs)]
    environment = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": str(Path(trl_vicur.__file__).parents[1]),
    }
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return output


@pytest.fixture(scope="module")
def ddp(models, tmp_path_factory):
    return launch("multi_gpu.yaml", models, tmp_path_factory.mktemp("ddp"), DDP)


@pytest.fixture(scope="module")
def fsdp2(models, tmp_path_factory):
    return launch("fsdp2.yaml", models, tmp_path_factory.mktemp("fsdp2"), SHARDED)


@pytest.fixture(scope="module")
def zero2(models, tmp_path_factory):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    return launch("deepspeed_zero2.yaml", models, tmp_path_factory.mktemp("zero2"), SHARDED)


def check_same_training(expected: Path, actual: Path) -> None:
    """Losses, gradients and weights agree up to float32 rounding, far below the changes by training."""
    expected_logs, actual_logs = (json.loads((folder / "logs.json").read_text()) for folder in (expected, actual))
    assert len(expected_logs) == len(actual_logs) == 3
    names = {"loss", "grad_norm", "num_tokens", "completions/mean_length"}  # others are means of means
    for expected_log, actual_log in zip(expected_logs, actual_logs, strict=True):
        assert actual_log.keys() == expected_log.keys()
        for name in names & expected_log.keys():
            assert actual_log[name] == pytest.approx(expected_log[name], rel=1e-4, abs=1e-6), name
    (file,) = (path.name for path in expected.glob("*.safetensors"))
    torch.testing.assert_close(load_file(actual / file), load_file(expected / file), rtol=1e-4, atol=1e-6)


def check_same_bf16_training(expected: Path, actual: Path) -> None:
    """
    Weight changes agree up to bfloat16 rounding, layers computed in bfloat16, and no compared value was rounded on its
    way.
    """
    for folder in (expected, actual):
        dtypes = json.loads((folder / "dtypes.json").read_text())
        assert dtypes == {"layers": ["bfloat16"], "compared": ["float32"]}
    expected_logs, actual_logs = (json.loads((folder / "logs.json").read_text()) for folder in (expected, actual))
    for expected_log, actual_log in zip(expected_logs, actual_logs, strict=True):
        assert actual_log["loss"] == pytest.approx(expected_log["loss"], rel=0.1, abs=0.02)
        assert actual_log.get("num_tokens") == expected_log.get("num_tokens")
    assert actual_logs[0]["grad_norm"] == pytest.approx(expected_logs[0]["grad_norm"], rel=0.03)
    (file,) = (path.name for path in expected.glob("*.safetensors"))
    weights, expected_weights = load_file(actual / file), load_file(expected / file)
    assert weights.keys() == expected_weights.keys()
    names = sorted(weights)
    expected_vector, vector = (
        torch.cat([each[name].flatten() for name in names]) for each in (expected_weights, weights)
    )
    path = sum(min(log["grad_norm"], 1.0) for log in expected_logs)  # gradients are clipped, the learning rate is one
    rounding = torch.finfo(vector.dtype).eps / 2 * expected_vector.norm()  # DeepSpeed saves its bfloat16 weights
    assert (vector.float() - expected_vector).norm() < 0.1 * path + rounding


@pytest.mark.parametrize("run", DDP)
def test_ddp_equals_one_process(one_process, ddp, run):
    check_same_training(one_process / run, ddp / run)


@pytest.mark.parametrize("run", DDP)
def test_ddp_equals_one_process_in_bf16(one_process, ddp, run):
    check_same_bf16_training(one_process / (run + BF16), ddp / (run + BF16))


@pytest.mark.parametrize("run", SHARDED)
def test_fsdp2_equals_one_process(one_process, fsdp2, run):
    """Student and teacher are sharded. No rank hangs if only the other one has images or generates longer."""
    check_same_training(one_process / run, fsdp2 / run)


@pytest.mark.parametrize("run", SHARDED)
def test_fsdp2_equals_one_process_in_bf16(one_process, fsdp2, run):
    check_same_bf16_training(one_process / (run + BF16), fsdp2 / (run + BF16))


@pytest.mark.parametrize("run", SHARDED)
def test_zero2_equals_one_process(one_process, zero2, run):
    check_same_training(one_process / run, zero2 / run)


@pytest.mark.parametrize("run", SHARDED)
def test_zero2_equals_one_process_in_bf16(one_process, zero2, run):
    check_same_bf16_training(one_process / (run + BF16), zero2 / (run + BF16))


@pytest.mark.parametrize("run", ["adapter", "train_base"])
def test_adapter_saved_from_shards_is_loaded_by_stock_peft(models, one_process, fsdp2, processor, run):
    inputs = encode(processor, [user("What is this?", make_image(0)), user("And this?", make_image(1))])

    def logits(folder: Path | None) -> torch.Tensor:
        model = AutoModelForImageTextToText.from_pretrained(models / RUNS[run][0])
        if folder is not None:
            model = PeftModel.from_pretrained(model, folder / run)
        with torch.no_grad():
            return model(**inputs).logits

    trained = logits(fsdp2)
    torch.testing.assert_close(trained, logits(one_process), rtol=0, atol=1e-3)
    assert (trained - logits(None)).abs().max() > 1e-2


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.name)
def test_accelerate_loads_the_configs(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16" and not config.use_cpu
