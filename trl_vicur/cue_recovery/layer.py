from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.utils.generic import maybe_autocast

from .config import CueRecoveryConfig


class CueRecoveryContext:
    """
    Where the sink and the visual tokens stand in one forward call. It travels with the call as a keyword argument.

    Args:
        visual_mask (`torch.Tensor` of shape `(batch, seq)`):
            `True` at image and video tokens, but not at a sink.
        sink_positions (`dict[str, torch.Tensor]`):
            For each active adapter, the sink's index in the sequence, of shape `(batch,)`; `-1` where the sample has
            no sink.
        missing_sinks (`dict[str, Callable]`, *optional*):
            For each active adapter whose sink may be missing, a function that returns which samples have visual tokens
            but no sink, of shape `(batch,)`. It is called after the layers have run.
        always_found (`Collection[str]`, *optional*, defaults to `()`):
            Adapters whose sink is in every sample, so that the layers need not check for `-1`.

    Attributes:
        has_arrived (`bool`):
            Whether it has reached a decoder layer.
    """

    # Not a dataclass: under mixed precision FSDP2 rebuilds a forward's arguments with `torch.distributed.utils.
    # _apply_to_tensors`, which copies dataclasses, so the layers would set `has_arrived` on a copy
    def __init__(
        self,
        visual_mask: torch.Tensor,
        sink_positions: dict[str, torch.Tensor],
        missing_sinks: dict[str, Callable[[], torch.Tensor]] | None = None,
        always_found: Collection[str] = (),
    ):
        self.visual_mask = visual_mask
        self.missing_sinks = missing_sinks or {}
        self.has_arrived = False
        self._found_positions = sink_positions
        self._always_found = always_found
        self._inputs: dict[tuple[torch.device, torch.dtype], LayerInputs] = {}

    @property
    def sink_positions(self) -> dict[str, torch.Tensor]:
        """
        For each active adapter, the sink's index in the sequence, of shape `(batch,)`; `-1` where the sample has no
        sink or no visual token and is left untouched.
        """
        has_evidence = self.visual_mask.any(dim=1)
        return {name: torch.where(has_evidence, each, -1) for name, each in self._found_positions.items()}

    def layer_inputs(self, hidden_states: torch.Tensor) -> "LayerInputs":
        """The layers' inputs on the device and in the dtype of `hidden_states`, computed once for each such pair."""
        device, dtype = hidden_states.device, hidden_states.dtype
        if (device, dtype) not in self._inputs:
            mask = additive_mask(self.visual_mask, hidden_states)
            lacks_evidence = mask.all(dim=1)
            sinks = {}
            for name, positions in self._found_positions.items():
                positions, is_untouched = positions.to(device), lacks_evidence
                if name not in self._always_found:
                    positions, is_untouched = positions.clamp(min=0), lacks_evidence | (positions < 0)
                sinks[name] = positions[:, None, None], is_untouched[:, None]
            self._inputs[device, dtype] = LayerInputs(mask, sinks)
        return self._inputs[device, dtype]


class LayerInputs(NamedTuple):
    """
    A [`CueRecoveryContext`], converted for the layers.

    Args:
        mask (`torch.Tensor` of shape `(batch, seq)`):
            Added to the scores, see [`additive_mask`].
        sinks (`dict[str, tuple[torch.Tensor, torch.Tensor]]`):
            For each active adapter, the sink's index in each sample (0 if it has none), of shape `(batch, 1, 1)`, and
            whether the sample is left untouched, of shape `(batch, 1)`.
    """

    mask: torch.Tensor
    sinks: dict[str, tuple[torch.Tensor, torch.Tensor]]


