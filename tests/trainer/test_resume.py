"""Nothing is lost: a run stopped at any moment continues, bit for bit, from the newest complete checkpoint."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from tiny_models import make_processor, make_qwen3_vl
from tiny_trainers import make_config, make_rows, weights
from transformers import TrainerCallback

from trl_vicur import CueRecoveryConfig, ViCuRTrainer
from trl_vicur.trainer.checkpoints import check_batches, get_last_checkpoint
from trl_vicur.trainer.teachers.student_teachers import EMATeacher


ADAPTER = dict(layer_interval=1)


def make_trainer(
    directory, config=ADAPTER, sizes=(), streamed=False, num_rows=8, adapter_name=None, **arguments
) -> ViCuRTrainer:
    """A trainer over 8 rows, that is 2 steps per epoch, with a checkpoint after each step."""
    defaults = dict(max_steps=6, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    dataset = Dataset.from_list(make_rows(num_rows))
    model = make_qwen3_vl(**dict(sizes))
    if adapter_name is not None:
        torch.manual_seed(0)
        model, config = get_peft_model(model, CueRecoveryConfig(**config), adapter_name=adapter_name), None
    return ViCuRTrainer(
        model=model,
        args=make_config(directory, **{**defaults, **arguments}),
        train_dataset=dataset.to_iterable_dataset() if streamed else dataset,
        eval_dataset=dataset.select(range(2)),
        processing_class=make_processor(),
        peft_config=None if config is None else CueRecoveryConfig(**config),
    )


def train(directory, resume=None, **arguments) -> ViCuRTrainer:
    trainer = make_trainer(directory, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def curve(log_history: list[dict]) -> list[dict]:
    """Everything that is logged of each step except its duration."""
    return [{k: v for k, v in log.items() if k != "step_time"} for log in log_history if "loss" in log]


def assert_same_run(resumed: ViCuRTrainer, whole: ViCuRTrainer) -> None:
    assert curve(resumed.state.log_history) == curve(whole.state.log_history)
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    if isinstance(whole.teacher, EMATeacher):
        torch.testing.assert_close(resumed.teacher.average, whole.teacher.average, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, step",
    [
        ({}, 1),
        ({}, 3),
        ({}, 4),
        ({"config": dict(**ADAPTER, train_base=True)}, 3),
        ({"config": dict(**ADAPTER, r=2, lora_dropout=0.5), "teacher_model_kind": "ema"}, 3),
        ({"config": None, "teacher_model_kind": "ema", "teacher_sync_steps": 2}, 3),
        ({"num_iterations": 3}, 4),
        ({"streamed": True}, 3),
        ({"adapter_name": "student"}, 3),
    ],
    ids=[
        "module",
        "second-epoch",
        "epoch-end",
        "train_base",
        "ema-adapter",
        "ema-full",
        "iterations",
        "streamed",
        "named",
    ],
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, arguments, step):
    whole = train(tmp_path, **arguments)
    resumed = train(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **arguments)
    assert_same_run(resumed, whole)


def test_best_checkpoint_is_found_after_the_folder_was_moved(tmp_path):
    evaluated = dict(max_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    trainer = train(tmp_path / "here", **evaluated)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "here" / "checkpoint-1")
    moved = (tmp_path / "here").rename(tmp_path / "there")
    trainer = train(moved, resume=True, **evaluated)
    assert trainer.state.best_model_checkpoint == str(moved / "checkpoint-1")


@pytest.mark.parametrize("config", [ADAPTER, dict(**ADAPTER, r=2, train_base=True)], ids=["module", "train_base"])
def test_best_checkpoint_of_a_named_adapter_is_loaded(tmp_path, config):
    trainer = train(
        tmp_path,
        config=config,
        adapter_name="student",
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_num_tokens",  # the first is the best
        greater_is_better=False,
    )
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    saved = [load_file(tmp_path / f"checkpoint-{step}/student/adapter_model.safetensors") for step in (1, 3)]
    loaded = get_peft_model_state_dict(trainer.model, adapter_name="student")
    torch.testing.assert_close({name: loaded[name] for name in saved[0]}, saved[0], rtol=0, atol=0)
    assert any(not torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_checkpoint_that_replaces_an_earlier_one_is_complete(tmp_path):
    for _ in range(2):
        train(tmp_path, max_steps=1)
        assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


# --- Checkpoints that cannot be resumed ---


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A run of two steps with an EMA teacher, which the tests copy."""
    directory = tmp_path_factory.mktemp("checkpoints")
    train(directory, teacher_model_kind="ema", max_steps=2)
    return directory


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("trainer_state.json", Path.unlink, "it has no trainer_state.json; the run ended while it was being saved"),
        ("trainer_state.json", truncate, r"its trainer_state.json is truncated or corrupt \("),
        (
            "checkpoint_files.json",
            Path.unlink,
            "it has no checkpoint_files.json; it was not saved by ViCuRTrainer, or was saved with",
        ),
        (
            "adapter_model.safetensors",
            truncate,
            r"its file adapter_model.safetensors has \d+ bytes, but was written with \d+",
        ),
        ("optimizer.pt", truncate, r"its file optimizer.pt has \d+ bytes, but was written with \d+"),
        ("ema_teacher.safetensors", Path.unlink, "its file ema_teacher.safetensors is missing"),
    ],
)
def test_damaged_checkpoint_is_refused_or_skipped(tmp_path, checkpoints, caplog, name, damage, message):
    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoint-2"
    damage(newest / name)
    trainer = make_trainer(tmp_path, teacher_model_kind="ema")
    with pytest.raises(ValueError, match=f"The checkpoint '{newest}' cannot be resumed: {message}"):
        trainer.train(resume_from_checkpoint=str(newest))
    assert get_last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert str(newest) in caplog.text


