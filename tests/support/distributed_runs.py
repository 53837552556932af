"""
The training runs of tests/trainer/test_many_processes.py, in one process or, with `accelerate launch`, in several:

    accelerate launch ... tests/support/distributed_runs.py MODELS OUTPUT --runs NAME ... [--batch_size N]

Rollouts are greedy, so all setups sample the same completions. Each run saves the model and its logs; a run with
checkpoints is then resumed from its first one. A name that ends in "-bf16" is that run with `bf16=True`, which also
saves the dtypes that occurred.
"""

import argparse
import json
import os
import re
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState
from datasets import Dataset
from tiny_models import make_image
from transformers import training_args

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer


IS_SHARDED = bool({"ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"} & os.environ.keys())
ADAPTER = dict(layer_interval=1, r=2)
EVERYTHING = dict(layer_interval=1, train_base=True)
# FSDP2 cannot resume an optimizer without state. With this epsilon, Adam's updates are proportional to the gradients
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
    Two of every four rows have an image, alternately the first two and the last two, so one process has only text.
    With `videos`, the first of the two has a video instead.
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


BF16 = "-bf16"


class WatchedTrainer(ViCuRTrainer):
    """
    Records the dtypes that decoder layers compute in, and those of the compared values in inputs and loss.

    In bfloat16, rounding decides between tokens of nearly equal probability. So each row's completion is replaced by
    one that its prompt determines.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = {"layers": set(), "compared": set()}
        self.is_rounded = True
        for model in (self.model, self.teacher_model):
            for name, module in model.named_modules() if model is not None else ():
                if isinstance(module, torch.nn.Linear) and re.search(r"language_model\.layers\.\d+\.mlp", name):
                    module.register_forward_hook(lambda _, args, output: self.note("layers", output))

    def note(self, kind: str, tensor: torch.Tensor) -> None:
        self.seen[kind].add(str(tensor.dtype).removeprefix("torch."))

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        completion_ids = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        assert len(completion_ids) == len(prompt_ids) and all(completion_ids)
        return [[(sum(ids) * (i + 3)) % 200 for i in range(2 + sum(ids) % 5)] for ids in prompt_ids]

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        if "old_logprobs" in inputs:
            self.note("compared", inputs["old_logprobs"])
        if not any(inputs is batch for batch in self._buffered_inputs):
            self.seen["compared"].add("a copy of the batch")
        return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.note("compared", loss)
        self.is_rounded &= bool(loss.bfloat16() == loss)
        return loss


def train(name: str, models: Path, output_dir: Path, batch_size: int) -> None:
    student, adapter, options = RUNS[name.removesuffix(BF16)]
    is_bf16 = name.endswith(BF16)
    defaults = dict(
        per_device_train_batch_size=batch_size,
        bf16=is_bf16,
        use_cpu=not IS_SHARDED,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        # Updates are proportional to the gradients; Adam would amplify rounding errors
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
        return (WatchedTrainer if is_bf16 else ViCuRTrainer)(
            model=str(models / student),
            teacher_model=str(models / "teacher") if name.startswith("larger_teacher") else None,
            args=ViCuRConfig(output_dir=str(output_dir), **{**defaults, **options}),
            train_dataset=Dataset.from_list(make_rows(24, videos=name.startswith("videos"))),
            peft_config=None if adapter is None else CueRecoveryConfig(**adapter),
        )

    trainer = make_trainer()
    trainer.train()
    if "save_steps" in options:
        trainer = make_trainer()
        trainer.train(resume_from_checkpoint=str(output_dir / "checkpoint-1"))
    trainer.save_model()
    if not IS_SHARDED and adapter == ADAPTER:
        assert "inputs" not in vars(trainer._blank_image_row), "a frozen, unsharded vision tower needs no blank image"
    if trainer.is_world_process_zero():
        logs = [log for log in trainer.state.log_history if "loss" in log]
        (output_dir / "logs.json").write_text(json.dumps(logs))
        if is_bf16:
            assert not trainer.is_rounded, "every loss is representable in bfloat16"
            (output_dir / "dtypes.json").write_text(
                json.dumps({key: sorted(trainer.seen[key]) for key in trainer.seen})
            )


def pretend_that_cpus_are_gpus() -> None:
    """Accelerate enables FSDP and DeepSpeed on GPUs only, although both run on CPUs over gloo."""
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda state: setattr(state, "device", torch.device("cpu"))
    training_args.is_torch_bf16_gpu_available = lambda: True


if __name__ == "__main__":
    torch.set_num_threads(1)
    if IS_SHARDED:
        pretend_that_cpus_are_gpus()
    parser = argparse.ArgumentParser()
    parser.add_argument("models", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--runs", nargs="+", choices=[*RUNS, *(run + BF16 for run in RUNS)])
    parser.add_argument("--batch_size", type=int, default=2)
    arguments = parser.parse_args()
    for run in arguments.runs:
        train(run, arguments.models, arguments.output / run, arguments.batch_size)
