from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .config import CueRecoveryConfig


class CueRecoveryContext:
    """
    Where the sink and the visual tokens stand in one forward call. It travels with the call as a keyword argument.

    Args:
        visual_mask (`torch.Tensor` of shape `(batch, seq)`):
            `True` at image and video tokens, but not at a sink.
        sink_positions (`dict[str, torch.Tensor]`):
            For each active adapter, the sink's index in the sequence, of shape `(batch,)`; `-1` where the sample has
            no visual token, or none but the sink, and is left untouched.
        missing_sinks (`dict[str, Callable]`, *optional*):
            For active adapters whose sink may be missing, what returns whether a sample has visual tokens and no sink,
            of shape `(batch,)`. It is called when the layers have run.

    Attributes:
        has_arrived (`bool`):
            Whether it has reached a decoder layer.
    """

    # Not a dataclass: under mixed precision FSDP2 rebuilds a forward's arguments by `torch.distributed.utils.
    # _apply_to_tensors`, which copies dataclasses; the layers would then note their arrival on a copy
    def __init__(
        self,
        visual_mask: torch.Tensor,
        sink_positions: dict[str, torch.Tensor],
        missing_sinks: dict[str, Callable[[], torch.Tensor]] | None = None,
    ):
        self.visual_mask = visual_mask
        self.sink_positions = sink_positions
        self.missing_sinks = missing_sinks or {}
        self.has_arrived = False


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
        self.k_proj = nn.Linear(hidden_size, width, bias=False)
        self.v_proj = nn.Linear(hidden_size, width, bias=False)
        self.o_proj = nn.Linear(width, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.kv_norm = nn.RMSNorm(hidden_size, eps=eps)
        nn.init.zeros_(self.o_proj.weight)

    def attention_weights(
        self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Attention of the sink to each position, `(batch, heads, seq)`, in float32 at least; zero where `visual_mask` is
        `False` (and uniform in a sample without any visual token). Arguments as in [`SinkCrossAttention.forward`].
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            folded_query = self._folded_query(sink).to(hidden_states.dtype)
            return _attend(folded_query, hidden_states, visual_mask, self.kv_norm.eps)[0]

    def forward(self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
        """
        The update z of the sink, in the folded form: O(seq · hidden · heads) instead of O(seq · hidden²).

        Args:
            sink (`torch.Tensor` of shape `(batch, hidden)`):
                Hidden states of the sink tokens.
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`):
                Hidden states of the whole sequences.
            visual_mask (`torch.Tensor` of shape `(batch, seq)`):
                `True` at the visual tokens.

        Returns:
            `torch.Tensor` of shape `(batch, hidden)`: The update, to be added to the sink.
        """
        # Autocast would copy all hidden states, and all weights, to use them once
        with torch.autocast(hidden_states.device.type, enabled=False):
            folded_query = self._folded_query(sink).to(hidden_states.dtype)
            averaged = _AverageVisualTokens.apply(folded_query, hidden_states, visual_mask, self.kv_norm.eps)
            # As for the keys: the norm's weight and W_V are applied once, to the averages
            averaged = averaged.to(self.v_proj.weight.dtype) * self.kv_norm.weight
            value_weight = self.v_proj.weight.unflatten(0, (self.num_heads, self.head_dim))
            return self.o_proj(_HeadwiseLinear.apply(averaged, value_weight).flatten(1))

    def _folded_query(self, sink: torch.Tensor) -> torch.Tensor:
        """
        What is multiplied with a hidden state to give its score, `(batch, heads, hidden)`.

        A key is `W_K (norm_weight · v / rms(v))`. There is one query, so W_K and the norm's weight fold into it (and
        the division by rms(v) into the score): the keys, `(batch, seq, hidden)`, never exist.
        """
        query = self.q_proj(self.q_norm(sink.to(self.q_proj.weight.dtype)))
        query = query.unflatten(-1, (self.num_heads, self.head_dim))
        key_weight = self.k_proj.weight.unflatten(0, (self.num_heads, self.head_dim))
        return torch.einsum("bhe,hed->bhd", query, key_weight) * (self.kv_norm.weight * self.head_dim**-0.5)

    def forward_plain(
        self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        The same update as Eq. 3-4 are written. The reference for [`SinkCrossAttention.forward`]; arguments as there.
        """
        heads = (self.num_heads, self.head_dim)
        query = self.q_proj(self.q_norm(sink)).unflatten(-1, heads)
        normed = self.kv_norm(hidden_states)
        keys = self.k_proj(normed).unflatten(-1, heads)
        values = self.v_proj(normed).unflatten(-1, heads)
        scores = torch.einsum("bhe,bmhe->bhm", query, keys) * self.head_dim**-0.5
        scores = scores.masked_fill(~visual_mask.unsqueeze(1), torch.finfo(scores.dtype).min)
        weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(dim=-1).to(values.dtype)
        return self.o_proj(torch.einsum("bhm,bmhe->bhe", weights, values).flatten(1))


def _attend(
    folded_query: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Attention weights `(batch, heads, seq)`, the products `(batch, heads, seq)` of query and hidden states, and the
    hidden states' inverse RMS `(batch, seq)`; weights and RMS in float32 at least.
    """
    # A norm with `dtype` accumulates in float32 without a float32 copy of the hidden states
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    norm = torch.linalg.vector_norm(hidden_states, dim=-1, dtype=dtype)
    inverse_rms = torch.rsqrt(norm.square() / hidden_states.shape[-1] + eps)
    products = torch.matmul(folded_query, hidden_states.mT)
    # The lowest finite value instead of -inf keeps samples without visual tokens free of NaN
    scores = (products * inverse_rms.unsqueeze(1)).masked_fill(~visual_mask.unsqueeze(1), torch.finfo(dtype).min)
    return scores.softmax(dim=-1), products, inverse_rms


class _AverageVisualTokens(torch.autograd.Function):
    """
    Averages of the normalized hidden states by attention, `(batch, heads, hidden)`: softmax((q·vᵢ) rᵢ) · (rᵢ vᵢ) with
    rᵢ = 1 / rms(vᵢ).

    The backward is written out because autograd would go over tensors of shape (batch, seq, hidden) nine times, where
    two do.
    """

    @staticmethod
    def forward(
        ctx, folded_query: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor, eps: float
    ) -> torch.Tensor:
        weights, products, inverse_rms = _attend(folded_query, hidden_states, visual_mask, eps)
        ctx.save_for_backward(folded_query, hidden_states, weights, products, inverse_rms)
        return torch.matmul((weights * inverse_rms.unsqueeze(1)).to(hidden_states.dtype), hidden_states)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        folded_query, hidden_states, weights, products, inverse_rms = ctx.saved_tensors
        rms_factor = inverse_rms.unsqueeze(1)
        grad_scaled_weights = torch.matmul(grad, hidden_states.mT)
        grad_weights = grad_scaled_weights * rms_factor
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True))
        grad_products = (grad_scores * rms_factor).to(hidden_states.dtype)
        grad_query = torch.matmul(grad_products, hidden_states)
        if not ctx.needs_input_grad[1]:
            return grad_query, None, None, None
        # The hidden states are read as keys, as values, and in their norm
        to_keys_and_values = torch.cat([grad_products, (weights * rms_factor).to(hidden_states.dtype)], dim=1)
        grad_hidden_states = torch.matmul(to_keys_and_values.mT, torch.cat([folded_query, grad], dim=1))
        grad_inverse_rms = (grad_scaled_weights * weights + grad_scores * products).sum(dim=1)
        to_norm = -grad_inverse_rms * inverse_rms**3 / hidden_states.shape[-1]
        to_norm = to_norm.unsqueeze(-1).to(hidden_states.dtype)
        return grad_query, torch.addcmul(grad_hidden_states, to_norm, hidden_states), None, None


class _HeadwiseLinear(torch.autograd.Function):
    """
    Each head's own projection: inputs `(batch, heads, hidden)`, weights `(heads, head_dim, hidden)`, outputs `(batch,
    heads, head_dim)`. Autograd would make the gradient of the weights transposed and copy all of it.
    """

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        return torch.einsum("bhd,hed->bhe", inputs, weight)

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
        samples = torch.arange(hidden_states.shape[0], device=hidden_states.device)
        updated = hidden_states
        kept = _KeptForBackward(hidden_states)
        for adapter_name, positions in context.sink_positions.items():
            if adapter_name not in self.sink_attention:
                continue
            positions = positions.to(hidden_states.device)
            found = positions >= 0
            positions = positions.clamp(min=0)
            sink = hidden_states[samples, positions]
            with kept.hooks():
                update = self.sink_attention[adapter_name](
                    sink, hidden_states, context.visual_mask.to(hidden_states.device)
                )
            before = updated[samples, positions]
            after = torch.where(found.unsqueeze(-1), before + update.to(before.dtype), before)
            updated = updated.index_put((samples, positions), after)
        kept.replace_by(updated)
        return updated

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
        return weight.device, weight.dtype


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