def test_resuming_without_a_checkpoint_is_refused(tmp_path, checkpoints):
    with pytest.raises(ValueError, match="holds no complete checkpoint. Leave it out to start a new run"):
        train(tmp_path, resume=True)
    with pytest.raises(ValueError, match="There is no checkpoint 'checkpoint-9'"):
        train(tmp_path, resume="checkpoint-9")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"config": None}, "it holds CUE_RECOVERY, but this run trains a full model"),
        ({"config": dict(layer_interval=2)}, "has `layer_interval=1`, but the adapter that is trained has `.*=2`"),
        (
            {"config": dict(**ADAPTER, sink_token="<|im_end|>")},
            "has `sink_token='first'`, but .* `sink_token='<\\|im_end\\|>'`",
        ),
        ({"config": dict(**ADAPTER, r=2)}, "has `r=0`, but .* `r=2`"),
        ({"sizes": {"hidden_size": 64}}, "has `hidden_size=32`, but .* `hidden_size=64`"),
    ],
    ids=["full-model", "layers", "sink", "rank", "width"],
)
def test_checkpoint_of_another_model_is_refused(tmp_path, checkpoints, arguments, message):
    trainer = make_trainer(tmp_path, **arguments)
    with pytest.raises(ValueError, match=f"does not match the model that is trained: .*{message}.*start a new run"):
        trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))


@pytest.mark.parametrize(
    "arguments, of_checkpoint, of_run",
    [
        ({"per_device_train_batch_size": 1}, "per_device_train_batch_size=2", "per_device_train_batch_size=1"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=2", "gradient_accumulation_steps=1"),
        ({"num_iterations": 2}, "num_iterations=1", "num_iterations=2"),
        ({"num_rows": 12}, r"len\(train_dataset\)=8", r"len\(train_dataset\)=12"),
        ({"streamed": True}, r"len\(train_dataset\)=8", r"len\(train_dataset\)=None"),
        ({"shuffle_dataset": False}, "shuffle_dataset=True", "shuffle_dataset=False"),
        ({"seed": 7}, "seed=42", "seed=7"),
    ],
)
def test_checkpoint_of_a_run_with_other_batches_is_refused(tmp_path, checkpoints, arguments, of_checkpoint, of_run):
    trainer = make_trainer(tmp_path, teacher_model_kind="ema", **arguments)
    message = f"saved with .*`{of_checkpoint}`.*has .*`{of_run}`.*Resume with the checkpoint's settings"
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))


