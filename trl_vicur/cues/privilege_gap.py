"""
Privilege gap: how much a privilege (a cue or an answer) changes the teacher's token distributions.

A gap of `0` means that the teacher does not need the privilege. A recoverable cue has a small gap where the teacher
already sees in the image what the cue says. A student can close the gap of an answer only by learning a shortcut.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Value

from ..data.columns import set_column, set_columns
from ..data.messages import message_texts
from ..data.questions import QuestionRows
from ..data.rows import shorten
from ..data.teacher_prompt import TEACHER_PROMPT_TEMPLATE, add_privilege
from ..generation import ChatResponse, GeneratorUnavailableError, TransformersGenerator
from ..generation.collect import collect
from ..generation.requests import describe_error
from ..generation.response_store import ResponseStore, open_store
from .audit_summary import mean_of_columns


STORE_NAME = "privilege_gap.sqlite"
GAP_COLUMNS = ("cue_gap", "cue_gap_on_answer", "answer_gap", "answer_gap_on_answer")
# Completion tokens scored at a time, unless a single row has more. Two copies of the logits of this many tokens are
# in memory, in the model's dtype
MAX_SCORED_TOKENS = 2048
# Tokens whose logits are converted to float32 at a time
TOKEN_CHUNK_SIZE = 128


class GapRow(NamedTuple):
    """A row's prompts by privilege (`"none"`, `"cue"`, `"answer"`), its completion and its answer."""

    number: int
    prompts: dict[str, list[dict[str, Any]]]
    completion: str | None  # `None` if it is to be generated
    answer: str | None


def measure_privilege_gap(
    dataset: Dataset,
    teacher: TransformersGenerator,
    output: str | Path | None = None,
    completion_column: str | None = None,
    question_column: str | None = None,
    cue_column: str = "cue",
    answer_column: str = "answer",
    teacher_prompt_template: str = TEACHER_PROMPT_TEMPLATE,
) -> Dataset:
    """
    Estimate I(Y; S | X), how much a teacher's tokens depend on a privilege S that the student never sees: the cue
    and, for comparison, the answer (ViCuR, Prop. 1). The gap is KL(p_T(· | X, S, y_<t) ‖ p_T(· | X, y_<t)) over the
    whole vocabulary, averaged over the tokens of a reference completion y.

    Each batch is saved as soon as it is measured: after an interruption, the same call continues with the remaining
    rows. A row that fails gets its error recorded and does not stop the others.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, a question, a cue and possibly an answer. Rows without a cue are skipped.
        teacher ([`TransformersGenerator`]):
            The teacher. It processes `batch_size` rows at a time.
        output (`str` or `Path`, *optional*):
            Folder for the results, in the file `privilege_gap.sqlite`. Without it, they are not saved.
        completion_column (`str`, *optional*):
            Column with the reference completions (strings). By default the teacher's own greedy completions of the
            prompt without privilege, up to its `max_new_tokens`.
        question_column, cue_column, answer_column, teacher_prompt_template (`str`, *optional*):
            As in [`measure_usefulness`].

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns

        - `cue_gap`, `answer_gap` (`float`, in nats per token): means over the text of the completion, without its end
          token. `None` where the row is skipped, failed, or has no answer.
        - `cue_gap_on_answer`, `answer_gap_on_answer` (`float`, in nats per token): means over the tokens of the answer
          where it last occurs in the completion. `None` also where it does not occur.
        - `gap_error` (`str`): why the row failed, or `None`.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split, or `teacher` is not in this process.
        `ValueError`: If a column is missing, or if `output` was begun with different settings or a different dataset.
        [`GeneratorUnavailableError`], `OSError`: If memory runs out, or if the disk is full.
    """
    check_teacher(teacher)
    columns = {"completion_column": completion_column, "cue_column": cue_column, "answer_column": answer_column}
    rows = QuestionRows(dataset, question_column, may_lack=["answer_column"], **columns)
    settings = {**teacher.settings, "teacher_prompt_template": teacher_prompt_template, **rows.settings()}
    with open_store(output, STORE_NAME, settings) as store:
        measure = partial(measure_gaps, teacher, partial(read_row, teacher, rows, teacher_prompt_template))
        collect(store, rows.with_text(cue_column), measure, "Measuring gaps")
        gaps, errors = read_gaps(store, len(rows))
    return set_column(set_columns(dataset, gaps, Value("float64")), "gap_error", errors, Value("string"))


