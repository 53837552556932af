"""Training with a teacher on a server, compared with the same teacher in this process."""

from pathlib import Path

import torch
from datasets import Dataset
from tiny_models import make_image, make_qwen3_vl

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer


def make_rows(count: int = 8) -> list[dict]:
    """Rows with one image, two images, and none."""
    sizes = [[(64, 64)], [(96, 64), (32, 64)], [], [(128, 96)]]
    return [
        {
            "prompt": [{"role": "user", "content": f"What is in picture {i}?" + "?" * i}],
            "images": [make_image(10 * i + j, size) for j, size in enumerate(sizes[i % 4])],
            "cue": f"noise number {i}",
        }
        for i in range(count)
    ]


def make_trainer(output_dir: Path, processor, teacher_model=None, **options) -> ViCuRTrainer:
    """A trainer of an adapter whose completions depend only on its seed."""
    defaults = dict(
        output_dir=str(output_dir),
        bf16=False,
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_steps=3,
        max_completion_length=6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return ViCuRTrainer(
        model=make_qwen3_vl(),
        teacher_model=teacher_model,
        args=ViCuRConfig(**{**defaults, **options}),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=processor,
        peft_config=CueRecoveryConfig(layer_interval=1, r=2),
    )


def train(trainer: ViCuRTrainer) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The logs of each step and the trained weights."""
    trainer.train()
    names = ("loss", "grad_norm", "entropy", "logprob_gap/mean", "logprob_gap/segment_4")
    logs = [{name: log[name] for name in names} for log in trainer.state.log_history if "loss" in log]
    return logs, {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_trains_as_with_local_teacher(url: str, teacher: torch.nn.Module, processor, output_dir: Path, **options):
    """Three steps with the server's scores equal those with the teacher in this process, in float32."""
    served = make_trainer(output_dir, processor, teacher_model_server_url=url, **options)
    served_logs, served_weights = train(served)
    local_logs, local_weights = train(make_trainer(output_dir, processor, teacher_model=teacher, **options))
    assert len(served_logs) == 3 and served.teacher_model is None
    torch.testing.assert_close(served_logs, local_logs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(served_weights, local_weights, rtol=1e-4, atol=1e-4)