def test_rollouts_of_another_batch_shape_objective_or_teacher_are_refused(tmp_path):
    train(tmp_path, num_iterations=2, max_steps=1)
    for arguments, option in (
        (dict(per_device_train_batch_size=4, gradient_accumulation_steps=1), "per_device_train_batch_size=2"),
        (dict(distillation_mode="full_logits"), "distillation_mode='sampled_token'"),
    ):
        with pytest.raises(ValueError, match=f"saved with `{option}`.*between two steps on the same rollouts"):
            train(tmp_path, resume=True, num_iterations=2, **arguments)
    served = make_config(tmp_path, num_iterations=2, teacher_model_server_url="http://localhost")
    with pytest.raises(ValueError, match=r"with `bool\(teacher_model_server_url\)=False`, but this run has .*True"):
        check_batches(tmp_path / "checkpoint-1", served, Dataset.from_list(make_rows(8)))
    batches = tmp_path / "checkpoint-1" / "batches.json"
    batches.write_text(batches.read_text().replace('"num_processes": 1', '"num_processes": 2'))
    (tmp_path / "checkpoint-1" / "checkpoint_files.json").write_text("{}")
    with pytest.raises(ValueError, match="saved with `num_processes=2`, but this run has `num_processes=1`. It was"):
        train(tmp_path, resume=True, num_iterations=2)


@pytest.mark.slow
@pytest.mark.parametrize("streamed", [False, True], ids=["dataset", "streamed"])
def test_resumed_run_may_have_other_micro_batches_and_more_steps(tmp_path, streamed):
    """If no rollouts are pending: the same rows per step in other micro-batches, and more steps than planned."""
    rows = []

    class RecordRows(ViCuRTrainer):
        def _generate_and_score_completions(self, inputs):
            rows.append(sorted(row["cue"] for row in inputs if self.model.training))
            return super()._generate_and_score_completions(inputs)

    def train_recorded(directory, resume=None, **arguments):
        rows.clear()
        trainer = make_trainer(directory, streamed=streamed, num_rows=12, **arguments)
        trainer.__class__ = RecordRows
        trainer.train(resume_from_checkpoint=resume)
        return list(rows)

    whole = train_recorded(tmp_path / "whole")
    begun = train_recorded(tmp_path / "parts", max_steps=2)
    divided = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert begun + train_recorded(tmp_path / "parts", resume=True, **divided) == whole


def test_ignore_data_skip_starts_with_other_rows(tmp_path, checkpoints):
    trainer = make_trainer(tmp_path, teacher_model_kind="ema", num_rows=12, ignore_data_skip=True)
    trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-2"))
    assert trainer.state.global_step == 6


def test_checkpoint_without_the_teacher_average_is_refused(tmp_path, checkpoints):
    train(tmp_path, max_steps=1)
    with pytest.raises(
        ValueError, match="has no ema_teacher.safetensors: it was not saved with `teacher_model_kind='ema'`"
    ):
        train(tmp_path, resume=True, teacher_model_kind="ema")


# --- Killed processes ---

# Everything that a checkpoint can contain; two steps on the same rollouts, 4 steps per epoch
KILLED = dict(
    config=dict(**ADAPTER, r=2), teacher_model_kind="ema", num_iterations=2, save_total_limit=1, report_to="none"
)
# Moments within the third step's checkpoint, in the order in which its files are created: the optimizer's file is
# truncated, the trainer's state still empty
FILES = [
    "adapter_model.safetensors",
    "optimizer.pt",
    "ema_teacher.safetensors",
    "rollouts_0.pt",
    "batches.json",
    "checkpoint_files.json",
    "trainer_state.json",
]


