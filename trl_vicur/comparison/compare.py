"""Have several models answer the same questions, and check their answers against the reference."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Value

from ..data.columns import set_column
from ..data.questions import QuestionRows
from ..generation import Generator
from ..generation.collect import ask
from ..generation.response_store import ResponseStore, open_store


class CheckedAnswer(NamedTuple):
    """A model's completion, or the error if it failed, and whether its answer is correct."""

    completion: str | None
    error: str | None
    is_correct: bool


def compare_models(
    dataset: Dataset,
    models: Mapping[str, Callable[[], Generator]],
    output: str | Path | None = None,
    question_column: str | None = None,
    answer_column: str = "answer",
    seed: int = 0,
) -> Dataset:
    """
    Have several models answer the same questions, and check their answers with [`~trl_vicur.cues.answers.is_correct`].

    Each completion is saved as soon as it arrives: after an interruption, the same call continues.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, a question and an answer. Rows without an answer are skipped.
        models (`dict[str, Callable[[], Generator]]`):
            For each name (letters, digits, `_`, `.` and `-`), a function that loads the model. Only one model is in
            memory at a time.
        output (`str` or `Path`, *optional*):
            Folder for the completions, in one file `<name>.sqlite` per model. Without it, they are not saved.
        question_column (`str`, *optional*):
            Column with the questions, strings or conversational prompts. By default `prompt` or, without one,
            `question`.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the reference answers.
        seed (`int`, *optional*, defaults to `0`):
            Seed for models that sample; row `i` has `seed + i`.

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns `completions`, `completion_errors` and `correct`, each a
            `dict` by model name. A completion that failed, or that does not end within `max_new_tokens`, is `None`,
            has an error and is not correct. Where there is no reference answer, all three are `None`.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing or no row has an answer, if there are fewer than two models or a name is
            invalid, or if `output` was begun with different settings or a different dataset.
        [`GeneratorUnavailableError`]: If no request can succeed.
        `OSError`: If the disk is full.
    """
    from ..cues.answers import is_correct  # needs the extra `cues`; fail before querying a model

    check_names(models)
    rows = QuestionRows(dataset, question_column, answer_column=answer_column)
    asked = rows.with_text(answer_column)
    if not asked:
        raise ValueError(f"No row has an answer in {answer_column!r}, so no model can be right.")
    # Answers are not in the settings: correcting one must not make the models answer again
    settings = {"seed": seed, **QuestionRows(dataset, question_column).settings()}
    answers = rows.values(answer_column)
    checked: dict[str, dict[int, CheckedAnswer]] = {}
    for name, load in models.items():
        generator = load()
        with open_store(output, f"{name}.sqlite", {**generator.settings, **settings}) as store:
            ask(generator, store, asked, rows.conversation, f"{name} answers", "answer", lambda number: seed + number)
            checked[name] = check_answers(store, answers, is_correct)
        del generator  # before the next one is loaded
    return add_results(dataset, asked, checked)


def check_names(models: Mapping[str, Any]) -> None:
    """
    Raises:
        `ValueError`: If there are fewer than two models, or if one cannot name a file.
    """
    if len(models) < 2:
        raise ValueError(f"There must be at least two models to compare, got {list(models)}.")
    for name in models:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"{name!r} cannot be a model's name: use letters, digits, `_`, `.` and `-`.")


def check_answers(
    store: ResponseStore, answers: list[Any], is_correct: Callable[[str, str], bool]
) -> dict[int, CheckedAnswer]:
    """Check the stored completions. Verdicts are not stored, so an improved check also applies to earlier runs."""
    checked = {}
    for number, completion, error, _ in store:
        is_right = completion is not None and is_correct(completion, str(answers[number]))
        checked[number] = CheckedAnswer(completion, error, is_right)
    return checked


def add_results(dataset: Dataset, asked: list[int], checked: dict[str, dict[int, CheckedAnswer]]) -> Dataset:
    """Add the models' completions, errors and verdicts to the dataset, as columns of dicts by model name."""
    columns: dict[str, tuple[Value, Callable[[CheckedAnswer], Any]]] = {
        "completions": (Value("string"), lambda answer: answer.completion),
        "completion_errors": (Value("string"), lambda answer: answer.error),
        "correct": (Value("bool"), lambda answer: answer.is_correct),
    }
    for column, (feature, read) in columns.items():
        values: list[dict[str, Any] | None] = [None] * len(dataset)
        for number in asked:
            values[number] = {name: read(answers[number]) for name, answers in checked.items()}
        dataset = set_column(dataset, column, values, dict.fromkeys(checked, feature))
    return dataset
