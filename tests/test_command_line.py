"""The command `trl-vicur` as a whole, `trl-vicur train` and `trl-vicur doctor`."""

import re
import shlex

import pytest
import yaml
from datasets import Dataset
from tiny_models import make_qwen3_vl, make_rows

from trl_vicur.cli import COMMANDS, main
from trl_vicur.doctor import packages


@pytest.fixture(scope="module")
def model(tmp_path_factory, processor):
    """Folder of a tiny model and its processor."""
    folder = tmp_path_factory.mktemp("model")
    make_qwen3_vl().save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def dataset(tmp_path):
    """Folder of a dataset with two bad rows among six."""
    rows = make_rows(6)
    rows[1]["cue"] = ""
    rows[4]["prompt"][0]["content"] = "What is it?<|im_end|>"
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "dataset"))
    return str(tmp_path / "dataset")


# --- Help ---


def print_help(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command_with_a_call(capsys):
    text = print_help(capsys)
    for command in COMMANDS:
        assert command.summary in text and f"trl-vicur {command.name} {command.example}" in text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_a_command_has_examples_and_every_option_of_its_call(capsys, command):
    text = print_help(capsys, *command.name.split())
    assert "examples:\n" in text and f"  trl-vicur {command.name}" in text
    for word in shlex.split(command.example):
        assert not word.startswith("--") or f"\n  {word}" in text, word


# --- Train; that it equals the example script stands in `test_example_scripts.py` ---


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rte": 1e-4}, "knows all of these options: --learning_rte 0.0001"),
        ({"epsilon": 2.0}, r"`epsilon` must be in (0, 1), got 2.0"),
        ({"model_name_or_path": None}, "`--model_name_or_path` is missing"),
        ({"dataset_name": None}, "`--dataset_name` is missing"),
        ({"accelerate_config": "zero9"}, "Accelerate config zero9"),
    ],
)
def test_train_refuses_options_before_it_launches(tmp_path, capfd, options, message):
    options = {"model_name_or_path": "m", "dataset_name": "d", "use_cpu": True, "bf16": False, **options}
    (tmp_path / "config.yaml").write_text(yaml.dump(options))
    assert main(["train", "--config", str(tmp_path / "config.yaml")]) == 1
    assert message in capfd.readouterr().err


def test_train_ends_in_what_is_wrong_with_a_row(tmp_path, capfd, model, dataset):
    """In the process that `accelerate launch` starts, and without a traceback."""
    options = ["--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", str(tmp_path / "student")]
    with pytest.raises(SystemExit) as stop:
        main(["train", *options, "--per_device_train_batch_size", "1", "--use_cpu", "--bf16", "false"])
    printed = capfd.readouterr().err
    assert stop.value.code == 1 and "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("trl-vicur: Row 1 of train_dataset: `cue` is ''")


# --- Doctor ---


def test_doctor_reports_every_bad_row(capsys, model, dataset):
    assert main(["doctor", "--model", model, "--dataset", dataset, "--layer_interval", "2"]) == 1
    printed = capsys.readouterr()
    assert re.search(r"\n  transformers +5\.", printed.out) and "CUE_RECOVERY" in printed.out
    assert "Row 1 of train_dataset: `cue` is ''" in printed.out
    assert "Row 4 of train_dataset: The text of `prompt` contains the control token" in printed.out
    assert printed.out.count("  Row ") == 2
    assert "  train_dataset has 6 row(s), expected at least 8: an incomplete batch is left out" in printed.out
    assert "A training would stop for 3 reason(s)" in printed.err


@pytest.mark.parametrize(
    "launch, processes",
    [
        ({}, 1),
        ({"num_processes": 2}, 2),
        ({"accelerate_config": "zero3"}, 8),
        ({"accelerate_config": "zero3", "num_processes": 2}, 2),
        ({"accelerate_config": "single_gpu"}, 1),
    ],
)
def test_doctor_takes_what_the_training_is_going_to_be_given(tmp_path, capsys, model, dataset, launch, processes):
    """A file with options for a GPU and for accelerate; the bad cue is allowed by one, the bad prompt is left out."""
    Dataset.load_from_disk(dataset).select([0, 1, 2, 3]).to_parquet(tmp_path / "rows.parquet")
    config = {"model_name_or_path": model, "dataset_name": dataset, "missing_privilege": "none", "bf16": True}
    config |= {"layer_interval": 2, "train_base": True, "per_device_train_batch_size": 1} | launch
    config |= {"gradient_accumulation_steps": 2}
    (tmp_path / "config.yaml").write_text(yaml.dump(config))
    command = ["doctor", "--config", str(tmp_path / "config.yaml"), "--dataset", str(tmp_path / "rows.parquet")]
    status = main(command)
    printed = capsys.readouterr().out
    assert f"{2 * processes} rows: 1 at a time, 2 time(s), in {processes} process(es)" in printed
    if processes <= 2:
        assert status == 0 and "every row can be trained on" in printed
    else:
        assert status == 1 and "train_dataset has 4 row(s), expected at least 16" in printed


@pytest.mark.parametrize(
    "options, message",
    [
        (["--layer_interval", "9"], "`layer_interval` is 9, but the model has only 4 decoder layer(s)"),
        (["--cue_column", "hint"], "train_dataset has no column `hint`"),
        (["--sink_token", "<|nothing|>"], "<|nothing|>"),
        (["--learning_rte", "1"], "knows all of these options: --learning_rte 1"),
    ],
)
def test_doctor_finds_what_the_trainer_would_refuse(capsys, model, dataset, options, message):
    assert main(["doctor", "--model", model, "--dataset", dataset, "--layer_interval", "2", *options]) == 1
    assert message in capsys.readouterr().err


def test_doctor_tells_about_this_machine(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for line in ("Devices", "bfloat16" if "cuda:0" in printed else "accelerator", "FlashAttention", "vLLM"):
        assert line in printed


def test_doctor_names_packages_that_are_missing_or_too_old(capsys, monkeypatch):
    def version(name):
        if name == "pint":
            raise packages.PackageNotFoundError
        return {"transformers": "4.57.0"}.get(name, real_version(name))

    real_version = packages.version
    monkeypatch.setattr(packages, "version", version)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "4.57.0 NOT SUPPORTED" in printed.out and "MISSING" in printed.out
    assert re.search(r"pip install 'pint>=\S+' 'transformers<6,>=\S+'\n", printed.err)
