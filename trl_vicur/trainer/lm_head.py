"""Reads a model's language-model head for the losses: weight, bias, logit scale and soft-cap."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from transformers import PreTrainedModel
from trl.kernels.chunked_divergence import _project
from trl.kernels.chunked_logprob import _addmm_fp32


# Number of head weights that are cast to another dtype at a time. On a CPU this is 4 MiB in float32, which stays in
# the cache until the product
CPU_WEIGHT_BLOCK = 2**20
WEIGHT_BLOCK = 2**24

# Logit scale and soft-cap of each model that has been probed
_transforms: WeakKeyDictionary[nn.Module, tuple[float, float | None]] = WeakKeyDictionary()


class LMHead(NamedTuple):
    """
    A language-model head: its weights, and how the model scales and caps their product with the hidden states.

    Args:
        weight (`torch.Tensor` of shape `(vocab, hidden)`):
            Weight of the output projection.
        bias (`torch.Tensor` of shape `(vocab,)`, *optional*):
            Its bias.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the logits (Cohere, Granite, …).
        softcapping (`float`, *optional*):
            If set, logits become `softcapping · tanh(logits / softcapping)` (Gemma).
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcapping: float | None = None

    @classmethod
    def from_model(cls, model: PreTrainedModel | PeftModel) -> "LMHead":
        """
        Read the head of a transformers model, or of a PEFT model around one.

        Raises:
            `ValueError`: If the losses cannot compute the logits of `model(...)` from its hidden states and this head.
        """
        base, head = _find_head(model)
        assert isinstance(head.weight, torch.Tensor)
        if head.weight.is_meta:
            raise ValueError(
                f"The language-model head of {type(base).__name__} is offloaded: its weight is on the device 'meta', "
                "where the losses cannot read it. Place the head on a GPU or the CPU in `device_map`."
            )
        if base not in _transforms:
            _transforms[base] = _read_transform(base, head)
        if isinstance(head, FSDPModule):
            # FSDP2 gathers a separately sharded head for the head's own forward only. Backward reduces and frees it
            head.unshard()
        # PEFT's wrapper for `trainable_token_indices` neither has nor adds a bias while its adapter is active
        bias = getattr(head, "bias", None)
        assert isinstance(bias, torch.Tensor | None)
        return cls(head.weight, bias, *_transforms[base])

    def detach(self) -> "LMHead":
        """A copy without gradient. It keeps these weights when others are swapped into the model."""
        return self._replace(weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    @property
    def trains(self) -> bool:
        """Whether the head gets gradients, in the current grad mode."""
        return torch.is_grad_enabled() and any(
            parameter is not None and parameter.requires_grad for parameter in (self.weight, self.bias)
        )

    def logits(self, hidden_states: torch.Tensor, temperature: float) -> torch.Tensor:
        """Logits `(tokens, vocab)` of a chunk of tokens, in at least float32."""
        is_exact = hidden_states.dtype == self.weight.dtype in (torch.float32, torch.float64)
        product = F.linear if is_exact else _Float32Linear.apply
        logits = self.transform(product(hidden_states, self.weight, self.bias))
        return logits if temperature == 1.0 else logits / temperature

    def transform(self, product: torch.Tensor) -> torch.Tensor:
        """Turn the product of states and weights into the model's logits."""
        # Skip the no-ops: each would copy the logits
        if self.logit_scale != 1.0:
            product = product * self.logit_scale
        if self.softcapping is not None:
            product = self.softcapping * torch.tanh(product / self.softcapping)
        return product


def check_head(model: PreTrainedModel | PeftModel) -> None:
    """
    Check that the losses can compute a model's logits. Reads no weights, so the model may be on the device "meta".

    Raises:
        `ValueError`: If they cannot.
    """
    _read_transform(*_find_head(model))


def _find_head(
    model: PreTrainedModel | PeftModel,
) -> tuple[PreTrainedModel, nn.Linear | AuxiliaryTrainingWrapper]:
    """
    The transformers model and its head, or PEFT's wrapper of the head, whose `weight` is the trained one.

    Raises:
        `ValueError`: Unless the head is a plain product.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    head = base.get_output_embeddings()
    is_other_product = isinstance(head, nn.Linear) and type(head).forward is not nn.Linear.forward
    if is_other_product or not isinstance(head, nn.Linear | AuxiliaryTrainingWrapper):
        raise ValueError(
            f"The language-model head of {type(base).__name__} is a {type(head).__module__}.{type(head).__name__}, "
            "but the losses multiply with the weight of an `nn.Linear` and would omit anything else it computes. "
            "Leave the head out of the adapter's `target_modules` (`modules_to_save` can train it as a whole) and do "
            "not quantize it."
        )
    return base, head


class _BackboneOutput(tuple):
    """Output of a backbone with hidden states only; all other fields are `None`."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


@contextmanager
def _calls_replaced(replacements: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """While active, calling these modules runs the given functions instead, without hooks and without weights."""
    with ExitStack() as stack:
        for module, function in replacements.items():
            # `nn.Module.compile` sets this attribute too. If it is set, `nn.Module.__call__` runs nothing else
            stack.callback(setattr, module, "_compiled_call_impl", module._compiled_call_impl)
            module._compiled_call_impl = function
        yield


@torch.no_grad()
def _read_transform(model: PreTrainedModel, head: nn.Linear | AuxiliaryTrainingWrapper) -> tuple[float, float | None]:
    """
    Probe a model for its logit scale and soft-cap.

    The text config is no guide: LLaVA-NeXT does not scale logits with a Granite decoder, nor Aya Vision with Cohere2.
    So run the model's own forward with a backbone that returns known states and a head that returns known products.
    This reads no weights, so it works for sharded, offloaded and quantized models.

    Raises:
        `ValueError`: If the model does anything else to the product, or if the head's input is not the backbone's
            output.
    """
    tiny, huge = 2.0**-20, 1e30
    products = torch.tensor([tiny, huge, *torch.linspace(-60, 60, 14)]).view(1, 4, 4)
    states = torch.linspace(-2, 2, 4 * 8).view(1, 4, 8)
    seen = []

    def head_call(hidden_states: torch.Tensor) -> torch.Tensor:
        seen.append(hidden_states)
        return products.clone()

    input_ids = torch.ones(1, 4, dtype=torch.long)
    replacements = {model.base_model: lambda *args, **kwargs: _BackboneOutput([states.clone()]), head: head_call}
    refusal = (
        f"The losses cannot compute the logits of {type(model).__name__} from its hidden states and its head, so the "
        "student would learn a different distribution than it samples from: "
    )
    try:
        with _calls_replaced(replacements):
            output = type(model).forward(model, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        logits = output.logits
    except Exception as error:
        raise ValueError(f"{refusal}its forward fails with {type(error).__name__}: {error}") from error
    if len(seen) != 1 or not torch.equal(seen[0].float().cpu(), states):
        raise ValueError(f"{refusal}its head is not called once with the output of `{model.base_model_prefix}`.")
    scale, limit = (logits.flatten()[:2].double() / torch.tensor([tiny, 1.0])).tolist()
    softcapping = None if abs(limit) > abs(scale) * huge / 2 else limit
    expected = LMHead(products, None, scale, softcapping).transform(products)  # the weight does not matter
    if scale == 0 or not torch.allclose(logits.float().cpu(), expected, rtol=1e-5, atol=1e-9):
        raise ValueError(f"{refusal}it does more to their product than scale or soft-cap it.")
    return scale, softcapping


class _Float32Linear(torch.autograd.Function):
    """`F.linear` with operands in the states' dtype and a float32 result, one block of the weight at a time."""

    @staticmethod
    def forward(ctx, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(states, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        shape = (*states.shape[:-1], len(weight))
        states = states.flatten(0, -2)
        output = states.new_empty(len(states), len(weight), dtype=torch.float32)
        for start, end in _weight_blocks(weight):
            _project(output[:, start:end], states, weight, bias, start, end, states.dtype)
        return output.view(shape)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight = ctx.saved_tensors
        shape = states.shape
        states, gradient = states.flatten(0, -2), grad_outputs[0].flatten(0, -2)
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad
        grad_states = torch.zeros_like(states, dtype=torch.float32) if needs_states else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        for start, end in _weight_blocks(weight):
            add_products(gradient[:, start:end], states, weight[start:end], grad_states, grad_weight, start)
        return (
            None if grad_states is None else grad_states.view(shape).to(states.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            gradient.sum(dim=0).to(ctx.bias_dtype) if needs_bias else None,
        )


def _weight_blocks(weight: torch.Tensor) -> Iterator[tuple[int, int]]:
    """First row of each block of a head's weight `(vocab, hidden)`, and the row after its last."""
    numel = CPU_WEIGHT_BLOCK if weight.device.type == "cpu" else WEIGHT_BLOCK
    size = max(1, numel // weight.shape[1])
    for start in range(0, len(weight), size):
        yield start, min(start + size, len(weight))


def add_products(
    gradient: torch.Tensor,
    states: torch.Tensor,
    weight: torch.Tensor,
    grad_states: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    start: int,
) -> None:
    """
    Add a tile of the logits' gradient to the float32 gradients of the hidden states and the head.

    Args:
        gradient (`torch.Tensor` of shape `(tokens, columns)`):
            Gradient of the logits in the tile, in float32.
        states (`torch.Tensor` of shape `(tokens, hidden)`):
            Hidden states.
        weight (`torch.Tensor` of shape `(columns, hidden)`):
            The tile's rows of the head's weight.
        grad_states (`torch.Tensor` of shape `(tokens, hidden)`, *optional*):
            Gradient of the states.
        grad_weight (`torch.Tensor` of shape `(vocab, hidden)`, *optional*):
            Gradient of the whole weight.
        start (`int`):
            The tile's first column.
    """
    if gradient.is_cuda:
        gradient = gradient.to(states.dtype)  # GPUs accumulate half-precision products in float32
    if grad_states is not None:
        _addmm_fp32(grad_states, gradient, weight.to(states.dtype))
    if grad_weight is not None:
        _addmm_fp32(grad_weight[start : start + len(weight)], gradient.t(), states)
