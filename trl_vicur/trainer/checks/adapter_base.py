"""
Checks that a model with a disabled adapter equals its base model, before and during training.

`disable_adapter()` removes the adapter from the forward pass. It does not undo changes that attaching the adapter made
to the base weights (PiSSA and similar methods move a part of them into the adapter), nor the training of base weights
together with the adapter (`bias`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from trl.trainer import distillation_trainer


# LoRA initializations that leave the base unchanged. This list is used only for adapters that the user attached; if
# TRL attaches the adapter, weights before and after are compared
KEEPING_THE_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")


@contextmanager
def refusing_adapters_that_rewrite_the_base() -> Iterator[None]:
    """
    While active, compare checksums of the base weights before and after TRL attaches an adapter.

    This matters with a separate teacher, too: a saved adapter that needs a rewritten base gives wrong results wherever
    it is added to the published base, e.g. in vLLM.

    Raises:
        `ValueError`: If attaching the adapter changed a base weight.
    """
    # TRL has no hook between loading the model and attaching the adapter, so replace the function that it calls
    attach = distillation_trainer.get_peft_model  # pyright: ignore[reportPrivateImportUsage]

    def attach_and_compare(model: PreTrainedModel, peft_config: PeftConfig, **kwargs: Any) -> PeftModel:
        before = {name: (parameter, _checksum(parameter)) for name, parameter in model.named_parameters()}
        peft_model = attach(model, peft_config, **kwargs)
        kept = set(peft_model.parameters())
        changed = [
            name
            for name, (parameter, checksum) in before.items()
            if parameter not in kept or _checksum(parameter) != checksum
        ]
        if changed:
            raise ValueError(
                f"Attaching the adapter rewrote {len(changed)} weight(s) of the base model, among them "
                f"'{changed[0]}'{_named_initialization(peft_config)}. The saved adapter would fit only this rewritten "
                "base, not the published model; and the model without its adapter, which is the teacher in "
                "self-distillation, would not be the published model either. Choose an initialization that leaves the "
                "base unchanged, e.g. `init_lora_weights=True`."
            )
        return peft_model

    distillation_trainer.get_peft_model = attach_and_compare  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        distillation_trainer.get_peft_model = attach  # pyright: ignore[reportPrivateImportUsage]


def check_attached_adapters(peft_configs: dict[str, PeftConfig]) -> None:
    """
    Check the configs of adapters that the user attached. Their original base weights are unknown.

    Args:
        peft_configs (`dict[str, PeftConfig]`):
            The adapters' configs by name.

    Raises:
        `ValueError`: If an adapter's initialization rewrites the base, or if the adapter trains a part of the base.
    """
    for name, config in peft_configs.items():
        if not isinstance(config, LoraConfig):
            continue
        keeps_base = config.init_lora_weights in KEEPING_THE_BASE and config.kasa_config is None
        if not keeps_base or config.bias != "none":
            what = f" (`bias={config.bias!r}`)" if keeps_base else _named_initialization(config)
            raise ValueError(
                f"The adapter '{name}' of the model changes weights of the base{what}, so the model without the "
                "adapter is not the base, which is the teacher here. Pass the base model and a `peft_config` without "
                "this option, or pass the base as `teacher_model`."
            )


def trainable_base_weights(model: PeftModel) -> list[str]:
    """Names of trainable weights outside of adapters. Disabling adapters does not restore their initial values."""
    in_adapters = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            for name in module.adapter_layer_names:
                part: nn.ParameterDict | nn.ModuleDict | None = attrgetter(name)(module)
                in_adapters.update(part.parameters() if isinstance(part, nn.Module) else ())
    return [name for name, p in model.named_parameters() if p.requires_grad and p not in in_adapters]


def _named_initialization(config: PeftConfig) -> str:
    """The option that sets an adapter's initialization, in parentheses, for error messages."""
    if not isinstance(config, LoraConfig):
        return f" ({PeftType(config.peft_type).value})"
    if config.kasa_config is not None:
        return f" (`kasa_config={config.kasa_config!r}`)"
    return f" (`init_lora_weights={config.init_lora_weights!r}`)"


def _checksum(parameter: nn.Parameter) -> int | None:
    """Sum of a tensor's bytes, read as integers. `None` for tensors on "meta" and for tensor subclasses."""
    if parameter.is_meta or is_traceable_wrapper_subclass(parameter):
        return None
    data = parameter.data.contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    # Sum 8 bytes at a time, which is 200 times as fast on a CPU as 2 bytes at a time
    whole = len(data) // 8 * 8
    return int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())
