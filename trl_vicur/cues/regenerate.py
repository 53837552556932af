"""Generate new cues for the rows whose cue is missing or not usable."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from tqdm.auto import tqdm

from ..data.columns import set_column
from ..data.questions import QuestionRows
from ..generation import Generator
from ..generation.response_store import ResponseStore, open_store
from .audit import AuditColumns
from .generate import ask_for_cues, make_provenance
from .prompts import CUE_PROMPT, CuePrompt


logger = logging.getLogger(__name__)

STORE_NAME = "regenerated.sqlite"


class NewCue(NamedTuple):
    """The cue of one attempt (`None` if it failed) and the seed that it was sampled with."""

    text: str | None
    seed: int


def regenerate_cues(
    dataset: Dataset,
    generator: Generator,
    output: str | Path | None = None,
    prompt: CuePrompt = CUE_PROMPT,
    max_attempts: int = 3,
    question_column: str | None = None,
    answer_column: str = "answer",
    visible_text_column: str = "visible_text",
    seed: int = 0,
) -> Dataset:
    """
    Replace cues that are missing or that fail [`audit_cue`]: query a generator until a cue passes.

    After an interruption, the same call continues, as in [`generate_cues`].

    Args:
        dataset ([`~datasets.Dataset`]):
            The result of [`generate_cues`], or any dataset with images, a question and the column `cue`.
        generator ([`Generator`]):
            A generator that samples, or one that did not write the cues: the same greedy generator would repeat them.
        output (`str` or `Path`, *optional*):
            Folder for resuming after an interruption. By default a temporary one.
        prompt ([`CuePrompt`], *optional*, defaults to `CUE_PROMPT`):
            The prompt that asks for a cue.
        max_attempts (`int`, *optional*, defaults to `3`):
            Maximum number of attempts per row.
        question_column, answer_column, visible_text_column (`str`, *optional*):
            As in [`audit_cues`].
        seed (`int`, *optional*, defaults to `0`):
            Base seed for sampling; every attempt at every row has its own seed.

    Returns:
        [`~datasets.Dataset`]: The same rows in the same order. Where an attempt passed, `cue` is the new one;
        elsewhere nothing changes.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing, if `max_attempts` is less than 1, or if `output` was begun with
            different settings.
        [`GeneratorUnavailableError`]: If no request can succeed.
    """
    rows = QuestionRows(dataset, question_column, cue_column="cue")
    if max_attempts < 1:
        raise ValueError(f"`max_attempts` must be at least 1, got {max_attempts}.")
    settings = {**generator.settings, **prompt.settings, "seed": seed, "dataset": rows.settings()["dataset"]}
    columns = AuditColumns(rows.question_column, "cue", answer_column, visible_text_column)
    with open_store(output, STORE_NAME, settings) as store:
        attempt = partial(attempt_cues, generator, store, rows, prompt, seed)
        return replace_cues(dataset, find_usable_cues(dataset, columns, attempt, max_attempts), settings)


def find_usable_cues(
    dataset: Dataset,
    columns: AuditColumns,
    attempt: Callable[[int, list[int]], list[NewCue]],
    max_attempts: int,
) -> dict[int, NewCue]:
    """Retry each row whose cue fails the audit until a new cue passes; returns the cues that pass, by row."""
    texts = dataset.select_columns([name for name in columns if name in dataset.column_names]).with_format(None)

    def is_usable(number: int, cue: str | None) -> bool:
        return columns.audit({**texts[number], "cue": cue})["cue_usable"]

    with tqdm(texts["cue"], desc="Looking for cues to replace", unit="row") as cues:
        rejected = [number for number, cue in enumerate(cues) if not is_usable(number, cue)]
    usable: dict[int, NewCue] = {}
    for number_of_attempt in range(max_attempts):
        new_cues = zip(rejected, attempt(number_of_attempt, rejected), strict=True)
        usable |= {number: new_cue for number, new_cue in new_cues if is_usable(number, new_cue.text)}
        rejected = [number for number in rejected if number not in usable]
    if rejected:
        logger.warning(f"{len(rejected)} rows have no usable cue after {max_attempts} attempts.")
    return usable


def attempt_cues(
    generator: Generator,
    store: ResponseStore,
    rows: QuestionRows,
    prompt: CuePrompt,
    seed: int,
    number_of_attempt: int,
    numbers: list[int],
) -> list[NewCue]:
    """Generate a new cue for each of the rows; the text is `None` if the request failed."""
    # The store's key for attempt n at a row is the row's number plus n times the number of rows
    filed = [number + number_of_attempt * len(rows) for number in numbers]
    description = f"Generating cues again, attempt {number_of_attempt + 1}"
    ask_for_cues(generator, store, filed, rows, prompt, seed, description, row_of=lambda number: number % len(rows))
    texts = {number: text for number, text, _, _ in store}
    return [NewCue(texts[number], seed + number) for number in filed]


def replace_cues(dataset: Dataset, new_cues: dict[int, NewCue], settings: dict[str, Any]) -> Dataset:
    """Replace the cues, errors and provenance of the given rows."""
    replacements: dict[str, dict[int, Any]] = {
        "cue": {number: cue.text for number, cue in new_cues.items()},
        "cue_error": dict.fromkeys(new_cues),
        "cue_provenance": {number: make_provenance(settings, cue.seed) for number, cue in new_cues.items()},
    }
    for column, values in replacements.items():
        if column in dataset.column_names:
            feature = dataset.features[column]
            column_values = [values.get(number, old) for number, old in enumerate(dataset.with_format(None)[column])]
            dataset = set_column(dataset, column, column_values, feature)
    return dataset
