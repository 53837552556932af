"""
The distillation objectives, per completion token.

The first functions compute the objectives from log-probabilities; the others compute them from the last hidden states
of the scored tokens and the two language-model heads. The latter never hold the logits of all tokens,
`(tokens, vocab)`: on a CPU with a frozen head they are plain PyTorch over chunks of tokens, with three products with a
head; elsewhere they are TRL's or Liger's kernels, with five and more memory (there is no kernel for the top-k
divergence). `test_frozen_head_changes_neither_values_nor_gradients` checks that the two agree.

The operands of a product with a head have the hidden states' dtype, as in the model. The product accumulates in
float32, and logits and losses stay in float32: bfloat16 would round logits by up to 2⁻⁹ of their value, which is more
than the difference between most teachers and their student. Liger's loss is the exception. Autocast must be off.
"""

import math

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch.nn import functional as F
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from .lm_head import LMHead
from .token_chunks import TokenLogprobs, over_token_chunks


# --- From log-probabilities ---


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
            Student's log-probabilities when the tokens were sampled; without gradient.
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
            `True` at the last token of each sentence, after which tokens count again. By default, they never do.

    Returns:
        `torch.Tensor` of shape `(batch, completion)`: `True` at the tokens of `mask` up to and including a rejected
        one.
    """
    rejected = torch.zeros_like(mask).masked_scatter(mask, gap < -threshold)
    earlier = rejected.cumsum(dim=1) - rejected.long()  # rejections before each token
    if ends is not None:
        is_first = F.pad(ends, (1, -1), value=True)
        # Subtract the rejections before the token's own sentence; `cummax` works because the counts only grow
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
    Weights that correct for sampling tokens with vLLM, whose probabilities differ from those in training by rounding.
    As in TRL's `GRPOTrainer`, they are p_train / p_vLLM, clamped to `[clip_min, clip_max]` or set to zero outside.

    Args:
        logprobs (`torch.Tensor` of shape `(tokens,)`):
            The model's log-probabilities of the sampled tokens in training; without gradient.
        sampling_logprobs (`torch.Tensor` of shape `(tokens,)`):
            The log-probabilities that they were sampled with. NaN where unknown, which means no correction.
        mask (`torch.Tensor` of shape `(batch, completion)`):
            `True` at these tokens.
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


def _with_rest(logprobs: torch.Tensor) -> torch.Tensor:
    """Append the log of the probability that `logprobs` `(tokens, k)` leave over."""
    # Clamp below zero: rounding can make the sum reach or exceed one, and then the log of the rest is not finite
    covered = logprobs.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7)
    return torch.cat([logprobs, torch.log(-torch.expm1(covered))], dim=-1)


@torch.no_grad()
def _entropy(logprobs: torch.Tensor) -> torch.Tensor:
    """Entropy `(tokens,)` of log-probabilities `(tokens, vocab)`."""
    return -torch.linalg.vecdot(logprobs.exp(), logprobs)


# --- From hidden states and heads ---


def token_logprobs(
    hidden_states: torch.Tensor, head: LMHead, token_ids: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Log-probability of each token and entropy of its distribution.

    Args:
        hidden_states (`torch.Tensor` of shape `(tokens, hidden)`):
            Hidden states that predict the tokens.
        head ([`LMHead`]):
            Head of the model that computed them.
        token_ids (`torch.Tensor` of shape `(tokens,)`):
            The tokens.
        temperature (`float`, *optional*, defaults to `1.0`):
            Softmax temperature.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities (in nats, differentiable) and entropies (without
            gradient), both `(tokens,)`.
    """
    if hidden_states.device.type != "cpu" or head.trains:
        return TokenLogprobs.apply(
            hidden_states, head.weight, head.bias, token_ids, temperature, head.softcapping, head.logit_scale
        )

    def chunk_logprobs(states: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = head.logits(states, temperature).log_softmax(dim=-1)
        return logprobs.gather(-1, ids.unsqueeze(-1)).squeeze(-1), _entropy(logprobs)

    return over_token_chunks(chunk_logprobs, hidden_states, token_ids, heads=[head])


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

    return over_token_chunks(chunk_divergence, student_states, teacher_states, heads=[student_head, teacher_head])


def liger_divergence_sum(
    student_states: torch.Tensor,
    student_head: LMHead,
    teacher_states: torch.Tensor,
    teacher_head: LMHead,
    beta: float,
    temperature: float = 1.0,
) -> torch.Tensor:
    """
    Sum over tokens of [`full_divergence`], with Liger's fused linear JSD. Same arguments.

    Liger rounds logits to the hidden states' dtype.

    Raises:
        `ValueError`: If a model scales or caps its logits, which Liger's loss does not support.
    """
    for head in (student_head, teacher_head):
        if head.logit_scale != 1.0 or head.softcapping is not None:
            raise ValueError(
                f"Liger's fused JSD supports neither logit scale nor soft-capping, but the model has "
                f"{head.logit_scale=} and {head.softcapping=}. Set `use_liger_kernel=False`."
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
    The teacher's most likely tokens.

    Args:
        states (`torch.Tensor` of shape `(tokens, hidden)`):
            Teacher's hidden states that predict the tokens.
        head ([`LMHead`]):
            Teacher's head.
        k (`int`):
            Number of tokens; at most the whole vocabulary.
        temperature (`float`, *optional*, defaults to `1.0`):
            Softmax temperature.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Log-probabilities (in nats, without gradient), the largest first, and
            token ids, both `(tokens, k)`.
    """

    def chunk_logprobs(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs = head.logits(states, temperature).log_softmax(dim=-1)
        top_logprobs, top_ids = logprobs.topk(min(k, logprobs.shape[-1]), dim=-1)
        return top_logprobs, top_ids

    with torch.no_grad():
        return over_token_chunks(chunk_logprobs, states, heads=[head])


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

    With the bucket, both sides are distributions, so this is a true divergence: never negative, and never more than
    [`full_divergence`]. Arguments and return values are the same, except for the teacher's:

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

    return over_token_chunks(chunk_divergence, student_states, top_logprobs, top_ids, heads=[student_head])
