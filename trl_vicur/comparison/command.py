"""The command `trl-vicur compare`."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from ..command_parser import CommandParser
from ..data.layouts import COLUMNS_HELP, parse_columns
from ..data.loading import load_rows, load_split
from ..generation import Generator, TransformersGenerator
from .compare import compare_models
from .report import Verdict, verdicts_by_row, write_html_comparison


PAGE_NAME = "comparison.html"


@dataclass
class CompareArguments:
    """Arguments of `trl-vicur compare`."""

    model: str = field(metadata={"help": "Id or folder of the base model, which the page calls `base`."})
    dataset: str = field(
        metadata={
            "help": "Test questions with `images` or `image` and answers: id on the Hub, a folder written by "
            "`save_to_disk`, or a JSON lines, CSV or Parquet file."
        }
    )
    output: str = field(
        metadata={"help": f"Folder for the page, {PAGE_NAME}, and for resuming after an interruption."}
    )
    config_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    split: str = field(default="test", metadata={"help": "Split of a dataset that has several."})
    num_rows: int | None = field(default=None, metadata={"help": "Use only this many rows, from the start."})
    question_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with questions (strings or conversational prompts). Default: `prompt`, or else `question`."
        },
    )
    columns: str | None = field(default=None, metadata={"help": COLUMNS_HELP})
    cue_column: str = field(default="cue", metadata={"help": "Column with the cues, which the page shows."})
    answer_column: str = field(default="answer", metadata={"help": "Column with the reference answers."})
    max_rows: int = field(
        default=50, metadata={"help": "Maximum number of questions to show per combination of models that are right."}
    )
    revision: str | None = field(default=None, metadata={"help": "Revision of the base model."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the models."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch."})
    max_new_tokens: int = field(
        default=2048, metadata={"help": "Maximum length of a completion, in tokens; longer ones count as wrong."}
    )
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 is greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Total probability of the tokens to sample from."})
    seed: int = field(default=0, metadata={"help": "Seed for sampling."})


def named_path(kind: str, text: str) -> tuple[str, str, str]:
    """Parse `NAME=PATH`; returns the kind, the name and the path of a student."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return kind, name, path


def compare(arguments: list[str]) -> None:
    """Run `trl-vicur compare`."""
    parser = CommandParser(
        [CompareArguments],
        prog="trl-vicur compare",
        usage="--model MODEL --adapter NAME=PATH … --dataset DATASET --output FOLDER [options]",
        description="Have a base model and its students answer test questions, and show those on which they disagree: "
        "image, cue, all completions, and who is right. After an interruption, the same command continues where it "
        "stopped.",
        examples="""
            trl-vicur compare --model Qwen/Qwen3-VL-2B-Instruct --dataset me/geometry --output comparison \\
                --adapter OPSD=me/Qwen3-VL-2B-OPSD --adapter ViCuR=me/Qwen3-VL-2B-ViCuR
        """,
    )
    helps = {
        "adapter": "Name of a student, and id or folder of its adapter for the base model. Can be repeated.",
        "student": "Name of a student that is a full model, and its id or folder. Can be repeated.",
    }
    for kind, text in helps.items():
        # One list for both, in command-line order
        parser.add_argument(
            f"--{kind}",
            action="append",
            default=[],
            dest="students",
            type=partial(named_path, kind),
            metavar="NAME=PATH",
            help=text,
        )
    args, others = parser.parse_args_and_config(arguments)
    models = loaders(args, others.students)
    dataset = load_questions(args)
    if args.num_rows is not None:
        dataset = dataset.select(range(min(args.num_rows, len(dataset))))
    columns = {"question_column": args.question_column, "answer_column": args.answer_column}
    dataset = compare_models(dataset, models, args.output, seed=args.seed, **columns)

    console = Console()
    names, verdicts = verdicts_by_row(dataset)
    print_accuracies(names, verdicts, console)
    page = Path(args.output) / PAGE_NAME
    write_html_comparison(dataset, page, cue_column=args.cue_column, max_rows=args.max_rows, **columns)
    num_disagreements = sum(len(set(verdict)) > 1 for verdict in verdicts.values())
    console.print(f"They disagree on {num_disagreements:,} questions, shown in {page}", markup=False, soft_wrap=True)


def load_questions(args: CompareArguments) -> Dataset:
    """The rows of a dataset of any layout; as they are if the columns of questions or answers are given."""
    if args.question_column is not None or args.answer_column != "answer":
        return load_split(args.dataset, args.config_name, args.split)
    return load_rows(args.dataset, args.config_name, args.split, columns=parse_columns(args.columns))[0]


def loaders(args: CompareArguments, students: list[tuple[str, str, str]]) -> dict[str, Callable[[], Generator]]:
    """
    Map each model's name to a function that loads it: the base, then the students in command-line order.

    Raises:
        `ValueError`: If two models have the same name.
    """
    names = ["base", *(name for _, name, _ in students)]
    if len(set(names)) < len(names):
        raise ValueError(f"Every model needs its own name, got {names}.")
    load = partial(
        TransformersGenerator,
        dtype=args.dtype,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
    )
    load_base = partial(load, args.model, revision=args.revision)
    models: dict[str, Callable[[], Generator]] = {"base": load_base}
    for kind, name, path in students:
        models[name] = partial(load_base, adapter=path) if kind == "adapter" else partial(load, path)
    return models


def print_accuracies(names: list[str], verdicts: dict[int, Verdict], console: Console) -> None:
    """Print how many questions each model answers correctly."""
    table = Table(title=f"{len(verdicts):,} questions", title_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("correct", justify="right")
    table.add_column("share", justify="right")
    for index, name in enumerate(names):
        num_correct = sum(verdict[index] for verdict in verdicts.values())
        table.add_row(name, f"{num_correct:,}", f"{num_correct / len(verdicts):.1%}")
    console.print(table)
