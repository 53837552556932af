"""The commands `trl-vicur cues generate` and `trl-vicur cues audit`."""

import json
import shlex
from collections import Counter
from pathlib import Path

from datasets import Dataset
from rich.console import Console

from ..command_parser import CommandParser
from ..data.columns import check_columns
from ..data.dataset_folder import CUE_STORE, prepare_folder, save_dataset
from ..data.layouts import parse_columns
from ..data.loading import load_rows, load_split
from ..generation import TransformersGenerator
from ..generation.response_store import read_settings
from ..hub.dataset_card import write_dataset_card
from .arguments import AuditArguments, DatasetArguments, GenerateArguments, GeneratorArguments
from .audit import audit_cues
from .audit_summary import summarize_audit
from .generate import generate_cues
from .privilege_gap import measure_privilege_gap
from .recoverability import measure_recoverability
from .regenerate import regenerate_cues
from .report import print_summary, write_html_report
from .usefulness import measure_usefulness


AUDIT_NAME = "audit.json"


def generate(arguments: list[str]) -> None:
    """Run `trl-vicur cues generate`."""
    parser = CommandParser(
        [GenerateArguments, DatasetArguments, GeneratorArguments],
        prog="trl-vicur cues generate",
        usage="--dataset DATASET --output FOLDER --model MODEL [options]",
        description="Have a vision-language model write a cue for every row of a dataset: the visible evidence that "
        "the question needs, but neither the answer nor how to find it. After an interruption, the same command "
        "continues where it stopped.",
        examples="""
            # with a local model
            trl-vicur cues generate --dataset me/geometry --output geometry-cues --model Qwen/Qwen3-VL-8B-Instruct
            # with an OpenAI-compatible endpoint (vLLM, SGLang, a hosted API); key: OPENAI_API_KEY
            trl-vicur cues generate --dataset rows.jsonl --output cues --model Qwen/Qwen3-VL-32B-Instruct \\
                --base_url http://localhost:8000/v1 --concurrency 64
            # retry the rows that failed
            trl-vicur cues generate --dataset rows.jsonl --output cues --model … --retry_failed
        """,
    )
    args, dataset_args, generator_args = parser.parse_args_and_config(arguments)
    dataset = generate_cues(
        load_questions(args.dataset, dataset_args),
        generator_args.make_generator(),
        args.output,
        prompt=generator_args.make_prompt(),
        question_column=dataset_args.question_column,
        seed=generator_args.seed,
        retry_failed=args.retry_failed,
    )
    console = Console()
    errors = Counter(error for error in dataset["cue_error"] if error is not None)
    console.print(f"{len(dataset) - errors.total():,} of {len(dataset):,} rows have a cue, in {args.output}")
    if errors:
        for error, count in errors.most_common(3):
            console.print(f"  {count:,} failed: {error}", markup=False, soft_wrap=True)
        retry = shlex.join(["trl-vicur", "cues", "generate", *arguments, "--retry_failed"])
        console.print(f"Retry only these {errors.total():,} with: {retry}", markup=False, soft_wrap=True)
    report = shlex.join(["trl-vicur", "cues", "audit", args.output, "--html", "report.html"])
    console.print(f"Next: {report}", markup=False, soft_wrap=True)


