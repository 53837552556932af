"""HTML page with the questions that some models answer correctly and others do not."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.columns import check_columns, check_dataset, find_question_column
from ..data.messages import question_text
from ..data.rows import row_images
from ..html_page import check_page, readable, show_images, undecoded_rows, write_page


Verdict = tuple[bool, ...]  # whether each model is right, in order


def write_html_comparison(
    dataset: Dataset,
    path: str | Path,
    question_column: str | None = None,
    cue_column: str = "cue",
    answer_column: str = "answer",
    max_rows: int = 50,
) -> None:
    """
    Write an HTML page with the result of [`compare_models`]: how many questions each model answers correctly, and the
    questions on which they disagree, with image, cue, all completions, and which models are right.

    Args:
        dataset ([`~datasets.Dataset`]):
            The result of [`compare_models`].
        path (`str` or `Path`):
            The file, which is self-contained. It is created, or replaced, only when the page is complete.
        question_column (`str`, *optional*):
            Column with the questions. By default `prompt` or, without one, `question`.
        cue_column (`str`, *optional*, defaults to `"cue"`):
            Column with the cues, if there is one.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the reference answers.
        max_rows (`int`, *optional*, defaults to `50`):
            Maximum number of questions to show per combination of models that are right.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing, if `path` is a folder, or if `max_rows` is less than 1.
        `OSError`: If the file cannot be written.
    """
    path = check_page(path, max_rows)
    check_dataset(dataset)
    check_columns(dataset, answer_column=answer_column)
    if "correct" not in dataset.column_names:
        raise ValueError("The dataset has no column 'correct': have models answer it with `compare_models`.")
    question_column = find_question_column(dataset, question_column)
    names, verdicts = verdicts_by_row(dataset)
    counts = Counter(verdicts.values())
    # The first rows of each verdict, in dataset order
    num_shown: Counter[Verdict] = Counter()
    chosen = {}
    for number, verdict in verdicts.items():
        if len(set(verdict)) > 1 and num_shown[verdict] < max_rows:
            num_shown[verdict] += 1
            chosen[number] = verdict
    ranked = sorted(counts, key=lambda verdict: (-sum(verdict), [not is_right for is_right in verdict]))
    write_page(
        Path(__file__).with_name("comparison.html.jinja"),
        path,
        names=names,
        num_rows=len(verdicts),
        num_right=[sum(verdict[index] for verdict in verdicts.values()) for index in range(len(names))],
        num_disagreements=sum(count for verdict, count in counts.items() if len(set(verdict)) > 1),
        verdicts=[(verdict, counts[verdict]) for verdict in ranked],
        groups=[(group_id(verdict), label(verdict, names), num_shown[verdict]) for verdict in ranked],
        num_shown=len(chosen),
        rows=read_rows(dataset, chosen, names, question_column, cue_column, answer_column),
    )


def verdicts_by_row(dataset: Dataset) -> tuple[list[str], dict[int, Verdict]]:
    """Return the models' names, and the verdict on each row that they answered, by row number."""
    correct = dataset.select_columns(["correct"]).with_format(None)["correct"]
    names = list(dataset.features["correct"])
    return names, {
        number: tuple(each[name] for name in names)
        for number, each in enumerate(correct)
        if each is not None and None not in each.values()
    }


def group_id(verdict: Verdict) -> str:
    """Id of the verdict's button in the page's filter."""
    return "right-" + "".join("01"[is_right] for is_right in verdict)


def label(verdict: Verdict, names: list[str]) -> str:
    """Names of the models that are right, in words."""
    right = [name for name, is_right in zip(names, verdict, strict=True) if is_right]
    return ("only " if len(right) == 1 else "") + " and ".join(right)


def read_rows(
    dataset: Dataset,
    chosen: dict[int, Verdict],
    names: list[str],
    question_column: str,
    cue_column: str,
    answer_column: str,
) -> Iterator[dict[str, Any]]:
    """Yield the chosen rows, one at a time, in the form that the template expects."""
    columns = [question_column, cue_column, answer_column, "completions", "completion_errors"]
    for (number, verdict), row in zip(chosen.items(), undecoded_rows(dataset, chosen, columns), strict=True):
        cue = row.get(cue_column)
        yield {
            "number": number,
            "group": group_id(verdict),
            **show_images(row_images(row)),
            "question": readable(question_text(row[question_column])),
            "cue": None if cue is None else readable(cue),
            "answer": readable(str(row[answer_column])),
            "completions": [
                {
                    "name": name,
                    "is_right": is_right,
                    "text": None if row["completions"][name] is None else readable(row["completions"][name].strip()),
                    "error": readable(row["completion_errors"][name] or ""),
                }
                for name, is_right in zip(names, verdict, strict=True)
            ],
        }
