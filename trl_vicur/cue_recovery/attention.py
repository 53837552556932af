"""
Cross-attention from the sink to the visual tokens (ViCuR, Eq. 3-4): the plain form as in the paper, the folded form
that the model runs, and its backward pass.

The times and sizes below are for one module at Qwen3-VL-2B's widths in float32 and one sample of 1,782 visual and 64
text tokens, on one CPU thread (benchmarks/README.md has more). Tests are in
tests/cue_recovery/test_sink_cross_attention.py.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils.generic import maybe_autocast


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
        `ValueError`: If `num_heads` does not divide the width.
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

    def forward_plain(
        self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Compute the sink's update z exactly as in Eq. 3-4: the reference for [`SinkCrossAttention.forward`].

        Args:
            sink (`torch.Tensor` of shape `(batch, hidden)`):
                Hidden states h of the sink tokens.
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`):
                Hidden states V of the whole sequences.
            visual_mask (`torch.Tensor` of shape `(batch, seq)`):
                `True` at the visual tokens.

        Returns:
            `torch.Tensor` of shape `(batch, hidden)`: The update, to be added to the sink (Eq. 5).
        """
        heads = (self.num_heads, self.head_dim)
        query = self.q_proj(self.q_norm(sink)).unflatten(-1, heads)
        normed = F.rms_norm(hidden_states, self.kv_norm.weight.shape, self.kv_norm.weight, self.kv_norm.eps)
        keys = F.linear(normed, self.k_proj.weight).unflatten(-1, heads)
        values = F.linear(normed, self.v_proj.weight).unflatten(-1, heads)
        scores = torch.einsum("bhe,bmhe->bhm", query, keys) * self.head_dim**-0.5
        scores = scores.masked_fill(~visual_mask.unsqueeze(1), torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=_float32_at_least(scores)).to(values.dtype)
        return self.o_proj(torch.einsum("bhm,bmhe->bhe", weights, values).flatten(1))

    def forward(self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor) -> torch.Tensor:
        """
        Compute the same update in the folded form, in O(seq · hidden · heads) instead of O(seq · hidden²): 16 ms
        instead of 241 ms, 50 ms instead of 674 ms with the backward pass, and 0.3 MB instead of 60.7 MB saved for
        backward. `test_folded_equals_plain_forward_and_backward` checks it against the plain form.

        There is one query, so W_K is applied to the query and W_V to each head's average of the tokens; keys and
        values are never materialized. Each weight is read only in the forward of the submodule that owns it, because
        with offloading, accelerate's hooks load a weight only for that call.

        Args:
            sink (`torch.Tensor` of shape `(batch, hidden)`):
                Hidden states of the sink tokens.
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`):
                Hidden states of the whole sequences.
            visual_mask (`torch.Tensor` of shape `(batch, seq)`):
                `True` at the visual tokens; or the output of [`additive_mask`], in the dtype of `hidden_states`.

        Returns:
            `torch.Tensor` of shape `(batch, hidden)`: The update, to be added to the sink.
        """
        # Autocast would cast, and so copy, all hidden states and weights for a single use
        with maybe_autocast(hidden_states.device.type, enabled=False):
            query, mask = self._folded_query(sink), additive_mask(visual_mask, hidden_states)
            averaged = self.kv_norm(query, hidden_states, mask, self.head_dim**-0.5)
            return self.o_proj(self.v_proj(averaged).flatten(1))

    def attention_weights(
        self, sink: torch.Tensor, hidden_states: torch.Tensor, visual_mask: torch.Tensor
    ) -> torch.Tensor:
        """
        Attention of the sink to each position, `(batch, heads, seq)`, in float32 at least; zero where `visual_mask` is
        `False` (and uniform in a sample without any visual token). Arguments as in [`SinkCrossAttention.forward`].
        """
        with maybe_autocast(hidden_states.device.type, enabled=False):
            query, mask = self._folded_query(sink), additive_mask(visual_mask, hidden_states)
            return self.kv_norm(query, hidden_states, mask, self.head_dim**-0.5, weights_only=True)

    def _folded_query(self, sink: torch.Tensor) -> torch.Tensor:
        query = self.q_proj(self.q_norm(sink.to(self.q_norm.weight.dtype)))
        return self.k_proj(query.unflatten(-1, (self.num_heads, self.head_dim)))


class FoldedKeys(nn.Linear):
    """W_K, applied to the one query instead of to every token."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map queries `(batch, heads, head_dim)` to `(batch, heads, hidden)`."""
        return torch.einsum("bhe,hed->bhd", input, self.weight.unflatten(0, input.shape[1:]))


