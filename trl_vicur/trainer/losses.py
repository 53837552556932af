"""
The distillation objectives, per completion token.

All of them accept the last hidden states of the scored tokens and the two language-model heads, so that the logits of
shape (tokens, vocabulary) never exist as a whole. TRL's kernels do that, or Liger's. On a CPU with a frozen head, and
for the top-k divergence, for which there is no kernel, it is torch over chunks of tokens: it takes three products with
a head where the kernels take five, and less memory.

The operands of a product with a head have the hidden states' dtype, as in the model. The product accumulates in
float32, and logits and losses stay in float32: bfloat16 would round logits by up to 2⁻⁹ of their value, which is more
than most teachers differ from their student. Liger's loss is the exception. Autocast must be off.
"""

import math
from collections.abc import Callable, Iterator

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from trl.kernels import chunked_logprob
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction, _project
from trl.kernels.chunked_logprob import (
    _BLOCK_SIZE,
    OPTIONAL_OUTPUTS,
    _backward_tile,
    _forward_tile,
    _use_triton,
)

from .lm_head import LMHead, add_products


# Size of a tile of float32 logits. With its bfloat16 copy for the backward products it needs no more memory than TRL's
# bfloat16 tile of 4,096 x 32,768
TILE_TOKENS = 4096
TILE_COLUMNS = 8192
# Logits of a chunk of tokens. On a CPU 64 MiB, above what the C library's heap keeps for itself and fragments; a GPU
# wants more to be busy
CPU_CHUNK_LOGITS = 2**24
CHUNK_LOGITS = 2**26


def token_logprobs(
    hidden_states: torch.Tensor, head: LMHead, token_ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probability of each token and entropy of its distribution.

    Args:
        hidden_states (`torch.Tensor` of shape `(tokens, hidden)`):
            Hidden states that predict the tokens.
        head ([`LMHead`]):
            Head of the model that they come from.
        token_ids (`torch.Tensor` of shape `(tokens,)`):
            The tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Softmax temperature.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities (in nats, differentiable) and entropies (without
            gradient), both `(tokens,)`.
    """
    if hidden_states.device.type != "cpu" or head.trains:
        return _TokenLogprobs.apply(
            hidden_states, head.weight, head.bias, token_ids, temperature, head.softcapping, head.logit_scale
        )

    def chunk_logprobs(states: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = head.logits(states, temperature).log_softmax(dim=-1)
        return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), _entropy(logprobs)

    return _over_token_chunks(chunk_logprobs, hidden_states, token_ids, heads=[head])


def sampled_token_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    epsilon: float,
    epsilon_high: float,
    advantage_clip: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The paper's objective: the k1 estimate of the reverse KL as a per-token advantage, with PPO clipping (Eq. 6-8).

        A = clamp(log p_T − log p_old, ±advantage_clip)
        L = −min(ρ A, clamp(ρ, 1 − ε, 1 + ε_high) A),    ρ = p_θ / p_old

    Args:
        logprobs (`torch.Tensor` of shape `(tokens,)`):
            Student's log-probabilities of the sampled tokens.
        old_logprobs (`torch.Tensor` of shape `(tokens,)`):
            The same when the tokens were sampled; without gradient.
        teacher_logprobs (`torch.Tensor` of shape `(tokens,)`):
            Teacher's log-probabilities; without gradient.
        epsilon (`float`):
            Lower clip range of the ratio.
        epsilon_high (`float`):
            Upper clip range of the ratio.
        advantage_clip (`float`):
            Largest absolute advantage, in nats.

    Returns:
        `tuple[torch.Tensor, torch.Tensor, torch.Tensor]`: Loss, advantage, and whether the ratio was clipped, each
            `(tokens,)`.
    """
    advantages = (teacher_logprobs - old_logprobs).clamp(-advantage_clip, advantage_clip)
    ratio = torch.exp(logprobs - old_logprobs)
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + epsilon_high)
    loss = -torch.min(ratio * advantages, clipped_ratio * advantages)
    is_clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon_high) & (advantages > 0))
    return loss, advantages, is_clipped


