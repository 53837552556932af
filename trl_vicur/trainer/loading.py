"""Fills in a trainer's arguments: default configuration, processor, and the model's config, before loading weights."""

import warnings

from peft import PeftModel
from transformers import AutoConfig, AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from trl.trainer.utils import get_config_model_id

from ..hub.names import naming_model
from .vicur_config import ViCuRConfig


def load_defaults(
    model: "str | PreTrainedModel | PeftModel", args: ViCuRConfig | None, processing_class: ProcessorMixin | None
) -> tuple[ViCuRConfig, ProcessorMixin, PreTrainedConfig]:
    """
    Arguments of a trainer, with defaults for those that the user left out.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, or its id or path.
        args ([`ViCuRConfig`], *optional*):
            Training configuration.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            Processor of the student.

    Returns:
        `tuple[ViCuRConfig, ProcessorMixin, PreTrainedConfig]`: Training configuration, processor, and the student's
            configuration.

    Raises:
        `OSError`: If the model is not found.
    """
    name = model if isinstance(model, str) else get_config_model_id(model.config)
    if args is None:
        args = ViCuRConfig(f"{name.split('/')[-1]}-ViCuR")
    model_init_kwargs = args.model_init_kwargs or {}
    assert isinstance(model_init_kwargs, dict)  # the configuration parses JSON strings
    revision = model_init_kwargs.get("revision")
    with naming_model(name):
        if processing_class is None:
            processing_class = AutoProcessor.from_pretrained(
                name,
                revision=revision,
                truncation_side="left",
                padding_side="left",
                trust_remote_code=args.trust_remote_code,
            )
        if isinstance(model, str):
            config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
        else:
            config = model.config
    assert processing_class is not None  # `from_pretrained` raises if there is none
    return args, processing_class, config


def leave_out_liger_kernels(args: ViCuRConfig) -> None:
    """On a CPU, turn off the Triton kernels that `Trainer` would patch into the model. The fused JSD runs anywhere."""
    if args.use_liger_kernel and args.device.type == "cpu":
        warnings.warn(
            "`use_liger_kernel=True` on a CPU: Liger's Triton kernels need a GPU and are left out of the model; "
            "only its fused loss is used."
        )
        args.use_liger_kernel = False
