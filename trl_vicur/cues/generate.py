"""Generate a cue for every row of a dataset with any vision-language model."""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Image, List, Value

from ..data.columns import iterate_tables
from ..data.dataset_folder import CUE_STORE, prepare_folder, save_dataset
from ..data.full_disk import explain_full_disk
from ..data.questions import QuestionRows
from ..generation import Generator
from ..generation.collect import ask
from ..generation.response_store import ResponseStore
from ..hub.dataset_card import write_dataset_card
from .cue_text import check_cue
from .prompts import CUE_PROMPT, CuePrompt, cue_messages


logger = logging.getLogger(__name__)

# The columns that `generate_cues` adds
CUE_SCHEMA = pa.schema(
    {
        "cue": pa.string(),
        "cue_error": pa.string(),
        "cue_provenance": pa.struct(
            {
                "generator": pa.string(),
                "model": pa.string(),
                "adapter": pa.string(),
                "revision": pa.string(),
                "prompt_version": pa.string(),
                "max_new_tokens": pa.int64(),
                "temperature": pa.float64(),
                "top_p": pa.float64(),
                "seed": pa.int64(),
            }
        ),
    }
)
PROMPT_TYPE = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))


def generate_cues(
    dataset: Dataset,
    generator: Generator,
    output: str | Path | None = None,
    prompt: CuePrompt = CUE_PROMPT,
    question_column: str | None = None,
    seed: int = 0,
    retry_failed: bool = False,
) -> Dataset:
    """
    Have a model describe, for every row, the visible evidence that its question needs (ViCuR, Sec. 3.1).

    The generator sees the images and the question, and no other column. Each cue is saved as soon as it arrives: after
    any interruption, the same call continues with the remaining rows. A row that fails gets its
    error recorded and does not stop the others.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, and a question.
        generator ([`Generator`]):
            A [`TransformersGenerator`] or an [`OpenAIGenerator`].
        output (`str` or `Path`, *optional*):
            Folder for the result, and for resuming after an interruption. By default a temporary one.
        prompt ([`CuePrompt`], *optional*, defaults to `CUE_PROMPT`):
            The prompt that asks for a cue.
        question_column (`str`, *optional*):
            Column with the questions: strings, or conversational prompts, whose user turns are read. By
            default `prompt` or, without one, `question`.
        seed (`int`, *optional*, defaults to `0`):
            Row `i` is sampled with the seed `seed + i`.
        retry_failed (`bool`, *optional*, defaults to `False`):
            Whether to retry rows that failed in an earlier call.

    Returns:
        [`~datasets.Dataset`]: The same rows in the same order, loaded from `output`, with the columns `cue` (`None`
        if it failed), `cue_error` (`None` if it did not) and `cue_provenance`; and with a conversational `prompt` made
        from the question, if there was none.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing or would be overwritten, if `output` contains other files, or if it was
            begun with different settings or a different dataset.
        [`GeneratorUnavailableError`]: If no request can succeed.
        `OSError`: If the disk is full.
    """
    rows = QuestionRows(dataset, question_column)
    if added := [name for name in CUE_SCHEMA.names if name in dataset.column_names]:
        raise ValueError(f"The dataset already has the columns {added}. Remove or rename them to generate new ones.")
    output = Path(tempfile.mkdtemp(prefix="trl_vicur_cues_") if output is None else output)
    prepare_folder(output, CUE_STORE)
    check_image_files(rows)
    settings = {**generator.settings, **prompt.settings, "seed": seed, **rows.settings()}
    with ResponseStore(output / CUE_STORE, settings) as store:
        numbers = range(len(rows))
        ask_for_cues(generator, store, numbers, rows, prompt, seed, "Generating cues", retry_failed=retry_failed)
        return write_dataset(dataset, store, rows.question_column, output, settings)


def ask_for_cues(
    generator: Generator,
    store: ResponseStore,
    numbers: Sequence[int],
    rows: QuestionRows,
    prompt: CuePrompt,
    seed: int,
    description: str,
    row_of: Callable[[int], int] = lambda number: number,
    unit: str = "row",
    retry_failed: bool = False,
) -> None:
    """Generate a cue for each number that is not in the store yet; `row_of` maps a number to its row."""
    ask(
        generator,
        store,
        numbers,
        lambda number: cue_messages(rows[row_of(number)], rows.question_column, prompt),
        description,
        unit,
        seed=lambda number: seed + number,
        check=check_cue,
        retry_failed=retry_failed,
    )


def check_image_files(rows: QuestionRows) -> None:
    """
    Check that image files exist. They are copied to the output at the end, so a missing one would waste all the work.

    Raises:
        `ValueError`: If a file is missing. The message names the row.
    """
    feature = rows.dataset.features[rows.image_column]
    is_list = isinstance(feature, List)
    if not isinstance(feature.feature if is_list else feature, Image):
        return
    num_checked = 0
    # Stay in Arrow: Python objects would hold copies of all image bytes
    for table in iterate_tables(rows.dataset, [rows.image_column]):
        images = table[rows.image_column].combine_chunks()
        numbers = pa.array(range(num_checked, num_checked + len(table)))
        if is_list:
            numbers, images = numbers.take(images.value_parent_indices()), images.flatten()
        fields = pa.table({"image": images}).flatten()
        is_file = fields["image.bytes"].is_null()
        paths = fields["image.path"].filter(is_file)
        for number, path in zip(numbers.filter(is_file.combine_chunks()).to_pylist(), paths.to_pylist(), strict=True):
            if path is not None and "://" not in path and not Path(path).exists():
                raise ValueError(f"Row {number}: there is no image file {path!r}. Put it there or remove the row.")
        num_checked += len(table)


def make_provenance(settings: dict[str, Any], seed: int | None) -> dict[str, Any]:
    """How a cue was generated: the settings in `cue_provenance`, and the seed."""
    return {field.name: settings.get(field.name) for field in CUE_SCHEMA.field("cue_provenance").type} | {"seed": seed}


def write_dataset(
    dataset: Dataset, store: ResponseStore, question_column: str, output: Path, settings: dict[str, Any]
) -> Dataset:
    """Write the dataset with the stored cues, and its card, to the output folder."""
    is_text = isinstance(dataset.features[question_column], Value)
    needs_prompt = is_text and (question_column == "prompt" or "prompt" not in dataset.column_names)
    schema = CUE_SCHEMA.append(pa.field("prompt", PROMPT_TYPE)) if needs_prompt else CUE_SCHEMA

    def batches() -> Iterator[pa.RecordBatch]:
        responses = iter(store)
        for table in iterate_tables(dataset, [question_column]):
            rows = []
            for question, (_, text, error, seed) in zip(table[question_column].to_pylist(), responses, strict=False):
                row = {"cue": text, "cue_error": error, "cue_provenance": make_provenance(settings, seed)}
                if needs_prompt:
                    row["prompt"] = [{"role": "user", "content": question}]
                rows.append(row)
            yield pa.RecordBatch.from_pylist(rows, schema)

    written = save_dataset(dataset, output, batches(), schema)
    with explain_full_disk(output):
        write_dataset_card(output, settings, written)
    _, num_failed = store.count()
    if num_failed:
        logger.warning(
            f"{num_failed} of {len(dataset)} rows have no cue; `cue_error` says why. Call again with "
            "`retry_failed=True` to retry only those."
        )
    return written
