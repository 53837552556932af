"""Text audit of every cue in a dataset: may it be used as recoverable privilege?"""

from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm.auto import tqdm

from ..data.columns import check_columns, check_dataset, find_question_column, iterate_rows
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


class AuditColumns(NamedTuple):
    """The columns that an audit reads; a dataset may lack the last two."""

    question: str
    cue: str
    answer: str
    visible_text: str

    def audit(self, row: dict[str, Any]) -> dict[str, Any]:
        """Audit a row; returns the values of the columns `AUDIT_FEATURES`."""
        cue, answer = row[self.cue], row.get(self.answer)
        if cue is None:
            return dict.fromkeys(AUDIT_FEATURES) | {"cue_usable": False, "cue_reasons": ["there is no cue"]}
        audit = audit_cue(
            cue,
            question_text(row[self.question] or ""),
            None if answer is None else str(answer),
            row.get(self.visible_text) or (),
        )
        return {
            "cue_answer_leak": audit.answer_leak,
            "cue_reasoning_leak": audit.reasoning_leak,
            "cue_control_text": audit.control_text,
            "cue_usable": audit.usable,
            "cue_reasons": audit.reasons,
        }


def audit_cues(
    dataset: Dataset,
    question_column: str | None = None,
    cue_column: str = "cue",
    answer_column: str = "answer",
    visible_text_column: str = "visible_text",
) -> Dataset:
    """
    Audit the text of every cue with [`audit_cue`].

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with a question and a cue.
        question_column (`str`, *optional*):
            Column with the questions, strings or conversational prompts. By default `prompt` or, without one,
            `question`.
        cue_column (`str`, *optional*, defaults to `"cue"`):
            Column with the cues.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the reference answers. Without it, or where it is `None`, answer leaks cannot be found.
        visible_text_column (`str`, *optional*, defaults to `"visible_text"`):
            Column with lists of the texts in each image (labels, ticks, captions), if there is one.

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
    columns = AuditColumns(question_column, cue_column, answer_column, visible_text_column)
    texts = iterate_rows(dataset, [name for name in columns if name in dataset.column_names])
    with tqdm(texts, total=len(dataset), desc="Auditing cues", unit="row") as progress:
        audits = [columns.audit(row) for row in progress]
    dataset = dataset.remove_columns([name for name in AUDIT_FEATURES if name in dataset.column_names])
    audited = Dataset.from_list(audits, features=AUDIT_FEATURES)
    return concatenate_datasets([dataset.with_format(None), audited], axis=1)
