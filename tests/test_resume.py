"""Nothing is lost: runs stopped at any moment go on, bit for bit, from the newest checkpoint that is whole."""

import pytest
import torch
from datasets import Dataset
from test_trainer import make_config, make_rows, weights
from tiny_models import make_processor, make_qwen3_vl

from trl_vicur import CueRecoveryConfig, ViCuRTrainer


ADAPTER = dict(layer_interval=1)


def make_trainer(directory, config=ADAPTER, streamed=False, **arguments) -> ViCuRTrainer:
    """A trainer over 8 rows, that is 2 steps per epoch, with a checkpoint after each step."""
    defaults = dict(max_steps=6, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    dataset = Dataset.from_list(make_rows(8))
    return ViCuRTrainer(
        model=make_qwen3_vl(),
        args=make_config(directory, **{**defaults, **arguments}),
        train_dataset=dataset.to_iterable_dataset() if streamed else dataset,
        processing_class=make_processor(),
        peft_config=None if config is None else CueRecoveryConfig(**config),
    )


def train(directory, resume=None, **arguments) -> ViCuRTrainer:
    trainer = make_trainer(directory, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def curve(log_history: list[dict]) -> list[dict]:
    """All that is logged of each step, but for its duration."""
    return [{k: v for k, v in log.items() if k != "step_time"} for log in log_history if "loss" in log]


def assert_same_run(resumed: ViCuRTrainer, whole: ViCuRTrainer) -> None:
    assert curve(resumed.state.log_history) == curve(whole.state.log_history)
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    if whole.ema_teacher is not None:
        torch.testing.assert_close(resumed.ema_teacher.average, whole.ema_teacher.average, rtol=0, atol=0)


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
    ],
    ids=["module", "second-epoch", "epoch-end", "train_base", "ema-adapter", "ema-full", "iterations", "streamed"],
)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, arguments, step):
    whole = train(tmp_path, **arguments)
    resumed = train(tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **arguments)
    assert_same_run(resumed, whole)