def audit(arguments: list[str]) -> None:
    """Run `trl-vicur cues audit`."""
    parser = CommandParser(
        [AuditArguments, DatasetArguments, GeneratorArguments],
        prog="trl-vicur cues audit",
        usage="DATASET [options]",
        description="Check whether the cues of a dataset are safe to train on: they must not leak the answer or the "
        "solution, and must not contain control text. With a model, also measure how recoverable and useful they are.",
        examples="""
            # audit the text, and write an HTML report with the images
            trl-vicur cues audit geometry-cues --html report.html
            # regenerate cues that are missing or not usable, then drop the rows without a usable cue
            trl-vicur cues audit geometry-cues --fix regenerate --model Qwen/Qwen3-VL-8B-Instruct
            trl-vicur cues audit geometry-cues --drop
            # can the student see what the cue says, and does it help the teacher?
            trl-vicur cues audit geometry-cues --model Qwen/Qwen3-VL-8B-Instruct --recoverability 4 --privilege_gap
        """,
    )
    parser.add_argument("dataset", help="Folder that `cues generate` wrote, or any dataset with the column `cue`.")
    args, dataset_args, generator_args, positional = parser.parse_args_and_config(arguments)
    args.check_model(generator_args)
    folder = Path(positional.dataset)
    output = find_output(folder, args)
    dataset = load_questions(positional.dataset, dataset_args)
    check_columns(dataset, cue_column="cue")
    if output is not None:
        prepare_folder(output, CUE_STORE, AUDIT_NAME)
        (output / AUDIT_NAME).touch()
    dataset = audit_and_measure(dataset, output, dataset_args.question_column, args, generator_args)

    console = Console()
    print_summary(dataset, console)
    if args.html is not None:
        write_html_report(dataset, args.html, dataset_args.question_column, answer_column=args.answer_column)
        console.print(f"The report with the images is in {args.html}", markup=False, soft_wrap=True)
    if output is not None:
        dataset = save_audit(dataset, folder, output, args.drop)
        console.print(f"{len(dataset):,} rows are in {output}", markup=False, soft_wrap=True)


def load_questions(name: str, args: DatasetArguments) -> Dataset:
    """The rows of a dataset of any layout; as they are if the column of the questions is given."""
    if args.question_column is not None:
        return load_split(name, args.config_name, args.split)
    return load_rows(name, args.config_name, args.split, columns=parse_columns(args.columns))[0]


def find_output(folder: Path, args: AuditArguments) -> Path | None:
    """
    The folder to save the audit in; `None` if the result is only the summary and the report.

    Raises:
        `ValueError`: If the command would change a dataset that it did not write.
    """
    if args.output is not None:
        return Path(args.output)
    if (folder / CUE_STORE).exists() or (folder / AUDIT_NAME).exists():
        return folder
    if args.asks_a_model or args.drop:
        raise ValueError(
            f"{str(folder)!r} was not written by this command and will not be changed. Name a folder for the result "
            "with `--output`."
        )
    return None


def audit_and_measure(
    dataset: Dataset,
    output: Path | None,
    question_column: str | None,
    args: AuditArguments,
    generator_args: GeneratorArguments,
) -> Dataset:
    """Add the columns of the audit and of each requested measure."""
    prompt, seed = generator_args.make_prompt(), generator_args.seed
    columns = {"question_column": question_column, "answer_column": args.answer_column}
    if args.fix == "regenerate":
        dataset = regenerate_cues(
            dataset,
            generator_args.make_generator(default_temperature=0.7),
            output,
            prompt=prompt,
            visible_text_column=args.visible_text_column,
            seed=seed,
            **columns,
        )
    dataset = audit_cues(dataset, visible_text_column=args.visible_text_column, **columns)
    if args.recoverability is not None:
        dataset = measure_recoverability(
            dataset,
            generator_args.make_generator(default_temperature=0.7),
            output,
            num_samples=args.recoverability,
            prompt=prompt,
            question_column=question_column,
            seed=seed,
        )
    if args.usefulness:
        dataset = measure_usefulness(dataset, generator_args.make_generator(), output, **columns)
    if args.privilege_gap:
        teacher = generator_args.make_generator()
        assert isinstance(teacher, TransformersGenerator)  # `check_model` refuses an endpoint
        dataset = measure_privilege_gap(dataset, teacher, output, args.completion_column, **columns)
    return dataset


def save_audit(dataset: Dataset, folder: Path, output: Path, drop: bool) -> Dataset:
    """
    Save the audited dataset, its summary and, if its cues were generated here, its card.

    Raises:
        `ValueError`: If no row is left.
    """
    summary = summarize_audit(dataset)
    if drop:
        dataset = dataset.filter(lambda is_usable: is_usable, input_columns="cue_usable")
        if len(dataset) == 0:
            raise ValueError("No row has a usable cue, so no row would be left.")
    dataset = save_dataset(dataset, output)
    (output / AUDIT_NAME).write_text(json.dumps(summary, indent=2) + "\n")
    if (folder / CUE_STORE).exists():
        write_dataset_card(output, read_settings(folder / CUE_STORE), dataset, summary)
    return dataset
