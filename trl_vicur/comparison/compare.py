import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from tqdm.auto import tqdm

from ..cues.usefulness import make_prompt
from ..data.columns import check_columns, check_dataset, find_image_column, find_question_column, set_column
from ..data.dataset_digest import dataset_digest
from ..data.images import read_image
from ..data.rows import row_images
from ..extras import needs_extra
from ..generation import ChatRequest, Generator
from ..generation.response_store import open_store


def compare_models(
    dataset: Dataset,
    models: dict[str, Callable[[], Generator]],
    output: str | Path | None = None,
    question_column: str | None = None,
    answer_column: str = "answer",
    seed: int = 0,
) -> Dataset:
    """
    Let several models answer the same questions, and check their answers with [`~trl_vicur.cues.answers.is_correct`].

    Each completion is on disk as soon as it is there: after an interruption, the same call goes on with what is left.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, a question and an answer. Rows without an answer are left out.
        models (`dict[str, Callable[[], Generator]]`):
            Names, of letters, digits, `_`, `.` and `-`, and what loads the model of that name. One model is in memory
            at a time.
        output (`str` or `Path`, *optional*):
            Folder for the completions, in one file `<name>.sqlite` per model. Without it, they are not kept.
        question_column (`str`, *optional*):
            Column with the questions, strings or conversational prompts. By default `prompt` or, if there is none,
            `question`.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the reference answers.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling, where models sample; row `i` has `seed + i`.

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns `completions`, `completion_errors` and `correct`, each a
            `dict` by name. A completion that has no end at `max_new_tokens`, or that failed, is `None`, has an error
            and is not correct; where there is no answer to be compared with, all three are `None`.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing or no row has an answer, if there are fewer than two models or a name
            cannot be one, or if `output` was begun with other settings or another dataset.
        [`GeneratorUnavailableError`]: If no request can succeed.
        `OSError`: If the disk is full.
    """
    with needs_extra("cues", "Checking answers"):
        from ..cues.answers import is_correct

    check_dataset(dataset)
    check_columns(dataset, answer_column=answer_column)
    question_column = find_question_column(dataset, question_column)
    if len(models) < 2:
        raise ValueError(f"There must be at least two models to compare, got {list(models)}.")
    for name in models:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r} cannot be a model's name: use letters, digits, `_`, `.` and `-`.")
    inputs = dataset.select_columns([question_column, find_image_column(dataset)])
    answers = dataset.select_columns([answer_column]).with_format(None)[answer_column]
    asked = [number for number, answer in enumerate(answers) if answer is not None and str(answer).strip()]
    if not asked:
        raise ValueError(f"No row has an answer in {answer_column!r}, so nobody can be right.")
    fingerprint = {
        "rows": len(dataset),
        "dataset": dataset_digest(inputs),
        "question_column": question_column,
        "seed": seed,
    }

    def read_prompt(number: int) -> list[dict[str, Any]]:
        row = inputs[number]
        return make_prompt(row, [read_image(image) for image in row_images(row)], question_column, None, "")

    found: dict[str, list[dict[str, Any] | None]] = {
        column: [None] * len(dataset) for column in ("completions", "completion_errors", "correct")
    }
    for number in asked:
        for column in found:
            found[column][number] = {}
    for name, load in models.items():
        generator = load()
        with open_store(output, f"{name}.sqlite", {**generator.settings, **fingerprint}) as store:

            def requests(store=store) -> Iterator[ChatRequest]:
                pending = set(store.pending(len(dataset)))
                for number in asked:
                    if number in pending:
                        yield ChatRequest(number, partial(read_prompt, number), seed + number)

            num_done, _ = store.count()
            with tqdm(total=len(asked), initial=num_done, desc=f"{name} answers", unit="answer") as progress:
                for response in generator.generate(requests()):
                    store.add([response], seed + response.number)
                    progress.update()
            # Checked here, not when they are stored, so that better checks find the completions of earlier runs
            for number, completion, error, _ in store:
                found["completions"][number][name] = completion
                found["completion_errors"][number][name] = error
                found["correct"][number][name] = completion is not None and is_correct(
                    completion, str(answers[number])
                )
        del generator  # before the next one is loaded
    for column, values in found.items():
        feature = Value("bool" if column == "correct" else "string")
        dataset = set_column(dataset, column, values, dict.fromkeys(models, feature))
    return dataset