class SinkCrossAttention(nn.Module):
    r"""
    Multi-head cross-attention from the sink token to the visual tokens (ViCuR, Eq. 3-4):

        q = norm_q(h) W_Q    K = norm_kv(V) W_K    U = norm_kv(V) W_V    z = MultiHeadAttention(q, K, U) W_O

    W_O starts at zero, so a new module changes nothing.

    Args:
        hidden_size (`int`):
            Width d of the text model.
        num_heads (`int`):
            Number of heads; must divide the width of queries, keys and values.
        eps (`float`):
            Epsilon of the two RMSNorms.
        bottleneck_size (`int`, *optional*):
            Width of queries, keys and values, over all heads. Defaults to `hidden_size`, as in the paper.

    Raises:
        `ValueError`: If `num_heads` does not divide that width.
    """

    def __init__(self, hidden_size: int, num_heads: int, eps: float, bottleneck_size: int | None = None):
        super().__init__()
        width = bottleneck_size or hidden_size
        if width % num_heads != 0:
            name = "`bottleneck_size`" if bottleneck_size else "the hidden size"
            raise ValueError(f"`num_heads` must divide {name}, got {num_heads} heads for {width}.")
        self.num_heads = num_heads
        self.head_dim = width // num_heads
        self.q_proj = nn.Linear(hidden_size, width, bias=False)
        self.k_proj = FoldedKeys(hidden_size, width, bias=False)
        self.v_proj = HeadwiseValues(hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.kv_norm = NormedAverage(hidden_size, eps=eps)
        nn.init.zeros_(self.o_proj.weight)

    def attention_weights(
        self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Attention of the sink to each position, `(batch, heads, seq)`, in float32 at least; zero where `visual_mask` is
        `False` (and uniform in a sample without any visual token). Arguments as in [`SinkCrossAttention.forward`].
        """
        return self._attend(sink, hidden_states, visual_mask, weights_only=True)

    def forward(self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
        """
        The update z of the sink, in the folded form: O(seq · hidden · heads) instead of O(seq · hidden²).

        Each weight is read only in the forward of the submodule that owns it: with offloading, accelerate's hooks
        load a weight just for that call.

        Args:
            sink (`torch.Tensor` of shape `(batch, hidden)`):
                Hidden states of the sink tokens.
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`):
                Hidden states of the whole sequences.
            visual_mask (`torch.Tensor` of shape `(batch, seq)`):
                `True` at the visual tokens; or an additive mask in the dtype of `hidden_states`.

        Returns:
            `torch.Tensor` of shape `(batch, hidden)`: The update, to be added to the sink.
        """
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return self.o_proj(self.v_proj(self._attend(sink, hidden_states, visual_mask)).flatten(1))

    def _attend(
        self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor, weights_only: bool = False
    ) -> torch.Tensor:
        # Autocast would copy all hidden states, and all weights, to use them once
        with maybe_autocast(hidden_states.device.type, enabled=False):
            query = self.q_proj(self.q_norm(sink.to(self.q_norm.weight.dtype)))
            folded_query = self.k_proj(query.unflatten(-1, (self.num_heads, self.head_dim)))
            mask = additive_mask(visual_mask, hidden_states)
            return self.kv_norm(folded_query, hidden_states, mask, self.head_dim**-0.5, weights_only)

    def forward_plain(
        self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        The same update as Eq. 3-4 are written. The reference for [`SinkCrossAttention.forward`]; arguments as there.
        """
        heads = (self.num_heads, self.head_dim)
        query = self.q_proj(self.q_norm(sink)).unflatten(-1, heads)
        normed = F.rms_norm(hidden_states, self.kv_norm.normalized_shape, self.kv_norm.weight, self.kv_norm.eps)
        keys = F.linear(normed, self.k_proj.weight).unflatten(-1, heads)
        values = F.linear(normed, self.v_proj.weight).unflatten(-1, heads)
        scores = torch.einsum("bhe,bmhe->bhm", query, keys) * self.head_dim**-0.5
        scores = scores.masked_fill(~visual_mask.unsqueeze(1), torch.finfo(scores.dtype).min)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(values.dtype)
        return self.o_proj(torch.einsum("bhm,bmhe->bhe", weights, values).flatten(1))


class FoldedKeys(nn.Linear):
    """
    W_K, applied to the query instead of the tokens. There is one query, so the keys, `(batch, seq, hidden)`, are
    never materialized.
    """

    def forward(self, query: torch.Tensor) -> torch.Tensor:
        """Map queries `(batch, heads, head_dim)` to `(batch, heads, hidden)`."""
        return torch.einsum("bhe,hed->bhd", query, self.weight.unflatten(0, query.shape[1:]))


class HeadwiseValues(nn.Linear):
    """W_V, applied to each head's average of the tokens instead of the tokens."""

    def forward(self, averaged: torch.Tensor) -> torch.Tensor:
        """Map averages `(batch, heads, hidden)` to `(batch, heads, head_dim)`."""
        return _HeadwiseLinear.apply(averaged.to(self.weight.dtype), self.weight.unflatten(0, (averaged.shape[1], -1)))


class NormedAverage(nn.RMSNorm):
    """norm_kv, followed by each head's attention-weighted average of the normalized hidden states."""

    def forward(
        self,
        folded_query: torch.Tensor,
        hidden_states: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
        weights_only: bool = False,
    ) -> torch.Tensor:
        """
        Average the normalized hidden states, weighted by attention.

        Args:
            folded_query (`torch.Tensor` of shape `(batch, heads, hidden)`):
                Queries with W_K folded into them.
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`):
                Hidden states of the whole sequences.
            mask (`torch.Tensor` of shape `(batch, seq)`):
                Added to the scores.
            scale (`float`):
                Factor on the scores.
            weights_only (`bool`, *optional*, defaults to `False`):
                Whether to return the attention weights instead of the averages.

        Returns:
            `torch.Tensor` of shape `(batch, heads, hidden)`: The averages; or the attention weights, of shape
            `(batch, heads, seq)`, in at least float32.
        """
        weight = self.weight
        if weight.dtype != hidden_states.dtype:
            # A float32 adapter on a bfloat16 backbone: rounding the norm's weight would lose most of what it learned,
            # so fold it into the query and the averages instead
            folded_query, weight = (folded_query * weight).to(hidden_states.dtype), None
        args = (folded_query, hidden_states, weight, mask, scale, self.eps)
        if weights_only:
            return _attend(*args, dtype=_float32_at_least(hidden_states))[0]
        # A compiler decides by itself what it keeps
        averaged = _average(*args) if torch.compiler.is_compiling() else _RecomputedAverage.apply(*args)
        return averaged if weight is not None else averaged * self.weight


def additive_mask(visual_mask: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """0 at visual tokens, elsewhere so low that the weight is exactly zero if the sample has visual tokens."""
    if visual_mask.is_floating_point():
        return visual_mask
    # Half the minimum, since a score is added: with -inf, samples without visual tokens would become NaN
    low = torch.finfo(hidden_states.dtype).min / 2
    return hidden_states.new_full(visual_mask.shape, low).masked_fill_(visual_mask.to(hidden_states.device), 0.0)


def _attend(
    folded_query: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor | None,
    mask: torch.Tensor,
    scale: float,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Attention weights `(batch, heads, seq)` in `dtype`, and the normalized hidden states. States are normalized before
    the product with the query, so that outliers overflow float16 no earlier than in Eq. 3-4 as written.
    """
    normed = F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, eps)
    scores = torch.baddbmm(mask.unsqueeze(1), folded_query, normed.mT, alpha=scale)
    return scores.softmax(dim=-1, dtype=dtype), normed