class HeadwiseValues(nn.Linear):
    """W_V, applied to each head's average of the tokens instead of to every token."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map averages `(batch, heads, hidden)` to `(batch, heads, head_dim)`."""
        return _HeadwiseLinear.apply(input.to(self.weight.dtype), self.weight.unflatten(0, (input.shape[1], -1)))


class NormedAverage(nn.Module):
    """norm_kv (an RMSNorm), followed by each head's attention-weighted average of the normalized hidden states."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

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
                Additive mask for the scores.
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
        # Under `torch.compile`, the compiler decides what to save
        averaged = _average(*args) if torch.compiler.is_compiling() else _RecomputedAverage.apply(*args)
        return averaged if weight is not None else averaged * self.weight


def additive_mask(visual_mask: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    """0 at visual tokens; elsewhere so low that, in a sample with visual tokens, the weights are exactly zero."""
    if visual_mask.is_floating_point():
        return visual_mask
    # Half the minimum leaves room for adding the score; -inf would give NaN in samples without visual tokens
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
    the product with the query, so that outliers overflow float16 no sooner than in the plain form
    (`test_outlier_tokens_do_not_overflow_low_precision`).
    """
    normed = F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, eps)
    scores = torch.baddbmm(mask.unsqueeze(1), folded_query, normed.mT, alpha=scale)
    return scores.softmax(dim=-1, dtype=dtype), normed


def _average(
    folded_query: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor | None,
    mask: torch.Tensor,
    scale: float,
    eps: float,
) -> torch.Tensor:
    """Attention-weighted averages of the normalized states, `(batch, heads, hidden)`."""
    dtype = _float32_at_least(hidden_states)
    weights, normed = _attend(folded_query, hidden_states, weight, mask, scale, eps, dtype)
    return torch.bmm(weights.to(normed.dtype), normed)


def _float32_at_least(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _RecomputedAverage(torch.autograd.Function):
    """
    [`_average`], saving only its inputs for backward: 0.3 MB instead of 30.7 MB. Half of the 30.7 MB is normalized
    hidden states `(batch, seq, hidden)`, which a single kernel recomputes. `test_keys_and_values_do_not_materialize`
    and `test_folded_equals_plain_forward_and_backward` check this.
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
        # No `dtype`: in low precision, softmax computes in float32 anyway and rounds its result, which saves a cast
        weights, normed = _attend(folded_query, hidden_states, weight, mask, scale, eps)
        return torch.bmm(weights, normed)

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        [grad] = grad_outputs
        folded_query, hidden_states, weight, mask = ctx.saved_tensors
        is_low_rank = hidden_states.device.type == "cpu" and hidden_states.dtype in (torch.float32, torch.float64)
        gradients = _low_rank_gradients if is_low_rank else _recomputed_gradients
        args = (grad, folded_query, hidden_states, weight, mask, ctx.scale, ctx.eps)
        return *gradients(*args, ctx.needs_input_grad), None, None, None


def _recomputed_gradients(
    grad: torch.Tensor,
    folded_query: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor | None,
    mask: torch.Tensor,
    scale: float,
    eps: float,
    needs_grad: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of [`_average`] for query, hidden states and weight, by autograd."""
    with torch.enable_grad():
        folded_query = folded_query.detach().requires_grad_(needs_grad[0])
        hidden_states = hidden_states.detach().requires_grad_(needs_grad[1])
        weight = None if weight is None else weight.detach().requires_grad_(needs_grad[2])
        # Scale the query rather than the scores, whose backward would scale the gradient of all hidden states
        scaled_query, dtype = folded_query * scale, _float32_at_least(hidden_states)
        weights, normed = _attend(scaled_query, hidden_states, weight, mask, 1.0, eps, dtype)
        weights = weights.to(normed.dtype)
    inputs = (folded_query, hidden_states, weight)
    wanted = [each for each in inputs if each is not None and each.requires_grad]
    outputs, grads_of_outputs = [weights], [torch.bmm(grad, normed.detach().mT)]
    if normed.requires_grad:  # not in the first module of a frozen backbone
        outputs.append(normed)
        grads_of_outputs.append(torch.bmm(weights.detach().mT, grad))
    grads = iter(torch.autograd.grad(outputs, wanted, grads_of_outputs))
    return tuple(next(grads) if needed else None for needed in needs_grad[:3])


def _low_rank_gradients(
    grad: torch.Tensor,
    folded_query: torch.Tensor,
    hidden_states: torch.Tensor,
    weight: torch.Tensor | None,
    mask: torch.Tensor,
    scale: float,
    eps: float,
    needs_grad: tuple[bool, ...],
) -> tuple[torch.Tensor | None, ...]:
    """
    The same gradients for CPUs, which have no fused `rms_norm` (pytorch#153666 added one for GPUs): 50 ms instead of
    115 ms for forward and backward. `test_both_backward_passes_equal_autograd` checks that both versions agree.

    The gradient of the normalized states is a sum of 2 · heads outer products: per-token coefficients times
    directions `(hidden,)`. So the only tensor of size `(batch, seq, hidden)` is the result. Not used in low precision,
    where products with unnormalized states could overflow.
    """
    directions = torch.cat([grad, folded_query * scale], dim=1)
    weighted = directions if weight is None else directions * weight
    mean_square = torch.linalg.vector_norm(hidden_states, dim=-1).square() / hidden_states.shape[-1]
    inverse_rms = (mean_square + eps).rsqrt().unsqueeze(1)
    products = torch.bmm(weighted, hidden_states.mT) * inverse_rms
    grad_weights, scores = products.chunk(2, dim=1)
    weights = (scores + mask.unsqueeze(1)).softmax(dim=-1)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True))
    coefficients = torch.cat([weights, grad_scores], dim=1)
    # A change along the state's own direction does not change its normalized value: remove that component
    along_state = (coefficients * products).sum(dim=1, keepdim=True) / hidden_states.shape[-1] * inverse_rms.square()
    coefficients = coefficients * inverse_rms
    sums = torch.bmm(coefficients, hidden_states)
    grad_query = sums[:, grad.shape[1] :] * scale
    return (
        grad_query if weight is None else grad_query * weight,
        torch.baddbmm(hidden_states * -along_state.mT, coefficients.mT, weighted) if needs_grad[1] else None,
        None if weight is None else (directions * sums).sum(dim=(0, 1)),
    )


