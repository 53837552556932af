"""Builds trainers without training them."""

from tempfile import TemporaryDirectory

from datasets import Dataset
from tiny_models import make_processor, make_qwen3_vl, make_rows

from trl_vicur import ViCuRConfig, ViCuRTrainer


OUTPUT = TemporaryDirectory()  # a trainer creates its `output_dir` in its constructor


def make_config(**arguments) -> ViCuRConfig:
    defaults = dict(
        output_dir=OUTPUT.name,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=1,
        max_completion_length=8,
        max_steps=1,
    )
    return ViCuRConfig(**{**defaults, **arguments})


def build(dataset=None, eval_dataset=None, model=None, processor=None, teacher=None, peft_config=None, **arguments):
    """Build a trainer without training it."""
    return ViCuRTrainer(
        model=make_qwen3_vl() if model is None else model,
        teacher_model=teacher,
        args=make_config(**arguments),
        train_dataset=Dataset.from_list(make_rows(3)) if dataset is None else dataset,
        eval_dataset=eval_dataset,
        processing_class=make_processor() if processor is None else processor,
        peft_config=peft_config,
    )