def _average(folded_query: torch.Tensor, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
    """Attention-weighted averages of the normalized states, `(batch, heads, hidden)`. Arguments as [`_attend`]."""
    weights, normed = _attend(folded_query, hidden_states, *args, dtype=_float32_at_least(hidden_states))
    return torch.bmm(weights.to(normed.dtype), normed)


def _float32_at_least(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _RecomputedAverage(torch.autograd.Function):
    """
    [`_average`] that saves only its inputs for backward: autograd would also save the normalized hidden states,
    `(batch, seq, hidden)`, which one kernel recomputes.
    """

    @staticmethod
    def forward(
        ctx,
        folded_query: torch.Tensor,
        hidden_states: torch.Tensor,
        weight: torch.Tensor | None,
        mask: torch.Tensor,
        scale: float,
        eps: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(folded_query, hidden_states, weight, mask)
        ctx.scale, ctx.eps = scale, eps
        # No `dtype`: in low precision softmax computes in float32 anyway and rounds its result, which saves a kernel
        weights, normed = _attend(folded_query, hidden_states, weight, mask, scale, eps)
        return torch.bmm(weights, normed)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [
                tensor if tensor is None else tensor.detach().requires_grad_(needs_grad)
                for tensor, needs_grad in zip(inputs, ctx.needs_input_grad, strict=False)
            ]
            folded_query, hidden_states, weight = inputs
            # Scale the query: a scale on the product would be applied to the gradient of all hidden states
            scaled_query, dtype = folded_query * ctx.scale, _float32_at_least(hidden_states)
            weights, normed = _attend(scaled_query, hidden_states, weight, mask, 1.0, ctx.eps, dtype)
            weights = weights.to(normed.dtype)
        wanted = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        grads = iter(
            torch.autograd.grad(
                (weights, normed),
                wanted,
                (torch.bmm(grad, normed.detach().mT), torch.bmm(weights.detach().mT, grad)),
            )
        )
        return *(next(grads) if needs_grad else None for needs_grad in ctx.needs_input_grad[:3]), None, None, None


class _HeadwiseLinear(torch.autograd.Function):
    """
    Each head's own projection: inputs `(batch, heads, hidden)`, weights `(heads, head_dim, hidden)`, outputs `(batch,
    heads, head_dim)`. Autograd would make the gradient of the weights transposed and copy all of it.
    """

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        # In the memory layout that W_O reads without the copy that an `einsum` would need
        outputs = inputs.new_empty(*inputs.shape[:2], weight.shape[1])
        torch.bmm(inputs.transpose(0, 1), weight.mT, out=outputs.transpose(0, 1))
        return outputs

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs, weight = ctx.saved_tensors
        grad_weight = torch.einsum("bhe,bhd->hed", grad, inputs) if ctx.needs_input_grad[1] else None
        return torch.einsum("bhe,hed->bhd", grad, weight), grad_weight


class _KeptForBackward:
    """
    Lets the backward of a recovery layer read the layer's output where autograd would keep its input.

    The two differ in the sinks only, and the sinks are no visual tokens: their attention weight is exactly zero, so
    nothing of theirs reaches a gradient through the hidden states. The decoder layer keeps the output anyway, so the
    module holds no hidden states, `(batch, seq, hidden)`, of its own.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`):
            Input of the recovery layer.
    """

    def __init__(self, hidden_states: torch.Tensor):
        # A compiler decides by itself what it keeps
        self.is_active = (
            torch.is_grad_enabled() and hidden_states.is_contiguous() and not torch.compiler.is_compiling()
        )
        if self.is_active:
            # Not the tensor itself, which the hooks would keep alive
            self.address = hidden_states.untyped_storage().data_ptr()
            self.offset = hidden_states.storage_offset()
        self.output: torch.Tensor | None = None
        self.version = 0

    def hooks(self) -> AbstractContextManager:
        """While active, autograd keeps a note in place of each view of the input."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack) if self.is_active else nullcontext()

    def replace_by(self, output: torch.Tensor) -> None:
        """Tell what backward is to read."""
        if self.is_active:
            self.output, self.version = output.detach(), output._version

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | tuple:
        if tensor.untyped_storage().data_ptr() != self.address:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset() - self.offset

    def _unpack(self, packed: torch.Tensor | tuple) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        if self.output._version != self.version:
            raise RuntimeError(
                "The input of a decoder layer with cue recovery was changed in place after the forward pass; its "
                "gradient cannot be computed."
            )
        return self.output.as_strided(*packed)


class CueRecoveryLayer(nn.Module, BaseTunerLayer):
    """
    The tuner layer of one decoder layer: a [`SinkCrossAttention`] per adapter, applied to the decoder layer's input.

    It is attached to the decoder layer as a child named `cue_recovery` and runs in a pre-forward hook. The input of
    layer l+1 is the output of layer l after DeepStack. Unlike a wrapper, a child leaves the names of all other
    parameters as they are and shares the decoder layer's FSDP shard and device.

    Args:
        decoder_layer (`nn.Module`):
            The decoder layer whose input is updated.
    """

    adapter_layer_names = ("sink_attention",)

    def __init__(self, decoder_layer: nn.Module):
        super().__init__()
        self.sink_attention = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        # In a tuple, so that the parent is not registered as a child of its child
        self._decoder_layer = (decoder_layer,)
        self._hook = decoder_layer.register_forward_pre_hook(update_sink_before_layer, with_kwargs=True)

    def update_layer(
        self, adapter_name: str, config: CueRecoveryConfig, hidden_size: int, num_heads: int, eps: float
    ) -> None:
        """Add the attention of one more adapter."""
        self.sink_attention[adapter_name] = SinkCrossAttention(hidden_size, num_heads, eps, config.bottleneck_size)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: torch.Tensor, context: CueRecoveryContext) -> torch.Tensor:
        """
        Add the update of every active adapter to the sink tokens (ViCuR, Eq. 5).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`):
                Input of the decoder layer.
            context ([`CueRecoveryContext`]):
                Where the sink and the visual tokens stand.

        Returns:
            `torch.Tensor` of shape `(batch, seq, hidden)`: The hidden states, changed at the sinks only.

        Raises:
            `ValueError`: If the decoder layer's input is not laid out like `input_ids` (Gemma 3n has four streams).
        """
        if hidden_states.shape[:-1] != context.visual_mask.shape:
            raise ValueError(
                f"The input of a decoder layer with cue recovery has the shape {tuple(hidden_states.shape)}, but "
                f"`input_ids` has {tuple(context.visual_mask.shape)}. Cue recovery needs one hidden state per token; "
                "this model family is not supported."
            )
        hidden_states = hidden_states.to(self.execution_device(hidden_states))
        updated = hidden_states
        kept = _KeptForBackward(hidden_states)
        mask, sinks = context.layer_inputs(hidden_states)
        for adapter_name, (positions, is_untouched) in sinks.items():
            if adapter_name not in self.sink_attention:
                continue
            positions = positions.expand(-1, 1, hidden_states.shape[-1])
            with kept.hooks():
                sink = hidden_states.gather(1, positions).squeeze(1)
                update = self.sink_attention[adapter_name](sink, hidden_states, mask)
            update = update.to(hidden_states).masked_fill(is_untouched, 0.0)
            updated = updated.scatter_add(1, positions, update.unsqueeze(1))
        kept.replace_by(updated)
        return updated

    def execution_device(self, hidden_states: torch.Tensor) -> torch.device:
        """
        The device of the weights; for offloaded weights that of `hidden_states`. Under `device_map` this layer runs
        before accelerate moves the decoder layer's inputs there.
        """
        weight = next(self.sink_attention.parameters())
        # accelerate keeps offloaded weights on "meta", and its hooks on the submodules move weights and inputs
        is_offloaded = weight.is_meta and any(hasattr(module, "_hf_hook") for module in self.sink_attention.modules())
        return hidden_states.device if is_offloaded else weight.device

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: attention over the image cannot be merged into weights, so it stays active beside them."""

    def unmerge(self) -> None:
        """Does nothing, see [`CueRecoveryLayer.merge`]."""

    def detach(self) -> None:
        """Remove this layer from its decoder layer."""
        self._hook.remove()
        del self._decoder_layer[0].cue_recovery

    def get_base_layer(self) -> nn.Module:
        return self._decoder_layer[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT asks a weight named `weight`; a decoder layer has many, and quantized ones are not floating point
        own = {id(parameter) for parameter in self.parameters()}
        weight = next(p for p in base_layer.parameters() if p.is_floating_point() and id(p) not in own)
        # Offloaded weights are on "meta" between calls; accelerate's hooks know the device they run on
        hooks = (getattr(module, "_hf_hook", None) for module in base_layer.modules() if weight.is_meta)
        device = next((hook.execution_device for hook in hooks if isinstance(hook, AlignDevicesHook)), None)
        return weight.device if device is None else torch.device(device), weight.dtype


def update_sink_before_layer(decoder_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Pre-forward hook of a decoder layer that has a [`CueRecoveryLayer`]."""
    kwargs = dict(kwargs)
    context = kwargs.pop("cue_recovery_context", None)
    if context is not None:
        context.has_arrived = True
        if args:
            args = (decoder_layer.cue_recovery(args[0], context), *args[1:])
        else:
            kwargs["hidden_states"] = decoder_layer.cue_recovery(kwargs["hidden_states"], context)
    return args, kwargs
