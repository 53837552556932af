"""Cues for every row of a dataset, from any vision-language model."""

import logging
import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, List, Value
from tqdm.auto import tqdm

from ..data.columns import check_dataset, find_image_column, find_question_column
from ..data.dataset_digest import dataset_digest
from ..data.dataset_folder import CUE_STORE, prepare_folder, save_dataset
from ..data.full_disk import explain_full_disk
from ..data.images import read_image
from ..data.messages import check_messages, check_placeholders, question_text
from ..data.rows import row_images, shorten
from ..generation import ChatRequest, ChatResponse, Generator
from ..generation.response_store import ResponseStore
from ..hub.dataset_card import write_dataset_card
from .prompts import CUE_PROMPT, CuePrompt
from .text_audit.control_text import CONTROL_TOKEN
from .text_audit.folding import fold_text


logger = logging.getLogger(__name__)

# Columns that are added to a dataset
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

# Reasoning models think in their text before they reply. What they think is not the cue.
THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
# How the models of the field say that they will not
REFUSAL = re.compile(
    r"\A\W*(?:(?:i['’]m|i am|we are|we['’]re)\s+(?:very\s+|really\s+)?(?:sorry|afraid|unable|not able)\b"
    r"|(?:sorry|apologies|my apologies|unfortunately)\b"
    r"|i\s+(?:must\s+|have to\s+)?(?:can\s?not|can['’]?t|could\s?n[o'’]t|won['’]?t|will not|decline|refuse)\b"
    r"|i\s+(?:do not|don['’]?t)\s+(?:see|have)\s+(?:an?|any|the|access)\b"
    r"|as an ai\b|(?:there is )?no image (?:is|was|has been|provided|attached)\b|cannot (?:assist|help|comply))",
    re.IGNORECASE,
)
HTML = re.compile(r"\A\s*(?:<!doctype html|<html\b|<head\b|<body\b)", re.IGNORECASE)


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
    Let a model describe, for every row, the visible evidence that its question needs (ViCuR, Sec. 3.1).

    The generator sees the images and the question, never another column. Each cue is on disk as soon as it is there:
    after an interruption of any kind, the same call goes on with the rows that are left. A row that fails is recorded
    with its error and does not stop the others.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, and a question.
        generator ([`Generator`]):
            A [`TransformersGenerator`] or an [`OpenAIGenerator`].
        output (`str` or `Path`, *optional*):
            Folder for the result and for what is needed to go on after an interruption. Without it, a temporary one.
        prompt ([`CuePrompt`], *optional*, defaults to `CUE_PROMPT`):
            What the generator is asked.
        question_column (`str`, *optional*):
            Column with the questions: strings, or conversational prompts, of which the user turns are read. By
            default `prompt` or, if there is none, `question`.
        seed (`int`, *optional*, defaults to `0`):
            Row `i` is sampled with the seed `seed + i`.
        retry_failed (`bool`, *optional*, defaults to `False`):
            Whether rows that failed in an earlier call are tried again.

    Returns:
        [`~datasets.Dataset`]: The same rows in the same order, loaded from `output`, with the columns `cue` (`None`
        where it failed), `cue_error` (`None` where it did not) and `cue_provenance`; and with a conversational
        `prompt` made from the question, if there was none.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If it lacks a column or already has one that would be added, if `output` holds files of somebody
            else, or if it was begun with other settings or another dataset.
        [`GeneratorUnavailableError`]: If no request can succeed.
        `OSError`: If the disk is full.
    """
    check_dataset(dataset)
    question_column = find_question_column(dataset, question_column)
    image_column = find_image_column(dataset)
    if added := [name for name in CUE_SCHEMA.names if name in dataset.column_names]:
        raise ValueError(f"The dataset already has the columns {added}. Remove or rename them to get new ones.")
    output = Path(tempfile.mkdtemp(prefix="trl_vicur_cues_") if output is None else output)
    prepare_folder(output, CUE_STORE)
    inputs = dataset.select_columns([question_column, image_column])
    check_image_files(inputs, image_column)
    settings = {
        **generator.settings,
        "prompt_version": prompt.version,
        "prompt": [prompt.system, prompt.user],
        "seed": seed,
        "question_column": question_column,
        "rows": len(dataset),
        "dataset": dataset_digest(inputs),
    }
    with ResponseStore(output / CUE_STORE, settings) as store:
        num_done, num_failed = store.count()
        if retry_failed:
            num_done, num_failed = num_done - num_failed, 0
        requests = (
            ChatRequest(number, partial(read_messages, inputs, number, question_column, prompt), seed + number)
            for number in store.pending(len(dataset), retry_failed)
        )
        with tqdm(total=len(dataset), initial=num_done, desc="Generating cues", unit="row") as progress:
            for response in generator.generate(requests):
                response = check_cue(response)
                store.add([response], seed + response.number)
                num_failed += response.error is not None
                progress.set_postfix(failed=num_failed, refresh=False)
                progress.update()
        dataset = write_dataset(dataset, store, question_column, output, settings)
    if num_failed:
        logger.warning(
            f"{num_failed} of {len(dataset)} rows have no cue; `cue_error` says why. The same call with "
            "`retry_failed=True` tries only those again."
        )
    return dataset


def check_image_files(inputs: Dataset, image_column: str) -> None:
    """
    Images that are files go into the output; a missing one would be found out only there, after all the work.

    Raises:
        `ValueError`: If a file is missing; names the row.
    """
    feature = inputs.features[image_column]
    is_list = isinstance(feature, List)
    if not isinstance(feature.feature if is_list else feature, Image):
        return
    # In Arrow's own terms, because Python's would read the bytes of all images
    num_checked = 0
    for batch in inputs.select_columns([image_column]).with_format("arrow").iter(batch_size=1000):
        images = batch[image_column].combine_chunks()
        numbers = pa.array(range(num_checked, num_checked + len(batch)))
        if is_list:
            numbers, images = numbers.take(pc.list_parent_indices(images)), pc.list_flatten(images)
        is_file = pc.is_null(pc.struct_field(images, "bytes"))
        paths = pc.struct_field(images, "path").filter(is_file)
        for number, path in zip(numbers.filter(is_file).to_pylist(), paths.to_pylist(), strict=True):
            if path is not None and "://" not in path and not Path(path).exists():
                raise ValueError(f"Row {number}: there is no image file {path!r}. Put it there or remove the row.")
        num_checked += len(batch)


def read_messages(inputs: Dataset, number: int, question_column: str, prompt: CuePrompt) -> list[dict[str, Any]]:
    """
    The conversation that asks for a row's cue.

    Raises:
        `ValueError`: If the row has no image or no question, or a control token in its question.
    """
    row = inputs[number]
    if isinstance(row[question_column], list):
        check_messages(row[question_column])
    question = question_text(row[question_column] or "")
    if not question.strip():
        raise ValueError(f"`{question_column}` is {shorten(row[question_column])}, which asks nothing.")
    check_placeholders(question_column, question)
    if found := CONTROL_TOKEN.search(fold_text(question)):
        raise ValueError(f"The question holds the control token {found.group()!r}: {shorten(question)}.")
    images = [read_image(image) for image in row_images(row)]
    if not images:
        raise ValueError("The row has no image.")
    return prompt.messages(question, images)


def check_cue(response: ChatResponse) -> ChatResponse:
    """The response with the cue in its text, or with an error where the text is none."""
    if response.error is not None:
        return response
    text = THINKING.sub("", response.text).strip()
    if not text:
        error = "The generator's text is empty."
    elif text.startswith("<think>"):
        error = f"The generator did not finish thinking: {shorten(text)}."
    elif HTML.match(text):
        error = f"The generator's text is HTML: {shorten(text)}."
    elif REFUSAL.match(text):
        error = f"The generator refused: {shorten(text)}."
    elif not re.search(r"\w", text):
        error = f"The generator's text has no word: {shorten(text)}."
    else:
        return ChatResponse(response.number, text)
    return ChatResponse(response.number, None, error)


def make_provenance(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Where a cue comes from."""
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
        for questions in dataset.select_columns([question_column]).with_format(None).iter(batch_size=1000):
            rows = []
            for question, (_, text, error, seed) in zip(questions[question_column], responses, strict=False):
                row = {"cue": text, "cue_error": error, "cue_provenance": make_provenance(settings, seed)}
                if needs_prompt:
                    row["prompt"] = [{"role": "user", "content": question}]
                rows.append(row)
            yield pa.RecordBatch.from_pylist(rows, schema)

    dataset = save_dataset(dataset, output, batches(), schema)
    with explain_full_disk(output):
        write_dataset_card(output, settings, dataset)
    return dataset