class _HeadwiseLinear(torch.autograd.Function):
    """
    Each head's own projection. With it, forward and backward of the module take 50 ms; with an `einsum`, for which
    autograd would compute a transposed gradient of the weights and copy it, 59 ms.
    `test_folded_equals_plain_forward_and_backward` checks it against the plain form.

    Inputs are `(batch, heads, hidden)`, weights `(heads, head_dim, hidden)`, outputs `(batch, heads, head_dim)`.
    """

    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inputs, weight)
        # Write the layout that W_O can read directly; an `einsum` would need a copy
        outputs = inputs.new_empty(*inputs.shape[:2], weight.shape[1])
        torch.bmm(inputs.transpose(0, 1), weight.mT, out=outputs.transpose(0, 1))
        return outputs

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        [grad] = grad_outputs
        inputs, weight = ctx.saved_tensors
        grad_weight = torch.einsum("bhe,bhd->hed", grad, inputs) if ctx.needs_input_grad[1] else None
        return torch.einsum("bhe,hed->bhd", grad, weight), grad_weight


class SavedOutput:
    """
    Makes autograd keep the output of a recovery layer instead of its input, which saves 15.1 MB of hidden states.
    `test_layer_keeps_no_hidden_states_of_its_own` and `test_layer_equals_plain_forward_and_backward` check this.

    Input and output differ only at the sinks. Sinks are not visual tokens, so their attention weight is exactly zero
    and no gradient of the attention depends on their values. The decoder layer saves the output anyway.

    Args:
        hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`):
            Input of the recovery layer.
    """

    def __init__(self, hidden_states: torch.Tensor):
        # Under `torch.compile`, the compiler decides what to save
        self.is_active = (
            torch.is_grad_enabled() and hidden_states.is_contiguous() and not torch.compiler.is_compiling()
        )
        if self.is_active:
            # Not the tensor itself: the hooks would keep it alive
            self.address = hidden_states.untyped_storage().data_ptr()
            self.offset = hidden_states.storage_offset()
        self.output: torch.Tensor | None = None
        self.version = 0

    def hooks(self) -> AbstractContextManager:
        """Context in which autograd saves shape, strides and offset of each view of the input instead of the view."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack) if self.is_active else nullcontext()

    def set_output(self, output: torch.Tensor) -> None:
        """Set the output that the backward pass will read."""
        if self.is_active:
            self.output, self.version = output.detach(), output._version

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | tuple:
        if tensor.untyped_storage().data_ptr() != self.address:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset() - self.offset

    def _unpack(self, packed: torch.Tensor | tuple) -> torch.Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        assert self.output is not None  # set right after the hooks
        if self.output._version != self.version:
            raise RuntimeError(
                "The input of a decoder layer with cue recovery was changed in place after the forward pass; its "
                "gradient cannot be computed."
            )
        return self.output.as_strided(*packed)
