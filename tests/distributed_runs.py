"""
What tests/test_many_processes.py trains, in one process or, by `accelerate launch`, in several:

    accelerate launch ... tests/distributed_runs.py MODELS OUTPUT --runs NAME ... [--batch_size N]

Rollouts are greedy, so that all ways to train have the same completions. Each run saves the model and its logs; one
with checkpoints is trained a second time, from the first of them.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from tiny_models import make_image

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer


IS_SHARDED = bool({"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys())
ADAPTER = dict(layer_interval=1, r=2)
EVERYTHING = dict(layer_interval=1, train_base=True)
# FSDP2 resumes no optimizer without a state. With such an epsilon, Adam follows the gradients
RESUMED = dict(save_strategy="steps", save_steps=1, optim="adamw_torch", adam_epsilon=1.0)
# Student, options of its adapter, options of the trainer
RUNS = {
    "adapter": ("student", ADAPTER, dict(gradient_accumulation_steps=2)),
    "larger_teacher": ("student", ADAPTER, dict(share_vision_features="never", loss_aggregation="sequence")),
    "train_base": ("tied_student", EVERYTHING, dict(distillation_mode="full_logits", gradient_checkpointing=True)),
    "live_teacher": ("student", EVERYTHING, dict(teacher_model_kind="live", distillation_mode="topk_logits")),
    "ema_teacher": ("student", ADAPTER, dict(teacher_model_kind="ema")),
    "without_module": ("student", None, dict(distillation_mode="full_logits", gradient_checkpointing=True)),
    "videos": ("student", EVERYTHING, dict(teacher_model_kind="live", distillation_mode="topk_logits")),
    "resumed_adapter": ("student", ADAPTER, dict(RESUMED, num_iterations=2)),
    "resumed_train_base": ("tied_student", EVERYTHING, RESUMED),
}


def make_rows(count: int, videos: bool) -> list[dict]:
    """
    Of every four rows two have an image, in turn the first two and the last two: one process has only text. With
    `videos` the first of each two has a video in its place.
    """
    rows = []
    for i in range(count):
        has_visual = i % 8 in (0, 1, 6, 7)
        is_video = videos and i % 2 == 0
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"What is in picture {i}?" + "?" * i}],
                "images": [make_image(i)] if has_visual and not is_video else [],
                "videos": [[make_image(i + j) for j in range(4)]] if has_visual and is_video else [],
                "cue": f"noise number {i}",
            }
        )
    return rows if videos else [{key: row[key] for key in row if key != "videos"} for row in rows]


def train(name: str, models: Path, output_dir: Path, batch_size: int) -> None:
    student, adapter, options = RUNS[name]
    defaults = dict(
        per_device_train_batch_size=batch_size,
        bf16=False,
        use_cpu=not IS_SHARDED,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        # Follows the gradients, where Adam would make much of rounding errors
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_steps=3,
        max_completion_length=6,
        top_k=1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    def make_trainer() -> ViCuRTrainer:
        return ViCuRTrainer(
            model=str(models / student),
            teacher_model=str(models / "teacher") if name == "larger_teacher" else None,
            args=ViCuRConfig(output_dir=str(output_dir), **{**defaults, **options}),
            train_dataset=Dataset.from_list(make_rows(24, videos=name == "videos")),
            peft_config=None if adapter is None else CueRecoveryConfig(**adapter),
        )

    trainer = make_trainer()
    trainer.train()
    if "save_steps" in options:
        trainer = make_trainer()
        trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-1"))
    trainer.save_model()
    if not IS_SHARDED and adapter == ADAPTER:
        assert "inputs" not in vars(trainer._blank_image_row), "a frozen, whole vision tower needs no blank image"
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        (output_dir / "logs.json").write_text(json.dumps(logs))


def let_cpus_stand_for_gpus() -> None:
    """Accelerate has FSDP and DeepSpeed for GPUs only, though both run on CPUs, over gloo."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if IS_SHARDED:
        let_cpus_stand_for_gpus()
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", nargs="+", choices=RUNS)
    parser.add_argument("--batch_size", type=int, default=2)
    arguments = parser.parse_args()
    for run in arguments.runs:
        train(run, arguments.models, arguments.output / run, arguments.batch_size)