def before_rejection(
    gap: torch.Tensor, mask: torch.Tensor, threshold: float, ends: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Which tokens come no later than the first one that the teacher rejects. After that, the teacher scores a prefix
    that it would not have written, and its advice on how to continue is unreliable (TRD, arXiv 2606.08432).

    Args:
        gap (`torch.Tensor` of shape `(tokens,)`):
            Teacher's minus student's log-probability of the sampled tokens, in nats; without gradient.
        mask (`torch.Tensor` of shape `(batch, completion)`):
            `True` at these tokens.
        threshold (`float`):
            A token is rejected if its gap is below the negative threshold, in nats.
        ends (`torch.Tensor` of shape `(batch, completion)`, *optional*):
            `True` at the last token of each sentence. After it, tokens count again. By default none do.

    Returns:
        `torch.Tensor` of shape `(batch, completion)`: `True` at the tokens of `mask` up to and including a rejected
        one.
    """
    rejected = torch.zeros_like(mask).masked_scatter(mask, gap < -threshold)
    earlier = rejected.cumsum(dim=1) - rejected.long()  # rejections before each token
    if ends is not None:
        is_first = F.pad(ends, (1, -1), value=True)
        # What was rejected before the token's own sentence; the counts only grow
        earlier = earlier - (earlier * is_first).cummax(dim=1).values
    return mask & (earlier == 0)


def importance_sampling_ratio(
    logprobs: torch.Tensor,
    sampling_logprobs: torch.Tensor,
    mask: torch.Tensor,
    mode: str,
    clip_min: float | None,
    clip_max: float | None,
) -> torch.Tensor:
    """
    Weights that correct for tokens that vLLM sampled with other probabilities than the model has in training, as in
    TRL's `GRPOTrainer`: p_train / p_vLLM, truncated to `[clip_min, clip_max]`, or zero outside.

    Args:
        logprobs (`torch.Tensor` of shape `(tokens,)`):
            The model's log-probabilities of the sampled tokens in training; without gradient.
        sampling_logprobs (`torch.Tensor` of shape `(tokens,)`):
            Those with which they were sampled. NaN where unknown, which gives no correction.
        mask (`torch.Tensor` of shape `(batch, completion)`):
            `True` at the tokens.
        mode (`str`):
            `"token_truncate"` or `"token_mask"` for a ratio per token, `"sequence_truncate"` or `"sequence_mask"` for
            the product of a completion's ratios.
        clip_min (`float`, *optional*):
            Lower bound.
        clip_max (`float`, *optional*):
            Upper bound.

    Returns:
        `torch.Tensor` of shape `(tokens,)`: The weights.
    """
    difference = (logprobs - sampling_logprobs).nan_to_num(nan=0.0)
    granularity, constraint = mode.split("_")
    if granularity == "sequence":
        difference = difference.new_zeros(mask.shape).masked_scatter(mask, difference).sum(dim=1, keepdim=True)
        difference = difference.expand(mask.shape)[mask]
    ratio = difference.exp()
    low, high = clip_min or 0.0, math.inf if clip_max is None else clip_max
    if constraint == "truncate":
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


def full_divergence(
    student_states: torch.Tensor,
    student_head: LMHead,
    teacher_states: torch.Tensor,
    teacher_head: LMHead,
    beta: float,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generalized Jensen-Shannon divergence over the whole vocabulary.

    Args:
        student_states (`torch.Tensor` of shape `(tokens, hidden)`):
            Student's hidden states.
        student_head ([`LMHead`]):
            Student's head.
        teacher_states (`torch.Tensor` of shape `(tokens, teacher_hidden)`):
            Teacher's hidden states for the same tokens.
        teacher_head ([`LMHead`]):
            Teacher's head, of the same vocabulary.
        beta (`float`):
            `0.0` is the forward KL(teacher ‖ student), `1.0` the reverse KL, between them the generalized JSD.
        temperature (`float`, *optional*, defaults to `1.0`):
            Softmax temperature of both.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Divergence (in nats, differentiable in the student) and student's entropy
            (without gradient), both `(tokens,)`.
    """
    if student_states.device.type != "cpu" or student_head.trains:
        return ChunkedDivergenceFunction.apply(
            student_states,
            student_head.weight,
            student_head.bias,
            teacher_states,
            teacher_head.weight,
            teacher_head.bias,
            beta,
            temperature,
            student_head.logit_scale,
            student_head.softcapping,
            teacher_head.logit_scale,
            teacher_head.softcapping,
        )

    def chunk_divergence(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            teacher_logprobs = teacher_head.logits(teacher, temperature).log_softmax(dim=-1)
        logprobs = student_head.logits(student, temperature).log_softmax(dim=-1)
        return _generalized_jsd(logprobs, teacher_logprobs, beta), _entropy(logprobs)

    return _over_token_chunks(chunk_divergence, student_states, teacher_states, heads=[student_head, teacher_head])


def liger_divergence_sum(
    student_states: torch.Tensor,
    student_head: LMHead,
    teacher_states: torch.Tensor,
    teacher_head: LMHead,
    beta: float,
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    The divergence of [`full_divergence`] by Liger's fused linear JSD, which only knows the sum over all tokens.

    It rounds logits to the hidden states' dtype.

    Raises:
        `ValueError`: If a model scales or caps its logits, which Liger's loss does not do.
    """
    for head in (student_head, teacher_head):
        if head.logit_scale != 1.0 or head.softcapping is not None:
            raise ValueError(
                f"Liger's fused JSD knows neither logit scale nor soft-capping, but the model has {head.logit_scale=} "
                f"and {head.softcapping=}. Set `use_liger_kernel=False`."
            )
    num_tokens = student_states.shape[0]
    if num_tokens == 0:
        return student_states.sum()
    jsd = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=False
    )
    # Labels matter only where they are `ignore_index`
    labels = torch.zeros(num_tokens, dtype=torch.long, device=student_states.device)
    mean = jsd(
        student_states,
        student_head.weight.to(student_states.dtype),
        teacher_states,
        teacher_head.weight.to(teacher_states.dtype),
        labels,
        student_head.bias,
        teacher_head.bias,
    )
    return mean * num_tokens


def topk_logprobs(
    states: torch.Tensor, head: LMHead, k: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    A teacher's most likely tokens.

    Args:
        states (`torch.Tensor` of shape `(tokens, hidden)`):
            Teacher's hidden states that predict the tokens.
        head ([`LMHead`]):
            Teacher's head.
        k (`int`):
            How many tokens; at most all of the vocabulary.
        temperature (`float`, *optional*, defaults to `1.0`):
            Softmax temperature.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities (in nats, without gradient), the largest first, and
            token ids, both `(tokens, k)`.
    """

    def chunk_logprobs(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = head.logits(states, temperature).log_softmax(dim=-1)
        return tuple(logprobs.topk(min(k, logprobs.shape[-1]), dim=-1))

    with torch.no_grad():
        return _over_token_chunks(chunk_logprobs, states, heads=[head])


def topk_divergence(
    student_states: torch.Tensor,
    student_head: LMHead,
    top_logprobs: torch.Tensor,
    top_ids: torch.Tensor,
    beta: float,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Generalized Jensen-Shannon divergence over the teacher's `k` most likely tokens and one bucket for all others.

    The bucket keeps both sides distributions, so this is a true divergence: never negative, and never more than
    [`full_divergence`]. Arguments and return values as there, but for what is known of the teacher:

    Args:
        top_logprobs (`torch.Tensor` of shape `(tokens, k)`):
            Teacher's log-probabilities of these tokens, at the same temperature.
        top_ids (`torch.Tensor` of shape `(tokens, k)`):
            Ids of the teacher's most likely tokens.
    """

    def chunk_divergence(
        student: torch.Tensor, top_logprobs: torch.Tensor, top_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = student_head.logits(student, temperature).log_softmax(dim=-1)
        divergence = _generalized_jsd(_with_rest(logprobs.gather(-1, top_ids)), _with_rest(top_logprobs), beta)
        return divergence, _entropy(logprobs)

    return _over_token_chunks(chunk_divergence, student_states, top_logprobs, top_ids, heads=[student_head])


def _over_token_chunks(
    function: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    states: torch.Tensor,
    *others: torch.Tensor,
    heads: list[LMHead],
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Apply a function of tokens to few of them at a time, so that only their logits exist.

    Args:
        function (`Callable`):
            Gives two tensors with a row for each token: a value, differentiable in the states and the first head, and
            one without gradient, as a rule an entropy.
        states (`torch.Tensor` of shape `(tokens, hidden)`):
            Its first argument.
        others (`torch.Tensor` of shape `(tokens, ...)`):
            Its further arguments, without gradient.
        heads (`list[LMHead]`):
            The heads that it uses.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Both for all tokens.
    """
    chunk_logits = CPU_CHUNK_LOGITS if states.device.type == "cpu" else CHUNK_LOGITS
    chunk_size = max(1, chunk_logits // heads[0].weight.shape[0])
    chunks = list(zip(*(each.split(chunk_size) for each in (states, *others)), strict=True))
    if heads[0].trains:
        # Backward computes each chunk's logits again: what a token adds to the head's gradient depends on the loss
        results = [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]
    elif torch.is_grad_enabled() and states.requires_grad:
        results = [_ValuesWithGradients.apply(function, *chunk) for chunk in chunks]
    else:
        results = [function(*chunk) for chunk in chunks]
    values, entropy = (torch.cat(parts) for parts in zip(*results, strict=True))
    return values, entropy


class _ValuesWithGradients(torch.autograd.Function):
    """
    Values of tokens, with their gradients computed at once, so that backward needs no logits.

    A token's value depends on no other token's hidden state, so each row of their sum's gradient is one token's.
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
    def backward(ctx, grad_values: torch.Tensor, _) -> tuple[torch.Tensor | None, ...]:
        (gradients,) = ctx.saved_tensors
        return None, (grad_values.unsqueeze(-1) * gradients).to(gradients.dtype), *[None] * ctx.num_others


class _TokenLogprobs(torch.autograd.Function):
    """
    TRL's `ChunkedLogProbFunction` with float32 tiles of logits; TRL's tiles have the hidden states' dtype.

    bfloat16 has steps of 0.125 at a logit of 28, which gave 27 % of the small advantages the wrong sign. The kernels
    that reduce the tiles are TRL's; `test_frozen_head_changes_neither_values_nor_gradients` compares the result with
    the plain form.
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
            if _use_triton(tile.device):
                fold = chunked_logprob._forward_kernel[(len(tile),)]
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
    def backward(ctx, grad_logprobs: torch.Tensor, _) -> tuple[torch.Tensor | None, ...]:
        states, weight, bias, token_ids, log_total = ctx.saved_tensors
        grad_states, grad_weight, grad_bias = (
            torch.zeros_like(each, dtype=torch.float32) if needed else None
            for each, needed in zip((states, weight, bias), ctx.needs_input_grad[:3], strict=True)
        )
        grad_logprobs = grad_logprobs.contiguous()
        for tokens, start, tile in _tiles(states, weight, bias):
            size, columns = tile.shape
            to_gradient = _backward_tile
            if _use_triton(tile.device):
                to_gradient = chunked_logprob._backward_kernel[(size, -(-columns // ctx.options["BLOCK_SIZE"]))]
            unused = log_total[tokens]  # in place of entropies and their gradients
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
    """Tiles of the float32 logits, each with its tokens and first column. All tiles share one buffer."""
    buffer = states.new_empty(min(len(states), TILE_TOKENS), min(len(weight), TILE_COLUMNS), dtype=torch.float32)
    for first in range(0, len(states), TILE_TOKENS):
        tokens = slice(first, min(first + TILE_TOKENS, len(states)))
        rows = states[tokens]
        for start in range(0, len(weight), TILE_COLUMNS):
            end = min(start + TILE_COLUMNS, len(weight))
            tile = buffer[: len(rows), : end - start]
            _project(tile, rows, weight, bias, start, end, states.dtype)
            yield tokens, start, tile


@torch.no_grad()
def _entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy `(tokens,)` of log-probabilities `(tokens, vocab)`."""
    return -torch.linalg.vecdot(logprobs.exp(), logprobs)


def _with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Append the log of the probability that `logprobs` `(tokens, k)` leave over."""
    # Clamped below zero: rounding can make the sum exceed one, and the log of nothing is not finite
    covered = logprobs.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs, torch.log(-torch.expm1(covered))], dim=-1)


def _generalized_jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float) -> torch.Tensor:
    """Divergence `(tokens,)` of two sets of log-probabilities `(tokens, categories)`."""
    if beta == 0.0:
        return (teacher.exp() * (teacher - student)).sum(dim=-1)
    if beta == 1.0:
        return (student.exp() * (student - teacher)).sum(dim=-1)
    log_beta, log_rest = torch.log(torch.tensor([beta, 1 - beta], dtype=student.dtype, device=student.device))
    mixture = torch.logaddexp(student + log_rest, teacher + log_beta)
    from_teacher = (teacher.exp() * (teacher - mixture)).sum(dim=-1)
    from_student = (student.exp() * (student - mixture)).sum(dim=-1)
    return beta * from_teacher + (1 - beta) * from_student
