"""
Mixed precision: models compute in bfloat16 or float16; log-probabilities and losses are computed in float32.

Accelerate's own autocast is not enough. It wraps the student's `forward`, but TRL's `_ForwardRedirection` replaces
that (TRL#6988 is the same bug in DPO), and `generate` of a PEFT model does not call it. Under DeepSpeed, accelerate
does not use autocast at all.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from trl.models.utils import _ForwardRedirection


def compute_dtype(accelerator: Accelerator) -> torch.dtype | None:
    """
    The dtype that models compute in under `bf16=True` or `fp16=True`.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.

    Returns:
        `torch.dtype` or `None`: `None` without mixed precision, where models compute in the dtype of their weights.
    """
    if accelerator.mixed_precision == "no":
        return None
    return torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16


@contextmanager
def autocast(accelerator: Accelerator) -> Iterator[None]:
    """
    Mixed precision for one pass of a model or one rollout.

    Enter it separately for each pass. Autocast caches the weights that it casts, by parameter. The cache is stale
    after other weights were swapped in (`teacher_model_kind="ema"`), and for a pass with gradients after one without.
    PyTorch clears it only when the outermost context ends, even if that has `enabled=False` (PyTorch#65766,
    PyTorch#112583), so clear it here.
    """
    dtype = compute_dtype(accelerator)
    if dtype is None:
        yield
        return
    with torch.autocast(accelerator.device.type, dtype):
        try:
            yield
        finally:
            torch.clear_autocast_cache()


class ForwardRedirection(_ForwardRedirection):
    """
    TRL's redirection of a method through a wrapped model's forward, without rounding the method's arguments.

    Hooks around a forward change its arguments: FSDP2 casts float tensors to `param_dtype`, even log-probabilities and
    token counts, and passes the method a copy of each dict, as DDP does on a GPU. So only the model is passed through
    the forward. The method runs without autocast, which DeepSpeed may enable around its engine's forward; each pass of
    a model enters autocast itself.

    Args:
        device_type (`str`):
            Device type of the models, such as `"cuda"`.
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
