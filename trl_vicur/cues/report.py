"""Reports of an audited dataset: an HTML page with the images, and a table in the terminal."""

import heapq
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset
from markupsafe import Markup, escape
from rich.console import Console
from rich.table import Table

from ..data.columns import find_question_column
from ..data.messages import question_text
from ..data.rows import row_images
from ..html_page import check_page, readable, show_images, undecoded_rows, write_page
from .audit_summary import MEASURES, VERDICTS, Measure, iterate_verdicts, summarize_audit


# Limits per row of the page
MAX_REASON_LENGTH = 500
MAX_REASONS_PER_ROW = 20

# Quotations of the cue in a reason, in any quotation marks
QUOTED = re.compile(r"""(?<!\w)(?:'(.+?)'|"(.+?)"|“(.+?)”)(?!\w)""", re.DOTALL)


def write_html_report(
    dataset: Dataset,
    path: str | Path,
    question_column: str | None = None,
    cue_column: str = "cue",
    answer_column: str = "answer",
    max_rows: int = 200,
) -> None:
    """
    Write an HTML page with the result of an audit: the totals, and rows with their images, worst first.

    The page is a single self-contained file. It works without JavaScript, which is used only for filtering. Rows are
    selected by their verdicts, and only the images of the selected rows are read, one row at a time.

    Args:
        dataset ([`~datasets.Dataset`]):
            The result of [`audit_cues`].
        path (`str` or `Path`):
            The file. It is created, or replaced, only when the page is complete.
        question_column (`str`, *optional*):
            Column with the questions, strings or conversational prompts. By default `prompt` or, without one,
            `question`.
        cue_column (`str`, *optional*, defaults to `"cue"`):
            Column with the cues.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Column with the reference answers, if there is one.
        max_rows (`int`, *optional*, defaults to `200`):
            Maximum number of rows to show.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If it has no rows, lacks a column or was not audited, if `path` is a folder, or if `max_rows` is
            less than 1.
        `OSError`: If the file cannot be written.
    """
    path = check_page(path, max_rows)
    summary = summarize_audit(dataset, cue_column)
    question_column = find_question_column(dataset, question_column)
    ranked = (
        (list(VERDICTS).index(verdicts[0]), number, verdicts)
        for number, verdicts in enumerate(iterate_verdicts(dataset, cue_column))
    )
    # The worst rows, and the first among equally bad ones. Only the rows to show are kept in memory
    chosen = {number: verdicts for _, number, verdicts in heapq.nsmallest(max_rows, ranked)}

    num_shown_by_verdict = Counter(verdict for verdicts in chosen.values() for verdict in verdicts)
    write_page(
        Path(__file__).with_name("report.html.jinja"),
        path,
        summary=summary,
        verdicts=VERDICTS,
        measures=select_measures(summary),
        rows=read_rows(dataset, chosen, question_column, cue_column, answer_column),
        groups=[(name, verdict.label, num_shown_by_verdict[name]) for name, verdict in VERDICTS.items()],
        num_shown=len(chosen),
    )


def print_summary(dataset: Dataset, console: Console) -> None:
    """
    Print the totals of an audited dataset.

    Args:
        dataset ([`~datasets.Dataset`]):
            The result of [`audit_cues`].
        console ([`~rich.console.Console`]):
            The console to print to.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If it has no rows, or was not audited.
    """
    summary = summarize_audit(dataset)
    table = Table(title=f"Audit of {summary['rows']:,} cues", title_justify="left")
    table.add_column("verdict", no_wrap=True)
    table.add_column("rows", justify="right")
    table.add_column("share", justify="right")
    for name, verdict in VERDICTS.items():
        style = "bold" if name == "usable" else "dim" if summary[name] == 0 else None
        table.add_row(verdict.label, f"{summary[name]:,}", f"{summary[name] / summary['rows']:.1%}", style=style)
    console.print(table)
    measures = select_measures(summary)
    if not measures:
        return
    table = Table(title="Measured with models", title_justify="left")
    table.add_column("measure")
    table.add_column("of", no_wrap=True)
    table.add_column("mean", justify="right")
    table.add_column("rows", justify="right")
    for measure in measures:
        for column, label in measure.columns.items():
            table.add_row(measure.label, label, f"{summary[column]:.3f}", f"{summary[f'{column}_rows']:,}")
    console.print(table)


def select_measures(summary: dict[str, int | float]) -> list[Measure]:
    """Select the measures in the summary, each with only the columns that the summary has."""
    selected = [
        measure._replace(columns={column: label for column, label in measure.columns.items() if column in summary})
        for measure in MEASURES
    ]
    return [measure for measure in selected if measure.columns]


def read_rows(
    dataset: Dataset, chosen: dict[int, list[str]], question_column: str, cue_column: str, answer_column: str
) -> Iterator[dict[str, Any]]:
    """Yield the chosen rows, one at a time, in the form that the template expects."""
    columns = [question_column, cue_column, answer_column, "cue_error", "cue_reasons"]
    for (number, verdicts), row in zip(chosen.items(), undecoded_rows(dataset, chosen, columns), strict=True):
        images = row_images(row) if "images" in row or "image" in row else []
        all_reasons = row.get("cue_reasons") or []
        reasons = [readable(reason, MAX_REASON_LENGTH) for reason in all_reasons[:MAX_REASONS_PER_ROW]]
        quotes = {match[match.lastindex or 0] for reason in reasons for match in QUOTED.finditer(reason)}
        cue, answer = row[cue_column], row.get(answer_column)
        yield {
            "number": number,
            "verdicts": verdicts,
            **show_images(images),
            "question": readable(question_text(row[question_column] or "")),
            "cue": None if cue is None else mark_evidence(readable(cue), quotes),
            "error": readable(row.get("cue_error") or ""),
            "answer": None if answer is None else readable(str(answer)),
            "reasons": [mark_quotes(reason) for reason in reasons],
            "num_reasons": len(all_reasons),
        }


def mark_quotes(reason: str) -> Markup:
    """Mark the quotations in a reason."""
    return mark(reason, [match.span(match.lastindex or 0) for match in QUOTED.finditer(reason)])


def mark_evidence(cue: str, quotes: set[str]) -> Markup:
    """Mark in a cue what its reasons quote, as whole words."""
    # `repr`, which reasons quote with, doubles the backslashes of LaTeX
    longest_first = sorted({quote.replace("\\\\", "\\") for quote in quotes}, key=len, reverse=True)
    pattern = "|".join(rf"(?:(?<!\w)|(?=\W)){re.escape(quote)}(?:(?!\w)|(?<=\W))" for quote in longest_first)
    return mark(cue, [match.span() for match in re.finditer(pattern, cue)] if quotes else [])


def mark(text: str, spans: list[tuple[int, int]]) -> Markup:
    """Escape the text and mark its `(start, stop)` spans."""
    markup, end = Markup(""), 0
    for start, stop in spans:
        markup += escape(text[end:start]) + Markup("<mark>{}</mark>").format(text[start:stop])
        end = stop
    return markup + escape(text[end:])
