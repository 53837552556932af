"""The command `trl-vicur` as a whole, `trl-vicur train` and `trl-vicur doctor`."""

import re
import shlex
import shutil
from dataclasses import fields

import datasets
import pytest
import yaml
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from scoring_server import ScoringServer
from tiny_models import make_qwen3_vl, make_rows
from trl import ModelConfig, get_peft_config

from trl_vicur.cli import COMMANDS, main
from trl_vicur.doctor import packages
from trl_vicur.train import CueRecoveryArguments, make_peft_config


# datasets before 5 raises pandas' error
JSON_ERROR = "JSON parse error" if Version(datasets.__version__) >= Version("5") else "Expected object or value"


@pytest.fixture(scope="module")
def model(tmp_path_factory, processor):
    """Folder with a tiny model and its processor."""
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


def test_help_lists_every_command_with_an_example(capsys):
    text = print_help(capsys)
    for command in COMMANDS:
        assert command.summary in text and f"trl-vicur {command.name} {command.example}" in text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_help_of_a_command_has_examples_and_all_their_options(capsys, command):
    text = print_help(capsys, *command.name.split())
    assert "examples:\n" in text and f"  trl-vicur {command.name}" in text
    for word in shlex.split(command.example):
        assert not word.startswith("--") or f"\n  {word}" in text, word


def test_help_keeps_the_lines_of_a_default(capsys):
    assert r"(default: {prompt}\n\n[Hint]: {privilege})" in " ".join(print_help(capsys, "train").split())


# --- Invalid arguments and files ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["cues"], "unknown command 'cues', expected one of cues generate, cues audit\n"),
        (["cues", "make"], "unknown command 'cues make', expected one of cues generate, cues audit\n"),
        (
            ["cue", "audit"],
            "unknown command 'cue', expected one of train, doctor, cues generate, cues audit, heat",
        ),
        (["train"], "the following arguments are required: --dataset_name/--dataset-name, --model_name_or_path"),
        (["doctor", "--config"], "argument --config: expected one argument"),
        (["train", "--config", "--use_cpu"], "argument --config: expected one argument"),
    ],
    ids=" ".join,
)
def test_missing_arguments_are_reported_with_the_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: trl-vicur") and message in printed


