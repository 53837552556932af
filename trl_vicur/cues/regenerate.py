"""New cues for the rows whose cue must not be used."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from ..data.columns import check_columns, check_dataset, find_image_column, find_question_column, set_column
from ..data.dataset_digest import dataset_digest
from ..data.messages import question_text
from ..generation import ChatRequest, Generator
from ..generation.response_store import open_store
from .audit import audit_row
from .generate import check_cue, make_provenance, read_messages
from .prompts import CUE_PROMPT, CuePrompt


logger = logging.getLogger(__name__)

STORE_NAME = "regenerated.sqlite"


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
    Ask a generator again for the cues that are missing or that [`audit_cue`] does not pass, until one passes.

    Can be interrupted and called again like [`generate_cues`].

    Args:
        dataset ([`~datasets.Dataset`]):
            The result of [`generate_cues`], or any dataset with images, a question and the column `cue`.
        generator ([`Generator`]):
            A generator that samples, or another one than made the cues: the same would say the same.
        output (`str` or `Path`, *optional*):
            Folder for what is needed to go on after an interruption. Without it, a temporary one.
        prompt ([`CuePrompt`], *optional*, defaults to `CUE_PROMPT`):
            What the generator is asked.
        max_attempts (`int`, *optional*, defaults to `3`):
            How often it is asked for each row.
        question_column, answer_column, visible_text_column (`str`, *optional*):
            As in [`audit_cues`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling; every attempt at every row has its own.

    Returns:
        [`~datasets.Dataset`]: The same rows in the same order. Where an attempt passed, `cue` is the new one; where
        none did, everything is as it was.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing, if `max_attempts` is less than 1, or if `output` holds what was begun
            with other settings.
        [`GeneratorUnavailableError`]: If no request can succeed.
    """
    check_dataset(dataset)
    check_columns(dataset, cue_column="cue")
    if max_attempts < 1:
        raise ValueError(f"`max_attempts` must be at least 1, got {max_attempts}.")
    question_column = find_question_column(dataset, question_column)
    inputs = dataset.select_columns([question_column, find_image_column(dataset)])
    columns = [
        name for name in (question_column, "cue", answer_column, visible_text_column) if name in dataset.features
    ]
    texts = dataset.select_columns(columns).with_format(None)

    def is_usable(number: int, cue: str | None) -> bool:
        row = texts[number]
        question = question_text(row[question_column] or "")
        return audit_row(cue, question, row.get(answer_column), row.get(visible_text_column) or ())["cue_usable"]

    settings = {
        **generator.settings,
        "prompt_version": prompt.version,
        "prompt": [prompt.system, prompt.user],
        "seed": seed,
        "dataset": dataset_digest(dataset.select_columns([*inputs.column_names, "cue"])),
    }
    rejected = [
        number
        for number, row in enumerate(tqdm(texts, desc="Looking for cues to make again", unit="row"))
        if not is_usable(number, row["cue"])
    ]
    new_cues = {}
    with open_store(output, STORE_NAME, settings) as store:
        # The n-th attempt at a row is filed under its number plus n times the number of rows
        done = {number: text for number, text, _, _ in store}
        for attempt in range(max_attempts):
            filed = {number: number + attempt * len(dataset) for number in rejected}
            pending = [number for number in rejected if filed[number] not in done]
            requests = (
                ChatRequest(
                    filed[number],
                    partial(read_messages, inputs, number, question_column, prompt),
                    seed + filed[number],
                )
                for number in pending
            )
            description = f"Generating cues again, attempt {attempt + 1}"
            for response in tqdm(generator.generate(requests), total=len(pending), desc=description, unit="row"):
                response = check_cue(response)
                store.add([response], seed + response.number)
                done[response.number] = response.text
            passed = [number for number in rejected if is_usable(number, done[filed[number]])]
            new_cues |= {number: (done[filed[number]], seed + filed[number]) for number in passed}
            rejected = [number for number in rejected if number not in new_cues]
    if rejected:
        logger.warning(f"{len(rejected)} rows have no usable cue after {max_attempts} attempts.")
    return replace_cues(dataset, new_cues, settings)


def replace_cues(dataset: Dataset, new_cues: dict[int, tuple[str, int]], settings: dict[str, Any]) -> Dataset:
    """The dataset with new cues in the given rows, and what they were made with: `settings` and a seed each."""
    replacements = {
        "cue": {number: cue for number, (cue, _) in new_cues.items()},
        "cue_error": dict.fromkeys(new_cues),
        "cue_provenance": {number: make_provenance(settings, seed) for number, (_, seed) in new_cues.items()},
    }
    for column, values in replacements.items():
        if column in dataset.column_names:
            feature = dataset.features[column]
            column_values = [values.get(number, old) for number, old in enumerate(dataset.with_format(None)[column])]
            dataset = set_column(dataset, column, column_values, feature)
    return dataset
