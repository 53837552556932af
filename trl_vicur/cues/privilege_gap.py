"""How much does the teacher know that the student cannot see? The gap that a privilege opens between their tokens."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, Value
from tqdm.auto import tqdm

from ..data.columns import check_columns, check_dataset, find_image_column, find_question_column, set_column
from ..data.dataset_digest import dataset_digest
from ..data.images import read_image
from ..data.messages import message_texts
from ..data.rows import row_images, shorten
from ..data.teacher_prompt import TEACHER_PROMPT_TEMPLATE
from ..generation import ChatResponse, GeneratorUnavailableError, TransformersGenerator
from ..generation.response_store import open_store
from .audit_summary import mean_of_columns
from .usefulness import make_prompt


STORE_NAME = "privilege_gap.sqlite"
GAP_COLUMNS = ("cue_gap", "cue_gap_on_answer", "answer_gap", "answer_gap_on_answer")
# Completion tokens that are scored at a time, unless a single row has more: logits of this many tokens exist twice, in
# the model's data type
MAX_SCORED_TOKENS = 2048
# Of these, tokens whose logits exist in float32 at a time
TOKEN_CHUNK_SIZE = 128


class GapRow(NamedTuple):
    """What is read of a row: its prompts by privilege (`"none"`, `"cue"`, `"answer"`), completion and answer."""

    number: int
    prompts: dict[str, list[dict[str, Any]]]
    completion: str | None  # none where it is to be generated
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
    Estimate I(Y; S | X), how much a teacher's tokens depend on a privilege S that the student never sees, for the cue
    and beside it for the answer as privilege (ViCuR, Prop. 1).

    It is the mean, over the tokens of reference completions y, of the Kullback-Leibler divergence between the
    teacher's next-token distributions with the privilege and without, over the whole vocabulary:

        KL( p_T(· | X, S, y_<t) ‖ p_T(· | X, y_<t) )    in nats per token

    `0` means that the teacher could as well do without S. For a recoverable privilege it is small where the teacher
    sees in the image what the cue tells; the gap of an answer is what the student can only learn as a shortcut.

    The results of each batch are on disk as soon as they are there: after an interruption, the same call goes on with
    the rows that are left. A row that fails is recorded with its error and does not stop the others.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, a question, a cue and possibly an answer. Rows without a cue are left out.
        teacher ([`TransformersGenerator`]):
            The teacher. Its `batch_size` is the number of rows at a time.
        output (`str` or `Path`, *optional*):
            Folder for the results, in the file `privilege_gap.sqlite`. Without it, they are not kept.
        completion_column (`str`, *optional*):
            Column with the reference completions (strings). Without it, they are the teacher's own greedy completions
            of the prompt without privilege, of at most its `max_new_tokens`.
        question_column (`str`, *optional*):
            Column with the questions, strings or conversational prompts. By default `prompt` or, if there is none,
            `question`.
        cue_column (`str`, *optional*, defaults to `"cue"`):
            Column with the cues.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the answers, if there is one.
        teacher_prompt_template (`str`, *optional*, defaults to `"{prompt}\\n\\n[Hint]: {privilege}"`):
            How the privilege is added to the last user turn.

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns

        - `cue_gap`, `answer_gap` (`float`, in nats): means over the tokens of the completion's text, without its end
          token. `None` where the row is left out, failed, or has no answer.
        - `cue_gap_on_answer`, `answer_gap_on_answer` (`float`, in nats): means over the tokens of the answer, where it
          occurs last in the completion. `None` also where it does not.
        - `gap_error` (`str`): why the row failed, or `None`.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split, or `teacher` is not in this process.
        `ValueError`: If a column is missing, or if `output` was begun with other settings or another dataset.
        [`GeneratorUnavailableError`]: If the memory does not suffice.
        `OSError`: If the disk is full.
    """
    if not isinstance(teacher, TransformersGenerator):
        raise TypeError(
            f"The privilege gap needs the teacher's logits, which a {type(teacher).__name__} does not give. Load the "
            "teacher with a `TransformersGenerator`."
        )
    check_dataset(dataset)
    optional = {} if completion_column is None else {"completion_column": completion_column}
    check_columns(dataset, cue_column=cue_column, **optional)
    question_column = find_question_column(dataset, question_column)
    columns = [question_column, find_image_column(dataset), cue_column, *optional.values()]
    if answer_column in dataset.column_names:
        columns.append(answer_column)
    inputs = dataset.select_columns(columns)
    settings = {
        **teacher.settings,
        "teacher_prompt_template": teacher_prompt_template,
        "completion_column": completion_column,
        "question_column": question_column,
        "cue_column": cue_column,
        "answer_column": answer_column,
        "rows": len(dataset),
        "dataset": dataset_digest(inputs),
    }

    def read_row(number: int) -> GapRow:
        row = inputs[number]
        answer = None if row.get(answer_column) is None else str(row[answer_column]).strip()
        completion = None
        if completion_column is not None:
            completion = row[completion_column]
            if not isinstance(completion, str):
                raise ValueError(f"`{completion_column}` is {shorten(completion)}, expected a string.")
        images = [read_image(image) for image in row_images(row)]
        privileges = {"none": None, "cue": row[cue_column]} | ({"answer": answer} if answer else {})
        prompts = {
            name: make_prompt(row, images, question_column, privilege, teacher_prompt_template)
            for name, privilege in privileges.items()
        }
        texts = (text for prompt in prompts.values() for text in message_texts(prompt))
        teacher.refuse_control_tokens([completion or "", *texts])
        return GapRow(number, prompts, completion, answer)

    cues = dataset.select_columns([cue_column]).with_format(None)
    has_cue = bytearray(bool((cue or "").strip()) for cue in cues[cue_column])
    results: dict[str, list] = {name: [None] * len(dataset) for name in (*GAP_COLUMNS, "gap_error")}
    with open_store(output, STORE_NAME, settings) as store:
        pending = (number for number in store.pending(len(dataset)) if has_cue[number])
        num_done, _ = store.count()
        with tqdm(total=sum(has_cue), initial=num_done, desc="Measuring gaps", unit="row") as progress:
            while numbers := list(islice(pending, teacher.batch_size)):
                responses, rows = [], []
                for number in numbers:
                    try:
                        rows.append(read_row(number))
                    except Exception as error:
                        responses.append(_failure(number, error))
                store.add(responses + _measure_rows(teacher, rows))
                progress.update(len(numbers))
        for number, text, error, _ in store:
            results["gap_error"][number] = error
            for name, gap in json.loads(text or "{}").items():
                results[name][number] = gap
    for name, values in results.items():
        dataset = set_column(dataset, name, values, Value("string" if name == "gap_error" else "float64"))
    return dataset