@pytest.mark.parametrize("command", ["train", "doctor", "cues generate", "heatmap"])
def test_options_file_that_is_not_valid_yaml(tmp_path, capsys, command):
    (tmp_path / "config.yaml").write_text("learning_rate: [1\nepsilon: }")
    assert main([*command.split(), "--config", str(tmp_path / "config.yaml")]) == 1
    printed = capsys.readouterr().err
    assert "The `--config` file is not valid YAML: while parsing" in printed and "config.yaml" in printed


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.jsonl", b'{"prompt": "What?"}\n{"prompt": ', f"cannot be read: {JSON_ERROR}"),
        ("rows.csv", b"question,cue\na,b\na,b,c\n", "cannot be read: Error tokenizing data"),
        ("rows.parquet", b"PAR1", "cannot be read: "),
        ("rows.jsonl", b"", "is empty"),
    ],
)
@pytest.mark.parametrize("command", ["doctor", "cues generate --output cues"])
def test_damaged_dataset_file(tmp_path, capsys, monkeypatch, model, command, name, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert main([*command.split(), "--model", model, "--dataset", name]) == 1
    assert f"\ntrl-vicur: '{name}' {message}" in f"\n{capsys.readouterr().err}"


@pytest.mark.parametrize("command", ["doctor", "cues generate --output cues"])
def test_missing_model_is_named(tmp_path, capsys, monkeypatch, dataset, command):
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--model", "nobody/nothing", "--dataset", dataset]) == 1
    assert "trl-vicur: The model 'nobody/nothing' cannot be loaded: " in capsys.readouterr().err


# --- Train (test_example_scripts.py tests that it equals the example script) ---


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


def test_every_lora_option_reaches_the_adapter_with_the_module():
    options = {
        "lora_r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.5,
        "lora_target_modules": ["q_proj", "v_proj"],
        "lora_target_parameters": ["mlp.experts.gate_up_proj"],
        "lora_modules_to_save": ["lm_head"],
        "lora_task_type": "FEATURE_EXTRACTION",
        "use_rslora": True,
        "use_dora": True,
    }
    offered = {each.name for each in fields(ModelConfig) if each.name.startswith(("lora_", "use_rslora", "use_dora"))}
    assert offered == options.keys()
    model_args = ModelConfig(model_name_or_path="m", use_peft=True, **options)
    theirs, ours = get_peft_config(model_args), make_peft_config(model_args, CueRecoveryArguments())
    names = {each.name for each in fields(LoraConfig)}
    assert {name for name in names if getattr(theirs, name) != getattr(ours, name)} == {"peft_type"}


def test_adapter_has_no_task_type_unless_one_is_given():
    """`AutoPeftModel` refuses adapters that have one, and TRL's default is `CAUSAL_LM`."""
    model_args = ModelConfig(model_name_or_path="m", use_peft=True)
    assert get_peft_config(model_args).task_type == "CAUSAL_LM"
    assert make_peft_config(model_args, CueRecoveryArguments()).task_type is None


def run_train(tmp_path, model, dataset, *options) -> None:
    arguments = ["--model_name_or_path", model, "--dataset_name", dataset, "--output_dir", str(tmp_path / "student")]
    small = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--max_steps", "1"]
    small += ["--max_completion_length", "4", "--layer_interval", "2", "--bf16", "false", "--report_to", "none"]
    main(["train", *arguments, *small, *options])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, message",
    [
        ([], "Row 1 of train_dataset: `cue` is ''"),
        (["--model_name_or_path", "nobody/nothing"], "The model 'nobody/nothing' cannot be loaded: "),
        (["--missing_privilege", "none", "--resume_from_checkpoint", "true"], "`resume_from_checkpoint=True`, but "),
        (["--missing_privilege", "none", "--resume_from_checkpoint", "gone"], "There is no checkpoint 'gone'."),
    ],
    ids=["row", "model", "no-checkpoint", "checkpoint"],
)
def test_train_ends_with_the_error(tmp_path, capfd, model, dataset, options, message):
    """The process that `accelerate launch` starts prints it without a traceback."""
    Dataset.load_from_disk(dataset).select([0, 1, 2, 3]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(SystemExit) as stop:
        run_train(tmp_path, model, str(tmp_path / "rows.parquet"), "--use_cpu", *options)
    printed = capfd.readouterr().err
    assert stop.value.code == 1 and "Traceback" not in printed
    assert f"\ntrl-vicur: {message}" in printed


@pytest.mark.slow
def test_error_during_training_has_a_traceback(tmp_path, capfd, model):
    """A bad row of a stream is found when it is used."""
    Dataset.from_list([{**row, "cue": ""} for row in make_rows(2)]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(SystemExit):
        run_train(tmp_path, model, str(tmp_path / "rows.parquet"), "--use_cpu", "--dataset_streaming", "true")
    printed = capfd.readouterr().err
    assert "Traceback" in printed and re.search("ValueError: Streamed row [01] of train_dataset: `cue` is ''", printed)


@pytest.mark.slow
@pytest.mark.parametrize("on_cpu", [["--use_cpu"], ["--cpu"]], ids=" ".join)
def test_train_starts_the_requested_number_of_processes(tmp_path, capfd, model, on_cpu):
    """On a CPU, where accelerate would start one by default. It prints no warning about unset options."""
    Dataset.from_list(make_rows(2)).to_parquet(tmp_path / "rows.parquet")
    options = ["--num_processes", "2", "--main_process_port", "0", "--logging_steps", "1"]
    run_train(tmp_path, model, str(tmp_path / "rows.parquet"), *on_cpu, *options)
    printed = capfd.readouterr()
    assert "'epoch': '1'" in printed.out and "following values were not passed" not in printed.err
    run_train(tmp_path, model, str(tmp_path / "rows.parquet"), *on_cpu, *options, "--resume_from_checkpoint", "True")
    assert "following values were not passed" not in capfd.readouterr().err


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
        ({"accelerate_config": "fsdp2"}, 8),
        ({"accelerate_config": "fsdp2", "num_processes": 2}, 2),
        ({"accelerate_config": "single_gpu"}, 1),
    ],
)
def test_doctor_reads_the_options_of_training(tmp_path, capsys, model, dataset, launch, processes):
    """A file has options for GPUs and accelerate. One option allows the bad cue, another leaves out the bad prompt."""
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
        (["--accelerate_config", "zero3"], "ZeRO-3 is not supported"),
        (["--accelerate_config", "fsdp1"], "FSDP1 is not supported"),
        (["--use_fsdp", "--num_processes", "2"], "FSDP1 is not supported"),
        (["--accelerate_config", "fsdp2", "--teacher_model_kind", "ema"], "`teacher_model_kind='ema'` swaps"),
        (["--accelerate_config", "zero2", "--teacher_model_kind", "ema"], "`teacher_model_kind='ema'` swaps"),
        (["--teacher_model_name_or_path", "nobody/nothing"], "The model 'nobody/nothing' cannot be loaded: "),
        (["--use_vllm", "true"], "`use_vllm=True` needs vLLM, which is not installed"),
        (["--dynamo_backend", "inductor"], "`dynamo_backend=inductor` is not supported"),
        (["--resume_from_checkpoint", "no/checkpoint-1"], "There is no checkpoint 'no/checkpoint-1'"),
        (["--load_in_4bit", "true", "--train_base", "true"], "Quantized weights cannot be trained"),
        (["--load_in_8bit", "true", "--cue_recovery", "false"], "Quantized weights cannot be trained"),
        (["--teacher_model_server_url", "http://127.0.0.1:9"], "server at http://127.0.0.1:9 cannot be reached"),
        (
            ["--use_peft", "true", "--lora_target_modules", "q_proj", "lm_head"],
            "The adapter has LoRA on `lm_head`, which TRL refuses",
        ),
    ],
)
def test_doctor_finds_what_the_trainer_would_refuse(capsys, monkeypatch, model, dataset, options, message):
    monkeypatch.setattr("trl_vicur.trainer.checks.options.is_vllm_available", lambda: False)
    assert main(["doctor", "--model", model, "--dataset", dataset, "--layer_interval", "2", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "`max_steps=-1`, but the length of a streamed dataset is unknown"),
        (["--max_steps", "2", "--num_iterations", "2"], "`num_iterations=2` needs a `Dataset`"),
        (
            ["--max_steps", "2", "--accelerator_config", '{"dispatch_batches": true}'],
            "`accelerator_config={'dispatch_batches': True}` is not supported with a streamed dataset",
        ),
    ],
)
def test_doctor_finds_what_the_trainer_would_refuse_in_streams(tmp_path, capsys, model, options, message):
    Dataset.from_list(make_rows(4)).to_parquet(tmp_path / "rows.parquet")
    options = ["--dataset", str(tmp_path / "rows.parquet"), "--dataset_streaming", "true", *options]
    assert main(["doctor", "--model", model, "--layer_interval", "2", *options]) == 1
    assert message in capsys.readouterr().err


