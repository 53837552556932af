"""
Mixed precision: models compute in bfloat16 or float16, and what is computed from their hidden states in float32.

Accelerate's own autocast is not enough. It is in the student's `forward`, which `_ForwardRedirection` replaces and
which `generate` of a PEFT model does not call; and there is none for DeepSpeed.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from trl.models.utils import _ForwardRedirection


def compute_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """
    What models compute in under `bf16=True` or `fp16=True`.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.

    Returns:
        `torch.dtype` or `None`: `None` without mixed precision: the dtype of their weights.
    """
    if accelerator.mixed_precision == "no":
        return None
    return torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16


def autocast(accelerator: Accelerator) -> AbstractContextManager:
    """
    Mixed precision for one pass of a model, or for one rollout.

    Each pass enters it anew: leaving it frees autocast's copies of the weights, which another teacher's weights, or a
    pass with gradients after one without, must not find.
    """
    dtype = compute_dtype(accelerator)
    return nullcontext() if dtype is None else torch.autocast(accelerator.device.type, dtype)


class ForwardRedirection(_ForwardRedirection):
    """
    TRL's redirection of a method through a wrapped model's forward, for what must not be rounded on its way.

    Hooks around a forward change its arguments: FSDP2 casts float tensors to `param_dtype`, be they log-probabilities
    or token counts, and gives the method a copy of each dict, as DDP does on a GPU. So only the model goes through.
    And the method runs without autocast, which DeepSpeed can have around its engine's forward; passes of models enter
    it themselves.

    Args:
        device_type (`str`):
            Type of the device that the models are on, such as `"cuda"`.
    """

    def __init__(self, device_type: str):
        self.device_type = device_type

    def __call__(
        self,
        wrapper_module: nn.Module,
        original_module: nn.Module,
        method: Callable[..., Any],
        model: nn.Module,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        def call(model: nn.Module) -> Any:
            with torch.autocast(self.device_type, enabled=False):
                return method(model, *args, **kwargs)

        return super().__call__(wrapper_module, original_module, call, model)