def summarize_privilege_gap(dataset: Dataset) -> dict[str, int | float]:
    """
    The means of `cue_gap` and `answer_gap`, and of both gaps on the answer, in nats per token. The two means
    of a pair are comparable: they are taken over the rows that have both values. Keys with the suffix `_rows` have the
    number of these rows.
    """
    return mean_of_columns(dataset, ["cue_gap", "answer_gap"]) | mean_of_columns(
        dataset, ["cue_gap_on_answer", "answer_gap_on_answer"]
    )


def check_teacher(teacher: TransformersGenerator) -> None:
    """
    Raises:
        `TypeError`: If the teacher does not provide its logits.
    """
    if not isinstance(teacher, TransformersGenerator):
        raise TypeError(
            f"The privilege gap needs the teacher's logits, which a {type(teacher).__name__} does not provide. Load "
            "the teacher with a `TransformersGenerator`."
        )


def read_row(teacher: TransformersGenerator, rows: QuestionRows, template: str, number: int) -> GapRow:
    """
    Raises:
        `ValueError`: If the row has no question, an unreadable image, a completion that is not a string, or a control
            token in one of its texts.
    """
    cue, answer, completion = (rows.value(number, f"{name}_column") for name in ("cue", "answer", "completion"))
    answer = None if answer is None else str(answer).strip()
    completion_column = rows.columns["completion_column"]
    if completion_column is not None and not isinstance(completion, str):
        raise ValueError(f"`{completion_column}` is {shorten(completion)}, expected a string.")
    prompts = {"none": rows.conversation(number)}
    for name, privilege in {"cue": cue, "answer": answer}.items():
        if privilege:
            prompts[name] = add_privilege(prompts["none"], privilege, template)
    texts = (text for prompt in prompts.values() for text in message_texts(prompt))
    teacher.refuse_control_tokens([completion or "", *texts])
    return GapRow(number, prompts, completion, answer)


def read_gaps(store: ResponseStore, num_rows: int) -> tuple[dict[str, list[float | None]], list[str | None]]:
    """Read the stored gaps as columns, and the errors of failed rows."""
    gaps: dict[str, list[float | None]] = {name: [None] * num_rows for name in GAP_COLUMNS}
    errors: list[str | None] = [None] * num_rows
    for number, text, error, _ in store:
        errors[number] = error
        for name, gap in json.loads(text or "{}").items():
            gaps[name][number] = gap
    return gaps, errors


def measure_gaps(
    teacher: TransformersGenerator, read: Callable[[int], GapRow], numbers: Iterable[int]
) -> Iterator[ChatResponse]:
    """Measure the gaps of rows batch by batch, as JSON. A row that cannot be read gets an error."""
    numbers = iter(numbers)
    while batch := list(islice(numbers, teacher.batch_size)):
        rows = []
        for number in batch:
            try:
                rows.append(read(number))
            except Exception as error:
                yield ChatResponse(number, None, describe_error(error))
        yield from _measure_rows(teacher, rows)


def _measure_rows(teacher: TransformersGenerator, rows: list[GapRow]) -> list[ChatResponse]:
    """Measure the gaps of some rows; a batch that fails is retried row by row."""
    try:
        with torch.no_grad():
            return _measure_batch(teacher, rows) if rows else []
    except torch.OutOfMemoryError as error:
        raise GeneratorUnavailableError(
            f"Out of memory in a batch of {len(rows)}. Lower `batch_size={teacher.batch_size}`."
        ) from error
    except Exception as error:
        if len(rows) == 1:
            return [ChatResponse(rows[0].number, None, describe_error(error))]
        return [response for row in rows for response in _measure_rows(teacher, [row])]


def _measure_batch(teacher: TransformersGenerator, rows: list[GapRow]) -> list[ChatResponse]:
    completions = [row.completion for row in rows if row.completion is not None]
    if not completions:
        completions = greedy_completions(teacher, [row.prompts["none"] for row in rows])
    token_ids, answer_tokens = zip(
        *(tokenize_completion(teacher, text, row.answer) for text, row in zip(completions, rows, strict=True)),
        strict=True,
    )
    gaps: list[dict[str, float]] = [{} for _ in rows]
    for part in _split(token_ids):
        plain = completion_logits(teacher, [rows[i].prompts["none"] for i in part], [token_ids[i] for i in part])
        for privilege in ("cue", "answer"):
            having = [i for i in part if privilege in rows[i].prompts]
            if not having:
                continue
            privileged = completion_logits(
                teacher, [rows[i].prompts[privilege] for i in having], [token_ids[i] for i in having]
            )
            for logits, i in zip(privileged, having, strict=True):
                length = len(token_ids[i])
                divergence = token_divergence(logits[:length], plain[part.index(i)][:length])
                gaps[i][f"{privilege}_gap"] = divergence.mean().item()
                if answer_tokens[i]:
                    gaps[i][f"{privilege}_gap_on_answer"] = divergence[answer_tokens[i]].mean().item()
    return [ChatResponse(row.number, json.dumps(gap)) for row, gap in zip(rows, gaps, strict=True)]