def test_doctor_reads_the_deepspeed_file(tmp_path, capsys, model):
    (tmp_path / "deepspeed.json").write_text('{"zero_optimization": {"stage": 3}}')
    options = ["--use_deepspeed", "--deepspeed_config_file", str(tmp_path / "deepspeed.json")]
    assert main(["doctor", "--model", model, *options]) == 1
    assert "ZeRO-3 is not supported" in capsys.readouterr().err


def test_doctor_reports_missing_deepspeed(capsys, monkeypatch, model):
    monkeypatch.setattr("trl_vicur.doctor.training.is_deepspeed_available", lambda: False)
    assert main(["doctor", "--model", model, "--layer_interval", "2", "--accelerate_config", "zero2"]) == 1
    assert "DeepSpeed is not installed. Install it with `pip install deepspeed`" in capsys.readouterr().err


def test_doctor_compares_the_vocabularies_of_student_and_teacher(tmp_path, capsys, model):
    make_qwen3_vl(vocab_size=300).save_pretrained(tmp_path)
    options = ["--teacher_model_name_or_path", str(tmp_path)]
    assert main(["doctor", "--model", model, "--layer_interval", "2", *options]) == 1
    assert "vocab_size 263 but the teacher model has vocab_size 300" in capsys.readouterr().err


@pytest.mark.parametrize("privilege", ["cue", "none"])
def test_doctor_warns_of_thinking_checkpoints(tmp_path, model, privilege):
    """Privilege costs thinking students accuracy, and student and teacher should have the same thinking mode."""
    shutil.copytree(model, tmp_path / "thinking")
    template = tmp_path / "thinking" / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n"))
    student, teacher = (tmp_path / "thinking", model) if privilege == "cue" else (model, tmp_path / "thinking")
    options = ["--teacher_model_name_or_path", str(teacher), "--privilege", privilege, "--layer_interval", "2"]
    with pytest.warns(UserWarning, match="Teacher and student are in different thinking modes") as caught:
        assert main(["doctor", "--model", str(student), *options]) == 0
    costs = [each for each in caught if "costs thinking models up to 17 %" in str(each.message)]
    assert len(costs) == (privilege == "cue")


def test_doctor_asks_the_server_of_the_teacher(capsys, model, dataset, processor):
    """The server's context is shorter than the student's and too short for the rows."""
    with ScoringServer(make_qwen3_vl(seed=5), processor, max_model_len=300) as server:
        options = ["--teacher_model_server_url", server.url, "--dataset", dataset, "--max_completion_length", "280"]
        assert main(["doctor", "--model", model, "--layer_interval", "2", *options]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"context +299 tokens", printed) and "exceeds the model's context of 299 tokens" in printed


def test_doctor_describes_this_machine(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for line in ("Devices", "bfloat16" if "cuda:0" in printed else "accelerator", "FlashAttention", "vLLM"):
        assert line in printed


def test_doctor_names_packages_that_are_missing_or_too_old(capsys, monkeypatch):
    def version(name):
        if name == "liger-kernel":
            raise packages.PackageNotFoundError
        return {"transformers": "4.57.0"}.get(name, real_version(name))

    real_version = packages.version
    monkeypatch.setattr(packages, "version", version)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "4.57.0 NOT SUPPORTED" in printed.out and "MISSING" in printed.out
    assert re.search(r"pip install 'liger-kernel>=\S+' 'transformers<6,>=\S+'\n", printed.err)
