"""
Time and peak memory of the distillation losses, forward and backward, at Qwen3-VL-2B's vocabulary.

1,024 completion tokens, hidden size 2048, vocabulary 151,936, in float32 and bfloat16; the heads are frozen, as with
an adapter. Each objective is compared with its naive form, which computes the logits of all tokens at once, in the
states' dtype, and with libraries' kernels: TRL's chunked log-probabilities and divergence, and Liger's fused linear
JSD. Errors of loss and gradient, relative to float64 with the same operands, are measured at a smaller size.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from measure import DEVICE, IS_CUDA, peak_memory, ratio, seconds
from torch.nn import functional as F
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from trl_vicur.trainer.lm_head import LMHead
from trl_vicur.trainer.losses import (
    full_divergence,
    liger_divergence_sum,
    sampled_token_loss,
    token_logprobs,
    topk_divergence,
    topk_logprobs,
)


DTYPES = (torch.float32, torch.bfloat16)
TOKENS, HIDDEN, VOCABULARY = 1024, 2048, 151936
TOP_K = 100
CLIPS = dict(epsilon=0.2, epsilon_high=0.2, advantage_clip=10.0)


class Problem:
    """Hidden states and heads of a student and a teacher, and sampled tokens."""

    def __init__(self, tokens: int, hidden: int, vocabulary: int, dtype: torch.dtype):
        torch.manual_seed(0)
        make = dict(device=DEVICE, dtype=dtype)
        self.student_states = torch.randn(tokens, hidden, **make).requires_grad_()
        self.teacher_states = torch.randn(tokens, hidden, **make)
        self.student_head = LMHead(torch.randn(vocabulary, hidden, **make) * 0.05)
        self.teacher_head = LMHead(torch.randn(vocabulary, hidden, **make) * 0.05)
        self.token_ids = torch.randint(0, vocabulary, (tokens,), device=DEVICE)
        self.both = (self.student_states, self.student_head, self.teacher_states, self.teacher_head)

    def logprobs(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the whole vocabulary, for all tokens at once."""
        student = F.linear(self.student_states, self.student_head.weight)
        teacher = F.linear(self.teacher_states, self.teacher_head.weight)
        dtype = torch.promote_types(student.dtype, torch.float32)
        return student.to(dtype).log_softmax(-1), teacher.to(dtype).log_softmax(-1)


def naive_sampled_token(problem: Problem) -> torch.Tensor:
    logprobs, teacher_logprobs = (
        each.gather(-1, problem.token_ids.unsqueeze(-1)).squeeze(-1) for each in problem.logprobs()
    )
    return sampled_token_loss(logprobs, logprobs.detach(), teacher_logprobs, **CLIPS)[0].sum()


def sampled_token(problem: Problem) -> torch.Tensor:
    logprobs, _ = token_logprobs(problem.student_states, problem.student_head, problem.token_ids)
    with torch.no_grad():
        teacher_logprobs, _ = token_logprobs(problem.teacher_states, problem.teacher_head, problem.token_ids)
    return sampled_token_loss(logprobs, logprobs.detach(), teacher_logprobs, **CLIPS)[0].sum()


def trl_sampled_token(problem: Problem) -> torch.Tensor:
    def logprobs(states: torch.Tensor, head: LMHead) -> torch.Tensor:
        arguments = (states, head.weight, None, problem.token_ids, 1.0, 32768, None, 1.0, ("entropy",))
        return ChunkedLogProbFunction.apply(*arguments)[0]

    student = logprobs(problem.student_states, problem.student_head)
    teacher = logprobs(problem.teacher_states, problem.teacher_head)
    return sampled_token_loss(student, student.detach(), teacher, **CLIPS)[0].sum()


def trl_divergence(problem: Problem, beta: float) -> torch.Tensor:
    student = (problem.student_states, problem.student_head.weight, None)
    teacher = (problem.teacher_states, problem.teacher_head.weight, None)
    return ChunkedDivergenceFunction.apply(*student, *teacher, beta, 1.0, 1.0, None, 1.0, None)[0].sum()


def naive_divergence(problem: Problem, beta: float) -> torch.Tensor:
    student, teacher = problem.logprobs()
    if beta == 0.0:
        return (teacher.exp() * (teacher - student)).sum()
    if beta == 1.0:
        return (student.exp() * (student - teacher)).sum()
    mixture = torch.log(beta * teacher.exp() + (1 - beta) * student.exp())
    from_teacher, from_student = teacher.exp() * (teacher - mixture), student.exp() * (student - mixture)
    return (beta * from_teacher + (1 - beta) * from_student).sum()


def topk(problem: Problem) -> torch.Tensor:
    top = topk_logprobs(problem.teacher_states, problem.teacher_head, TOP_K)
    return topk_divergence(problem.student_states, problem.student_head, *top, beta=0.0)[0].sum()


