"""Does the cue help to answer? The accuracy of a model that is told the cue, against the same model without."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from PIL import Image
from tqdm.auto import tqdm
from trl.data_utils import prepare_multimodal_messages

from ..data.columns import check_columns, check_dataset, find_image_column, find_question_column, set_column
from ..data.dataset_digest import dataset_digest
from ..data.images import read_image
from ..data.messages import question_text
from ..data.rows import row_images, shorten
from ..data.teacher_prompt import TEACHER_PROMPT_TEMPLATE, add_privilege
from ..extras import needs_extra
from ..generation import ChatRequest, Generator
from ..generation.response_store import open_store
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
    Let a model answer every question with and without the cue, and check its answers with [`is_correct`].

    A cue that does not help the teacher cannot make it a better one. The prompts are those of training: the row's own,
    and the same with the hint that only the teacher sees (ViCuR, Sec. 3.1).

    Each completion is on disk as soon as it is there: after an interruption, the same call goes on with what is left.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, a question, a cue and an answer.
        generator ([`Generator`]):
            The teacher, or another model that stands for it.
        output (`str` or `Path`, *optional*):
            Folder for the completions, in the file `usefulness.sqlite`. Without it, they are not kept.
        question_column (`str`, *optional*):
            Column with the questions, strings or conversational prompts. By default `prompt` or, if there is none,
            `question`.
        cue_column (`str`, *optional*, defaults to `"cue"`):
            Column with the cues.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the reference answers. Rows without a cue or without an answer are left out.
        teacher_prompt_template (`str`, *optional*, defaults to `"{prompt}\\n\\n[Hint]: {privilege}"`):
            How the cue is added to the last user turn.

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns `correct_with_cue` and `correct_without_cue` (`bool`).
        `None` where the row is left out or the generator failed, which a completion without an end is, too.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing, or if `output` was begun with other settings or another dataset.
        [`GeneratorUnavailableError`]: If no request can succeed.
        `OSError`: If the disk is full.
    """
    with needs_extra("cues", "Checking answers"):
        from .answers import is_correct

    check_dataset(dataset)
    check_columns(dataset, cue_column=cue_column, answer_column=answer_column)
    question_column = find_question_column(dataset, question_column)
    inputs = dataset.select_columns([question_column, find_image_column(dataset), cue_column, answer_column])
    settings = {
        **generator.settings,
        "teacher_prompt_template": teacher_prompt_template,
        "question_column": question_column,
        "cue_column": cue_column,
        "answer_column": answer_column,
        "rows": len(dataset),
        "dataset": dataset_digest(inputs),
    }
    texts = inputs.select_columns([cue_column, answer_column]).with_format(None)
    is_measured = bytearray(
        bool((cue or "").strip()) and answer is not None
        for cue, answer in zip(texts[cue_column], texts[answer_column], strict=True)
    )

    def read_prompt(number: int, with_cue: bool) -> list[dict[str, Any]]:
        row = inputs[number]
        images = [read_image(image) for image in row_images(row)]
        return make_prompt(
            row, images, question_column, row[cue_column] if with_cue else None, teacher_prompt_template
        )

    # Number 2 i is row i without the cue, number 2 i + 1 with it
    correct: list[list[bool | None]] = [[None] * len(dataset), [None] * len(dataset)]
    with open_store(output, STORE_NAME, settings) as store:

        def requests() -> Iterator[ChatRequest]:
            for number in store.pending(2 * len(dataset)):
                row, with_cue = divmod(number, 2)
                if is_measured[row]:
                    yield ChatRequest(number, partial(read_prompt, row, with_cue), seed=row)  # one seed for both

        num_done, _ = store.count()
        total = 2 * sum(is_measured)
        with tqdm(total=total, initial=num_done, desc="Answering with and without cue", unit="answer") as progress:
            for response in generator.generate(requests()):
                store.add([response], response.number // 2)
                progress.update()
        # Checked here, not when they are stored, so that better checks find the completions of earlier runs
        for number, completion, _, _ in tqdm(store, total=total, desc="Checking answers", unit="answer"):
            row, with_cue = divmod(number, 2)
            if completion is not None:
                correct[with_cue][row] = is_correct(completion, str(texts[row][answer_column]))
    for name, values in zip(("correct_without_cue", "correct_with_cue"), correct, strict=True):
        dataset = set_column(dataset, name, values, Value("bool"))
    return dataset


def summarize_usefulness(dataset: Dataset) -> dict[str, int | float]:
    """
    The accuracies, as means of `correct_with_cue` and `correct_without_cue`, over the rows that have both, and under
    the same names with `_rows` behind, the number of these; empty without any.
    """
    return mean_of_columns(dataset, ["correct_with_cue", "correct_without_cue"])


def make_prompt(
    row: dict[str, Any], images: list[Image.Image], question_column: str, privilege: str | None, template: str
) -> list[dict[str, Any]]:
    """
    The conversation that a row's question is answered in: the student's, or with the privilege the teacher's.

    Args:
        row (`dict`):
            The row; its question is a string, which becomes a user turn, or a conversational prompt.
        images (`list[PIL.Image.Image]`):
            The row's images.
        question_column (`str`):
            Column with the question.
        privilege (`str`, *optional*):
            What only the teacher sees.
        template (`str`):
            How it is added to the last user turn.

    Raises:
        `ValueError`: If the row asks nothing, or has another number of images than its prompt.
    """
    prompt = row[question_column] or ""
    if not question_text(prompt).strip():
        raise ValueError(f"`{question_column}` is {shorten(prompt)}, which asks nothing.")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return prepare_multimodal_messages(add_privilege(prompt, privilege, template), images=images)
