"""May the cues of a dataset be used as recoverable privilege? The text audit of every row."""

from collections.abc import Iterator
from typing import Any

from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm.auto import tqdm

from ..data.columns import check_columns, check_dataset, find_question_column
from ..data.messages import question_text
from .text_audit import audit_cue


AUDIT_FEATURES = Features(
    {
        "cue_answer_leak": Value("string"),
        "cue_reasoning_leak": Value("bool"),
        "cue_control_text": Value("bool"),
        "cue_usable": Value("bool"),
        "cue_reasons": List(Value("string")),
    }
)


def audit_cues(
    dataset: Dataset,
    question_column: str | None = None,
    cue_column: str = "cue",
    answer_column: str = "answer",
    visible_text_column: str = "visible_text",
) -> Dataset:
    """
    Audit the text of every cue; see [`audit_cue`] for what is looked for.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with a question and a cue.
        question_column (`str`, *optional*):
            Column with the questions, strings or conversational prompts. By default `prompt` or, if there is none,
            `question`.
        cue_column (`str`, *optional*, defaults to `"cue"`):
            Column with the cues.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the reference answers. Without it, or where it is `None`, there is no answer to be leaked.
        visible_text_column (`str`, *optional*, defaults to `"visible_text"`):
            Column with lists of the texts that each image carries (labels, ticks, captions), if there is one.

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns `cue_answer_leak` (`"none"`, `"possible"` or `"leak"`),
        `cue_reasoning_leak`, `cue_control_text`, `cue_usable` (`bool`) and `cue_reasons` (list of strings). A row
        without a cue is not usable.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing.
    """
    check_dataset(dataset)
    check_columns(dataset, cue_column=cue_column)
    question_column = find_question_column(dataset, question_column)
    columns = [question_column, cue_column]
    columns += [name for name in (answer_column, visible_text_column) if name in dataset.column_names]
    texts = dataset.select_columns(columns).with_format(None)

    def audits() -> Iterator[dict[str, Any]]:
        for row in tqdm(texts, desc="Auditing cues", unit="row"):
            yield audit_row(
                row[cue_column],
                question_text(row[question_column] or ""),
                row.get(answer_column),
                row.get(visible_text_column) or (),
            )

    audited = Dataset.from_list(list(audits()), features=AUDIT_FEATURES)
    dataset = dataset.remove_columns([name for name in AUDIT_FEATURES if name in dataset.column_names])
    return concatenate_datasets([dataset.with_format(None), audited], axis=1)


def audit_row(
    cue: str | None, question: str, answer: str | None = None, visible_text: list[str] | tuple[str, ...] = ()
) -> dict[str, Any]:
    """The audit of one row, as its columns."""
    if cue is None:
        return {
            "cue_answer_leak": None,
            "cue_reasoning_leak": None,
            "cue_control_text": None,
            "cue_usable": False,
            "cue_reasons": ["there is no cue"],
        }
    audit = audit_cue(cue, question, None if answer is None else str(answer), visible_text)
    return {
        "cue_answer_leak": audit.answer_leak,
        "cue_reasoning_leak": audit.reasoning_leak,
        "cue_control_text": audit.control_text,
        "cue_usable": audit.usable,
        "cue_reasons": audit.reasons,
    }