def _split(token_ids: Sequence[list[int]]) -> Iterator[list[int]]:
    """Split a batch into parts whose padded completions have at most `MAX_SCORED_TOKENS` tokens, or one row."""
    part, longest = [], 0
    for i, ids in enumerate(token_ids):
        longest = max(longest, len(ids))
        if part and (len(part) + 1) * longest > MAX_SCORED_TOKENS:
            yield part
            part, longest = [], len(ids)
        part.append(i)
    yield part


def greedy_completions(teacher: TransformersGenerator, conversations: list[list[dict[str, Any]]]) -> list[str]:
    """Generate the teacher's greedy completions, truncated at its `max_new_tokens`."""
    inputs = teacher.encode(conversations)
    max_new_tokens = teacher.settings["max_new_tokens"]
    # transformers annotates `generate` for its concrete classes only
    output_ids = teacher.model.generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=teacher.end_ids
    )
    return teacher.processing_class.batch_decode(
        output_ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True
    )


def tokenize_completion(
    teacher: TransformersGenerator, completion: str, answer: str | None
) -> tuple[list[int], list[int]]:
    """
    The token ids of a completion, and the positions of those that overlap with the last occurrence of the answer.
    Parts of a longer word or number ("12" in "120") do not count; case matters only for a single letter.

    Raises:
        `ValueError`: If the completion has no tokens.
    """
    # Tokenize the completion as plain text, even where it looks like a special token
    encoding = teacher.processing_class.tokenizer(
        completion, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    if not encoding["input_ids"]:
        raise ValueError("The completion is empty.")
    pattern = rf"(?<!\w)(?<!\d[.,]){re.escape(answer or '')}(?!\w|[.,]\d)"
    occurrences = list(re.finditer(pattern, completion, re.IGNORECASE if len(answer or "") > 1 else 0))
    if not answer or not occurrences:
        return encoding["input_ids"], []
    first, last = occurrences[-1].span()
    offsets = enumerate(encoding["offset_mapping"])
    return encoding["input_ids"], [i for i, (start, end) in offsets if start < last and end > first]


def completion_logits(
    teacher: TransformersGenerator, conversations: list[list[dict[str, Any]]], completions: list[list[int]]
) -> torch.Tensor:
    """
    Logits `(batch, completion, vocab)` that predict the completions' tokens, in the teacher's dtype. Shorter
    completions are padded at the end; ignore the logits there.
    """
    inputs = teacher.encode(conversations)
    longest = max(map(len, completions))
    padding_id = teacher.processing_class.tokenizer.pad_token_id
    ids = torch.tensor([ids + [padding_id] * (longest - len(ids)) for ids in completions], device=teacher.model.device)
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in completions], device=ids.device)
    added = {"input_ids": ids, "attention_mask": mask}
    # A completion has no visual tokens
    added |= {name: torch.zeros_like(ids) for name in ("token_type_ids", "mm_token_type_ids") if name in inputs}
    inputs |= {name: torch.cat([inputs[name], values.to(inputs[name].dtype)], dim=1) for name, values in added.items()}
    # The last position predicts what comes after the completion
    return teacher.model(**inputs, logits_to_keep=longest + 1, use_cache=False).logits[:, -longest - 1 : -1]


def token_divergence(privileged_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """
    KL(privileged ‖ plain) per token, over the whole vocabulary.

    Args:
        privileged_logits (`torch.Tensor` of shape `(tokens, vocab)`):
            The teacher's logits with the privilege.
        logits (`torch.Tensor` of shape `(tokens, vocab)`):
            Its logits without.

    Returns:
        `torch.Tensor` of shape `(tokens,)`: The divergence, in nats; float32.
    """
    divergences = []
    for privileged_chunk, chunk in zip(
        privileged_logits.split(TOKEN_CHUNK_SIZE), logits.split(TOKEN_CHUNK_SIZE), strict=True
    ):
        privileged_logprobs = privileged_chunk.float().log_softmax(dim=-1)
        logprobs = chunk.float().log_softmax(dim=-1)
        divergences.append((privileged_logprobs.exp() * (privileged_logprobs - logprobs)).sum(dim=-1))
    return torch.cat(divergences).clamp(min=0.0)  # rounding can make it negative
