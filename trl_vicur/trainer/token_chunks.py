"""
Per-token functions that never hold the logits of all tokens: plain PyTorch over chunks of tokens, and TRL's kernels
over tiles of logits.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch.utils.checkpoint import checkpoint
from trl.kernels import chunked_logprob
from trl.kernels.chunked_divergence import _project
from trl.kernels.chunked_logprob import (
    _BLOCK_SIZE,
    OPTIONAL_OUTPUTS,
    _backward_tile,
    _forward_tile,
    _use_triton,
)

from .lm_head import LMHead, add_products


# Number of logits in a chunk of tokens. On a CPU this is 64 MiB, large enough that the C library returns it to the
# system instead of fragmenting its heap; a GPU needs more to be busy
CPU_CHUNK_LOGITS = 2**24
CHUNK_LOGITS = 2**26
# Size of a tile of float32 logits. Together with its bfloat16 copy for the backward products, it needs no more memory
# than TRL's bfloat16 tile of 4,096 x 32,768
TILE_TOKENS = 4096
TILE_COLUMNS = 8192


def over_token_chunks(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    states: torch.Tensor,
    *others: torch.Tensor,
    heads: list[LMHead],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Apply a per-token function to one chunk of tokens at a time, so that only that chunk's logits are in memory.

    Args:
        function (`Callable`):
            Returns two tensors with one row per token: a value, differentiable in the states and the first head, and
            one without gradient, such as the entropy.
        states (`torch.Tensor` of shape `(tokens, hidden)`):
            Its first argument.
        others (`torch.Tensor` of shape `(tokens, ...)`):
            Its other arguments, without gradient.
        heads (`list[LMHead]`):
            The heads that it uses.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Both tensors for all tokens.
    """
    chunk_logits = CPU_CHUNK_LOGITS if states.device.type == "cpu" else CHUNK_LOGITS
    chunk_size = max(1, chunk_logits // heads[0].weight.shape[0])
    chunks = list(zip(*(each.split(chunk_size) for each in (states, *others)), strict=True))
    if heads[0].trains:
        # Recompute each chunk's logits in backward, because the head's gradient depends on the gradient of each value
        results = [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]
    elif torch.is_grad_enabled() and states.requires_grad:
        results = [_ValuesWithGradients.apply(function, *chunk) for chunk in chunks]
    else:
        results = [function(*chunk) for chunk in chunks]
    values, entropy = (torch.cat(parts) for parts in zip(*results, strict=True))
    return values, entropy


class _ValuesWithGradients(torch.autograd.Function):
    """
    Computes the values' gradients already in forward, so that backward needs neither logits nor a third product with
    the head.

    A token's value depends on its own hidden state only, so each row of the gradient of their sum is one token's.
    """

    @staticmethod
    def forward(
        ctx,
        function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        states: torch.Tensor,
        *others: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.num_others = len(others)
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            values, entropy = function(states, *others)
            (gradients,) = torch.autograd.grad(values.sum(), states)
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(entropy)
        return values.detach(), entropy

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_values, _ = grad_outputs
        (gradients,) = ctx.saved_tensors
        return None, (grad_values.unsqueeze(-1) * gradients).to(gradients.dtype), *[None] * ctx.num_others


class TokenLogprobs(torch.autograd.Function):
    """
    Log-probabilities and entropies of tokens by TRL's kernels, on float32 tiles of logits.

    It replaces TRL's `ChunkedLogProbFunction`, whose tiles have the hidden states' dtype. Near a logit of 28, bfloat16
    values are 0.125 apart, which gave 27 % of small advantages the wrong sign. Remove it once TRL's function keeps its
    tiles in float32. `test_frozen_head_changes_neither_values_nor_gradients` compares it with the plain form, and
    `test_gpu_kernels_agree_with_their_torch_form` compares the Triton kernels with their PyTorch form.
    """

    @staticmethod
    def forward(
        ctx,
        states: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        token_ids: torch.Tensor,
        temperature: float,
        softcapping: float | None,
        logit_scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.options = {
            "logit_scale": logit_scale,
            "softcap": softcapping or 1.0,
            "inv_t": 1 / temperature,
            "HAS_SOFTCAP": softcapping is not None,
            "BLOCK_SIZE": _BLOCK_SIZE,
        }
        outputs = {f"HAS_{name.upper()}": name == "entropy" for name in OPTIONAL_OUTPUTS}
        # For each token: largest logit, sum of exponentials, that sum weighted by logits, the token's logit, unused
        statistics = states.new_zeros(5, len(states), dtype=torch.float32)
        statistics[0] = -math.inf
        for tokens, start, tile in _tiles(states, weight, bias):
            largest, total, weighted, token_logit, unused = statistics[:, tokens]
            fold = _forward_tile
            if _use_triton(tile.device):  # a Triton kernel is launched by a subscript
                fold = chunked_logprob._forward_kernel[(len(tile),)]  # pyright: ignore[reportIndexIssue]
            running = (largest, total, weighted, unused, unused, unused, token_logit)
            fold(
                tile,
                tile.stride(0),
                token_ids[tokens],
                *running,
                start,
                tile.shape[1],
                **outputs,
                **ctx.options,
            )
        largest, total, weighted, token_logit, _ = statistics
        log_total = largest + total.log()
        entropy = log_total - weighted / total
        ctx.save_for_backward(states, weight, bias, token_ids, log_total)
        ctx.mark_non_differentiable(entropy)
        return token_logit - log_total, entropy

    @staticmethod
    def backward(ctx, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        states, weight, bias, token_ids, log_total = ctx.saved_tensors
        grad_states, grad_weight, grad_bias = (
            torch.zeros_like(each, dtype=torch.float32) if needed else None
            for each, needed in zip((states, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        grad_logprobs = grad_outputs[0].contiguous()
        for tokens, start, tile in _tiles(states, weight, bias):
            size, columns = tile.shape
            to_gradient = _backward_tile
            if _use_triton(tile.device):
                grid = size, -(-columns // _BLOCK_SIZE)
                to_gradient = chunked_logprob._backward_kernel[grid]  # pyright: ignore[reportIndexIssue]
            unused = log_total[tokens]  # a stand-in for entropies and their gradients
            to_gradient(
                tile,
                tile.stride(0),
                token_ids[tokens],
                log_total[tokens],
                unused,
                grad_logprobs[tokens],
                unused,
                start,
                columns,
                HAS_LOGPROB_GRAD=True,
                HAS_ENTROPY_GRAD=False,
                **ctx.options,
            )
            grad_rows = None if grad_states is None else grad_states[tokens]
            end = start + columns
            add_products(tile, states[tokens], weight[start:end], grad_rows, grad_weight, start)
            if grad_bias is not None:
                grad_bias[start:end] += tile.sum(dim=0)
        gradients = zip((grad_states, grad_weight, grad_bias), (states, weight, bias), strict=True)
        return *(None if grad is None else grad.to(each.dtype) for grad, each in gradients), None, None, None, None


def _tiles(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> Iterator[tuple[slice, int, torch.Tensor]]:
    """Tiles of the float32 logits, each with its tokens and its first column. All tiles share one buffer."""
    buffer = states.new_empty(min(len(states), TILE_TOKENS), min(len(weight), TILE_COLUMNS), dtype=torch.float32)
    for first in range(0, len(states), TILE_TOKENS):
        tokens = slice(first, min(first + TILE_TOKENS, len(states)))
        rows = states[tokens]
        for start in range(0, len(weight), TILE_COLUMNS):
            end = min(start + TILE_COLUMNS, len(weight))
            tile = buffer[: len(rows), : end - start]
            _project(tile, rows, weight, bias, start, end, states.dtype)
            yield tokens, start, tile