def naive_topk(problem: Problem) -> torch.Tensor:
    student, teacher = problem.logprobs()
    teacher, top_ids = teacher.topk(TOP_K, dim=-1)
    student = student.gather(-1, top_ids)
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    rest_of_student, rest_of_teacher = (torch.log1p(-each.exp().sum(-1)) for each in (student, teacher))
    return (divergence + rest_of_teacher.exp() * (rest_of_teacher - rest_of_student)).sum()


Objective = Callable[[Problem], torch.Tensor]


def objectives() -> dict[str, dict[str, Objective]]:
    """The sides of each comparison: the naive form first, then the forms that are compared with it."""
    table: dict[str, dict[str, Objective]] = {
        "sampled_token": {
            "naive": naive_sampled_token,
            "ours": sampled_token,
            "TRL's log-probabilities": trl_sampled_token,
        },
        "topk_logits": {
            "naive": naive_topk,
            "ours": topk,
        },
    }
    for beta in (0.0, 0.5):
        table[f"full_logits, beta {beta}"] = {
            "naive": lambda problem, beta=beta: naive_divergence(problem, beta),
            "ours": lambda problem, beta=beta: full_divergence(*problem.both, beta=beta)[0].sum(),
            "TRL": lambda problem, beta=beta: trl_divergence(problem, beta),
            "Liger (use_liger_kernel)": lambda problem, beta=beta: liger_divergence_sum(*problem.both, beta=beta),
        }
    return table


def largest_error(objective: Objective, naive: Objective, dtype: torch.dtype) -> float:
    """Relative error of loss and gradient against the naive form in float64."""
    errors = []
    results = []
    for function, is_exact in ((objective, False), (naive, True)):
        problem = Problem(96, 64, 5000, dtype)
        if is_exact:
            problem.student_states = problem.student_states.detach().double().requires_grad_()
            problem.teacher_states = problem.teacher_states.double()
            problem.student_head = LMHead(problem.student_head.weight.double())
            problem.teacher_head = LMHead(problem.teacher_head.weight.double())
            problem.both = (
                problem.student_states,
                problem.student_head,
                problem.teacher_states,
                problem.teacher_head,
            )
        loss = function(problem)
        loss.backward()
        results.append((loss.detach().double(), problem.student_states.grad.double()))
    for value, reference in zip(*results, strict=True):
        errors.append(((value - reference).abs().max() / reference.abs().max()).item())
    return max(errors)


def run(quick: bool = False) -> dict[str, Any]:
    sizes = (256, 256, 20000) if quick else (TOKENS, HIDDEN, VOCABULARY)
    rows = [row for dtype in DTYPES for row in rows_of(Problem(*sizes, dtype), dtype)]
    return {"tokens": sizes[0], "vocabulary": sizes[2], "rows": rows}


def rows_of(problem: Problem, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Measures each side of each comparison."""
    dtype_name = str(dtype).removeprefix("torch.")
    rows = []
    for name, sides in objectives().items():

        def call(objective: Objective) -> None:
            problem.student_states.grad = None
            objective(problem).backward()

        times, peaks = {side: [] for side in sides}, {side: [] for side in sides}
        for turn in range(3 if IS_CUDA else 1):
            for side in list(sides) if turn % 2 == 0 else reversed(sides):

                def timed(side=side, objective=sides[side], times=times):
                    times[side].append(seconds(lambda: call(objective)))

                peaks[side].append(peak_memory(timed))
        trl = next((side for side in sides if side.startswith("TRL")), None)
        for side, objective in sides.items():
            row = {
                "dtype": dtype_name,
                "objective": name,
                "side": side,
                "seconds": median(times[side]),
                "time_over_naive": ratio(times[side], times["naive"]),
                "peak_bytes": median(peaks[side]),
                "peak_over_naive": ratio(peaks[side], peaks["naive"])["median"],
                "error": largest_error(objective, sides["naive"], dtype),
            }
            if trl is not None:
                row["time_over_trl"] = ratio(times[side], times[trl])
            rows.append(row)
            over_trl = f", {row['time_over_trl']['median']:.2f} of TRL's kernel" if trl is not None else ""
            print(
                f"{dtype_name}, {name}, {side}: {row['seconds']:.2f} s ({row['time_over_naive']['median']:.2f} of "
                f"naive{over_trl}), peak {row['peak_bytes'] / 2**20:.0f} MiB ({row['peak_over_naive']:.2f}), error "
                f"{row['error']:.1e}",
                flush=True,
            )
    return rows


def plot(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(10, 10), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    rows = results["rows"]
    labels = [f"{row['dtype']}, {row['objective']}: {row['side']}" for row in rows]
    colors = ["0.7" if row["side"] == "naive" else "C0" if row["side"] == "ours" else "C1" for row in rows]
    left.barh(labels, [row["peak_bytes"] / 2**30 for row in rows], color=colors)
    right.barh(labels, [row["seconds"] for row in rows], color=colors)
    left.invert_yaxis()
    left.set_xlabel("peak memory, GiB")
    right.set_xlabel("seconds, forward + backward")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{results['tokens']:,} tokens, vocabulary {results['vocabulary']:,}")
    return figure
