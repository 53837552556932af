"""The totals of an audited dataset: the number of cues with each verdict, and the means of each measure."""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset

from ..data.columns import check_columns, check_dataset, iterate_tables


class Verdict(NamedTuple):
    """A verdict on a row, as a label and as a sentence."""

    label: str
    meaning: str


class Measure(NamedTuple):
    """A measure that needs a model: one column, or two to compare, each with its label."""

    label: str
    meaning: str
    columns: dict[str, str]


# Worst first, the order of the report. A row gets all that apply, and always either "unusable" or "usable".
VERDICTS = {
    "control_text": Verdict("Control text", "The cue contains control tokens, or text that steers a model."),
    "answer_leak": Verdict("Answer leak", "The cue states the answer, and nothing suggests that the image shows it."),
    "reasoning_leak": Verdict("Reasoning leak", "The cue contains part of the solution."),
    "failed": Verdict("Failed", "The generator returned no cue."),
    "unusable": Verdict("Not usable", "For one of the reasons above."),
    "possible_leak": Verdict("Possible leak", "The cue states the answer, but the image may show it."),
    "usable": Verdict("Usable", "No leak, no control text."),
}
VERDICT_COLUMNS = ("cue_answer_leak", "cue_reasoning_leak", "cue_control_text", "cue_usable")

# Means of a pair are taken over the same rows
MEASURES = (
    Measure(
        "Agreement",
        "How much the cue agrees with cues that a model wrote from image and question alone.",
        {"cue_agreement": "cue"},
    ),
    Measure(
        "Entropy",
        "Of those cues, in nats: an estimate of H(S | X), what image and question leave open about the cue.",
        {"cue_entropy": "cue"},
    ),
    Measure(
        "Privilege gap",
        "Mean KL divergence per token, in nats, between the teacher with and without this privilege. It estimates "
        "I(Y; S | X), what the teacher knows and the student cannot see: a privilege with a smaller gap is better, "
        "because more of what it teaches is within the student's reach.",
        {"cue_gap": "cue", "answer_gap": "answer"},
    ),
    Measure(
        "Gap on answer tokens",
        "The same, over the tokens of the answer only.",
        {"cue_gap_on_answer": "cue", "answer_gap_on_answer": "answer"},
    ),
    Measure(
        "Teacher accuracy",
        "Share of correct answers.",
        {"correct_with_cue": "with cue", "correct_without_cue": "without cue"},
    ),
)


def summarize_audit(dataset: Dataset, cue_column: str = "cue") -> dict[str, int | float]:
    """
    The totals of an audited dataset. Reads columns in batches, and no images.

    Args:
        dataset ([`~datasets.Dataset`]):
            The result of [`audit_cues`], with or without the columns of [`measure_recoverability`],
            [`measure_privilege_gap`] and [`measure_usefulness`].
        cue_column (`str`, *optional*, defaults to `"cue"`):
            Column with the cues.

    Returns:
        `dict[str, int | float]`: The number of `rows`, and of rows with each verdict: `control_text`, `answer_leak`,
        `reasoning_leak`, `failed` (no cue), `unusable`, `possible_leak` and `usable`; a row can have several. Then,
        for each measure in the dataset, the mean of each column in `MEASURES` under the column's name, and the number
        of rows that it is taken over, under the same name with the suffix `_rows`.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If it has no rows, or was not audited.
    """
    counts = Counter(verdict for verdicts in iterate_verdicts(dataset, cue_column) for verdict in verdicts)
    summary: dict[str, int | float] = {"rows": len(dataset), **{verdict: counts[verdict] for verdict in VERDICTS}}
    for measure in MEASURES:
        columns = [column for column in measure.columns if column in dataset.column_names]
        means = mean_of_columns(dataset, columns)
        if not means:  # no row has both, for example because no row has an answer
            for column in columns:
                means |= mean_of_columns(dataset, [column])
        summary |= means
    return summary


def iterate_verdicts(dataset: Dataset, cue_column: str = "cue") -> Iterator[list[str]]:
    """
    The verdicts of each row, worst first. Reads no images.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If it has no rows, or was not audited.
    """
    check_dataset(dataset)
    check_columns(dataset, cue_column=cue_column)
    if missing := [column for column in VERDICT_COLUMNS if column not in dataset.column_names]:
        raise ValueError(f"The dataset was not audited: it has no column {missing}. Call `audit_cues` first.")
    for table in iterate_tables(dataset, [cue_column, *VERDICT_COLUMNS]):
        for row in table.to_pylist():
            yield find_verdicts(row, row[cue_column])


def find_verdicts(row: dict[str, Any], cue: str | None) -> list[str]:
    """The verdicts of a row with the columns `VERDICT_COLUMNS`, worst first."""
    applies = {
        "control_text": row["cue_control_text"],
        "answer_leak": row["cue_answer_leak"] == "leak",
        "reasoning_leak": row["cue_reasoning_leak"],
        "failed": cue is None,
        "unusable": not row["cue_usable"],
        "possible_leak": row["cue_answer_leak"] == "possible",
        "usable": row["cue_usable"],
    }
    return [verdict for verdict in VERDICTS if applies[verdict]]


def mean_of_columns(dataset: Dataset, columns: list[str]) -> dict[str, int | float]:
    """Means of the columns over the rows that have all values, and the number of these rows; may be empty."""
    if not columns:
        return {}
    sums, num_rows = np.zeros(len(columns)), 0
    for table in iterate_tables(dataset, columns):
        # A missing value becomes NaN
        values = np.stack([table[column].cast("float64").to_numpy() for column in columns], axis=1)
        values = values[~np.isnan(values).any(axis=1)]
        sums += values.sum(axis=0)
        num_rows += len(values)
    if num_rows == 0:
        return {}
    means = dict(zip(columns, (sums / num_rows).tolist(), strict=True))
    return means | {f"{column}_rows": num_rows for column in columns}
