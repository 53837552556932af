"""Does the cue help to answer? Compares a model's accuracy with the cue and without it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from tqdm.auto import tqdm

from ..data.columns import set_columns
from ..data.questions import QuestionRows
from ..data.teacher_prompt import TEACHER_PROMPT_TEMPLATE, add_privilege
from ..generation import Generator
from ..generation.collect import ask
from ..generation.response_store import ResponseStore, open_store
from .audit_summary import mean_of_columns


STORE_NAME = "usefulness.sqlite"


def measure_usefulness(
    dataset: Dataset,
    generator: Generator,
    output: str | Path | None = None,
    question_column: str | None = None,
    cue_column: str = "cue",
    answer_column: str = "answer",
    teacher_prompt_template: str = TEACHER_PROMPT_TEMPLATE,
) -> Dataset:
    """
    Have a model answer every question with and without the cue, and check its answers with [`is_correct`].

    A cue that does not help this model to answer cannot make it a better teacher. The prompts are the same as in
    training: the row's own, and the same with the hint that only the teacher sees (ViCuR, Sec. 3.1).

    Each completion is saved as soon as it arrives: after an interruption, the same call continues.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, a question, a cue and an answer.
        generator ([`Generator`]):
            The teacher, or a substitute for it.
        output (`str` or `Path`, *optional*):
            Folder for the completions, in the file `usefulness.sqlite`. Without it, they are not saved.
        question_column, cue_column, answer_column (`str`, *optional*):
            As in [`audit_cues`]. Rows without a cue or without an answer are skipped.
        teacher_prompt_template (`str`, *optional*, defaults to `"{prompt}\\n\\n[Hint]: {privilege}"`):
            How the cue is added to the last user turn.

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns `correct_with_cue` and `correct_without_cue` (`bool`).
        `None` where the row is skipped or the generator failed; an unfinished completion also counts as a failure.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing, or if `output` was begun with different settings or a different dataset.
        [`GeneratorUnavailableError`]: If no request can succeed.
        `OSError`: If the disk is full.
    """
    from .answers import is_correct  # needs the extra `cues`; fail before querying the model

    rows = QuestionRows(dataset, question_column, cue_column=cue_column, answer_column=answer_column)
    cues, answers = rows.values(cue_column), rows.values(answer_column)
    settings = {**generator.settings, "teacher_prompt_template": teacher_prompt_template, **rows.settings()}

    def messages(number: int) -> list[dict[str, Any]]:
        row, with_cue = divmod(number, 2)
        return add_privilege(rows.conversation(row), cues[row] if with_cue else None, teacher_prompt_template)

    # Number 2 i is row i without the cue, number 2 i + 1 with it; both have the same seed
    numbers = [2 * row + i for row in rows.with_text(cue_column) if answers[row] is not None for i in range(2)]
    with open_store(output, STORE_NAME, settings) as store:
        description = "Answering with and without cue"
        ask(generator, store, numbers, messages, description, "answer", seed=lambda number: number // 2)
        columns = check_answers(store, answers, is_correct, len(numbers))
    return set_columns(dataset, columns, Value("bool"))


def summarize_usefulness(dataset: Dataset) -> dict[str, int | float]:
    """
    The accuracies, which are the means of `correct_with_cue` and `correct_without_cue` over the rows that have both,
    and the number of these rows under the same names with the suffix `_rows`; empty if no row has both.
    """
    return mean_of_columns(dataset, ["correct_with_cue", "correct_without_cue"])


def check_answers(
    store: ResponseStore, answers: list[Any], is_correct: Callable[[str, str], bool], total: int
) -> dict[str, list[bool | None]]:
    """Check the stored completions. Verdicts are not stored, so an improved check also applies to earlier runs."""
    correct: list[list[bool | None]] = [[None] * len(answers), [None] * len(answers)]
    for number, completion, _, _ in tqdm(store, total=total, desc="Checking answers", unit="answer"):
        row, with_cue = divmod(number, 2)
        if completion is not None:
            correct[with_cue][row] = is_correct(completion, str(answers[row]))
    return dict(zip(("correct_without_cue", "correct_with_cue"), correct, strict=True))