def summarize_privilege_gap(dataset: Dataset) -> dict[str, int | float]:
    """
    The means of `cue_gap` and `answer_gap`, and of the same on the answer, in nats per token. Each two are taken over
    the rows that have both, so that they can be compared, and under the same names with `_rows` behind stands the
    number of these.
    """
    return mean_of_columns(dataset, ["cue_gap", "answer_gap"]) | mean_of_columns(
        dataset, ["cue_gap_on_answer", "answer_gap_on_answer"]
    )


def _failure(number: int, error: Exception) -> ChatResponse:
    return ChatResponse(number, None, f"{type(error).__name__}: {error}")


def _measure_rows(teacher: TransformersGenerator, rows: list[GapRow]) -> list[ChatResponse]:
    """The gaps of rows, as JSON; a batch that fails is tried again row by row."""
    try:
        with torch.no_grad():
            return _measure_batch(teacher, rows) if rows else []
    except torch.OutOfMemoryError as error:
        raise GeneratorUnavailableError(
            f"Out of memory in a batch of {len(rows)}. Lower `batch_size={teacher.batch_size}`."
        ) from error
    except Exception as error:
        if len(rows) == 1:
            return [_failure(rows[0].number, error)]
        return [response for row in rows for response in _measure_rows(teacher, [row])]


def _measure_batch(teacher: TransformersGenerator, rows: list[GapRow]) -> list[ChatResponse]:
    completions = [row.completion for row in rows]
    if None in completions:
        completions = greedy_completions(teacher, [row.prompts["none"] for row in rows])
    token_ids, answer_tokens = zip(
        *(tokenize_completion(teacher, text, row.answer) for text, row in zip(completions, rows, strict=True)),
        strict=True,
    )
    gaps: list[dict[str, float | None]] = [{} for _ in rows]
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


def _split(token_ids: tuple[list[int], ...]) -> Iterator[list[int]]:
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
    """The teacher's most likely continuations, whole or cut at its `max_new_tokens`."""
    inputs = teacher.encode(conversations)
    max_new_tokens = teacher.settings["max_new_tokens"]
    output_ids = teacher.model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=teacher.end_ids
    )
    return teacher.processing_class.batch_decode(
        output_ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True
    )


def tokenize_completion(
    teacher: TransformersGenerator, completion: str, answer: str | None
) -> tuple[list[int], list[int]]:
    """
    The token ids of a completion, and the positions among them of the tokens that have a part in the last occurrence
    of the answer. Within a longer word or number ("12" in "120") it does not occur; case matters only to a letter.

    Raises:
        `ValueError`: If the completion has no tokens.
    """
    # What the teacher has spelled is text, even if it looks like a special token
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
    Logits `(batch, completion, vocab)` that predict the tokens of completions, in the teacher's data type. Shorter
    completions are padded at their end; what stands there means nothing.
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
    # The last position predicts what comes behind the completion
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