class KillWhen(TrainerCallback):
    """Kills this process as soon as a file exists, or no longer exists, after a step."""

    def __init__(self, path: Path, exists: bool, after_step: int):
        self.path, self.exists, self.after_step = path, exists, after_step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after_step:
            sys.setprofile(self.watch)  # called for each function call, including C functions

    def watch(self, frame, event, argument):
        if self.path.exists() == self.exists:
            os.kill(os.getpid(), signal.SIGKILL)


def go_on(directory: Path, *kill_when) -> None:
    """A job that is started again after each kill, in its own process."""
    torch.set_num_threads(1)
    trainer = make_trainer(directory, **KILLED)
    if kill_when:
        trainer.add_callback(KillWhen(*kill_when))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(directory))


@pytest.fixture(scope="module")
def start():
    """Starts `go_on` in processes forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trl_vicur.trainer"])
    warm_up = context.Process(target=int)
    warm_up.start()
    warm_up.join()

    def start(*arguments):
        process = context.Process(target=go_on, args=arguments)
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """An uninterrupted run, and its duration in seconds."""
    directory = tmp_path_factory.mktemp("uninterrupted")
    began = time.monotonic()
    start(directory).join()
    return directory, time.monotonic() - began


def assert_same_end(directory: Path, uninterrupted: Path) -> None:
    """The last checkpoints have the same losses of all steps and the same bytes."""
    ends = [each / "checkpoint-6" for each in (directory, uninterrupted)]
    resumed, whole = (json.loads((end / "trainer_state.json").read_text())["log_history"] for end in ends)
    assert len(whole) == 6 and curve(resumed) == curve(whole)
    for name in ("adapter_model.safetensors", "ema_teacher.safetensors", "optimizer.pt", "rng_state.pth"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes(), name


@pytest.mark.slow
def test_killed_while_a_checkpoint_is_written(tmp_path, start, uninterrupted):
    moments = [(tmp_path / "checkpoint-1" / "optimizer.pt", True, 1)]  # when there is no other
    moments += [(tmp_path / "checkpoint-3" / name, True, 3) for name in FILES]
    moments += [(tmp_path / "checkpoint-3" / "optimizer.pt", False, 4)]  # while older checkpoints are deleted
    for moment in moments:
        process = start(tmp_path, *moment)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
    for _ in range(2):  # the second finds nothing left to do
        start(tmp_path).join()
        assert_same_end(tmp_path, uninterrupted[0])


def pytest_generate_tests(metafunc):
    if "kill" in metafunc.fixturenames:
        metafunc.parametrize("kill", range(metafunc.config.getoption("kills")))


@pytest.mark.slow
def test_killed_at_a_random_moment(tmp_path, start, uninterrupted, kill):
    exitcode = 0
    while exitcode == 0:  # the run had ended before
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        seconds = random.uniform(0, uninterrupted[1])
        process = start(tmp_path)
        time.sleep(seconds)
        process.kill()
        process.join()
        exitcode = process.exitcode
    assert exitcode == -signal.SIGKILL
    found = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    print(f"\nkilled after {seconds:.2f} s; found {found}, resumed from {get_last_checkpoint(tmp_path)}")
    start(tmp_path).join()
    assert_same_end(tmp_path, uninterrupted[0])


# --- Full disks ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt"])
def test_full_disk_while_a_checkpoint_is_written(tmp_path, name):
    whole = train(tmp_path / "whole")

    class Fill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint.joinpath(name).stat().st_size - 1, limits[1]))

    checkpoint = tmp_path / "full" / "checkpoint-2"
    trainer = make_trainer(tmp_path / "full", save_total_limit=1)
    trainer.add_callback(Fill())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(Exception) as error:
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    [note] = error.value.__notes__
    assert "checkpoint-3 could not be saved" in note and f"newest complete checkpoint is {checkpoint}" in note
    assert (tmp_path / "full" / "checkpoint-3").exists()
    assert_same_run(train(tmp_path / "full", resume=True), whole)
