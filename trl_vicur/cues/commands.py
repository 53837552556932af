"""The commands `trl-vicur cues generate` and `trl-vicur cues audit`."""

import json
import shlex
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console

from ..command_parser import CommandParser
from ..data.columns import check_columns
from ..data.dataset_folder import CUE_STORE, prepare_folder, save_dataset
from ..data.loading import load_split
from ..generation import Generator, OpenAIGenerator, TransformersGenerator
from ..generation.response_store import read_settings
from ..hub.dataset_card import write_dataset_card
from .audit import audit_cues
from .audit_summary import summarize_audit
from .generate import generate_cues
from .privilege_gap import measure_privilege_gap
from .prompts import CUE_PROMPT, CuePrompt
from .recoverability import measure_recoverability
from .regenerate import regenerate_cues
from .report import print_summary, write_html_report
from .usefulness import measure_usefulness


AUDIT_NAME = "audit.json"


@dataclass
class DatasetArguments:
    """Which dataset, and its columns."""

    config_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    split: str = field(default="train", metadata={"help": "Split, where the dataset has some."})
    question_column: str | None = field(
        default=None,
        metadata={"help": "Column with the questions, strings or conversational prompts; else `prompt`, `question`."},
    )


@dataclass
class GeneratorArguments:
    """Which model is asked, and how."""

    model: str | None = field(
        default=None,
        metadata={"help": "Name of the model at `base_url`; without that, id or folder of a model to be loaded here."},
    )
    base_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1. The key, if it wants "
            "one, is read from the environment variable OPENAI_API_KEY."
        },
    )
    concurrency: int = field(default=16, metadata={"help": "Requests under way at a time, at an endpoint."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds until a request counts as lost."})
    max_retries: int = field(default=5, metadata={"help": "Repetitions of a request that failed by the way."})
    adapter: str | None = field(default=None, metadata={"help": "PEFT adapter of a model that is loaded here."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a model that is loaded here."})
    dtype: str = field(default="auto", metadata={"help": "Data type of a model that is loaded here."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch of a model that is loaded here."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest text, in tokens."})
    temperature: float | None = field(
        default=None,
        metadata={"help": "Sampling temperature: 0 (greedy) by default, but 0.7 where several texts are wanted."},
    )
    top_p: float = field(default=1.0, metadata={"help": "Nucleus sampling."})
    seed: int = field(default=0, metadata={"help": "Seed of the sampling."})
    prompt_file: str | None = field(
        default=None, metadata={"help": "A text with `{question}` in it, to ask with instead of the built-in prompt."}
    )

    def make_prompt(self) -> CuePrompt:
        return CUE_PROMPT if self.prompt_file is None else CuePrompt.from_file(self.prompt_file)

    def make_generator(self, default_temperature: float = 0.0) -> Generator:
        if self.model is None:
            raise ValueError("`--model` is missing: the model that is to be asked.")
        sampling = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": default_temperature if self.temperature is None else self.temperature,
            "top_p": self.top_p,
        }
        if self.base_url is not None:
            return OpenAIGenerator(
                self.model,
                base_url=self.base_url,
                concurrency=self.concurrency,
                timeout=self.timeout,
                max_retries=self.max_retries,
                **sampling,
            )
        return TransformersGenerator(
            self.model,
            adapter=self.adapter,
            revision=self.revision,
            dtype=self.dtype,
            batch_size=self.batch_size,
            **sampling,
        )


@dataclass
class GenerateArguments:
    """Arguments of `trl-vicur cues generate`."""

    dataset: str = field(
        metadata={"help": "Id on the Hub, folder of `save_to_disk`, or a file of JSON lines, CSV or Parquet."}
    )
    output: str = field(metadata={"help": "Folder for the result, and for going on after an interruption."})
    retry_failed: bool = field(default=False, metadata={"help": "Try the rows again that failed in an earlier call."})


@dataclass
class AuditArguments:
    """Arguments of `trl-vicur cues audit`."""

    html: str | None = field(default=None, metadata={"help": "File for a report with the images."})
    output: str | None = field(
        default=None,
        metadata={"help": "Folder for the audited dataset; by default the one that `cues generate` made."},
    )
    answer_column: str = field(default="answer", metadata={"help": "Column with the reference answers."})
    visible_text_column: str = field(
        default="visible_text", metadata={"help": "Column with lists of the texts that stand in each image."}
    )
    drop: bool = field(default=False, metadata={"help": "Leave out the rows whose cue is not usable."})
    fix: Literal["regenerate"] | None = field(
        default=None,
        metadata={"help": "`regenerate` asks the model again for cues that are missing or not usable."},
    )
    recoverability: int | None = field(
        default=None,
        metadata={"help": "Number of cues that the model is asked for per row, to see how much they agree."},
    )
    usefulness: bool = field(
        default=False, metadata={"help": "Measure whether the model answers better with the cue."}
    )
    privilege_gap: bool = field(
        default=False,
        metadata={"help": "Measure how much more the model, as a teacher, knows with the cue, and with the answer."},
    )
    completion_column: str | None = field(
        default=None,
        metadata={"help": "Column with the completions that the privilege gap is measured on; else the model's own."},
    )


def generate(arguments: list[str]) -> None:
    """Runs `trl-vicur cues generate`."""
    parser = CommandParser(
        [GenerateArguments, DatasetArguments, GeneratorArguments],
        prog="trl-vicur cues generate",
        usage="--dataset DATASET --output FOLDER --model MODEL [options]",
        description="Let a vision-language model write a cue for every row of a dataset: what its image shows of use "
        "to the question, neither the answer nor how to get it. After an interruption, the same command goes on where "
        "it stopped.",
        examples="""
            # with a model that is loaded here
            trl-vicur cues generate --dataset me/geometry --output geometry-cues --model Qwen/Qwen3-VL-8B-Instruct
            # at an OpenAI-compatible endpoint (vLLM, SGLang, a hosted API); its key comes from OPENAI_API_KEY
            trl-vicur cues generate --dataset rows.jsonl --output cues --model Qwen/Qwen3-VL-32B-Instruct \\
                --base_url http://localhost:8000/v1 --concurrency 64
            # once more the rows that failed
            trl-vicur cues generate --dataset rows.jsonl --output cues --model … --retry_failed
        """,
    )
    args, dataset_args, generator_args = parser.parse_args_and_config(arguments)
    dataset = generate_cues(
        load_split(args.dataset, dataset_args.config_name, dataset_args.split),
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
        console.print(f"Try only these {errors.total():,} again with: {retry}", markup=False, soft_wrap=True)
    report = shlex.join(["trl-vicur", "cues", "audit", args.output, "--html", "report.html"])
    console.print(f"Next: {report}", markup=False, soft_wrap=True)


def audit(arguments: list[str]) -> None:
    """Runs `trl-vicur cues audit`."""
    parser = CommandParser(
        [AuditArguments, DatasetArguments, GeneratorArguments],
        prog="trl-vicur cues audit",
        usage="DATASET [options]",
        description="Check whether the cues of a dataset may be used: they must neither leak the answer nor the "
        "solution, nor hold control text. With a model, measure also how recoverable and useful they are.",
        examples="""
            # what the text alone tells, with the images beside it in a page for the browser
            trl-vicur cues audit geometry-cues --html report.html
            # ask again where a cue is missing or not usable, then leave out what still is not
            trl-vicur cues audit geometry-cues --fix regenerate --model Qwen/Qwen3-VL-8B-Instruct
            trl-vicur cues audit geometry-cues --drop
            # can the student see what the cue says, and does it help the teacher?
            trl-vicur cues audit geometry-cues --model Qwen/Qwen3-VL-8B-Instruct --recoverability 4 --privilege_gap
        """,
    )
    parser.add_argument("dataset", help="Folder that `cues generate` made, or any dataset with the column `cue`.")
    args, dataset_args, generator_args, positional = parser.parse_args_and_config(arguments)
    measures = args.fix or args.recoverability is not None or args.usefulness or args.privilege_gap
    if measures and generator_args.model is None:
        raise ValueError(
            "`--fix`, `--recoverability`, `--usefulness` and `--privilege_gap` ask a model: name `--model`."
        )
    if args.privilege_gap and generator_args.base_url is not None:
        raise ValueError("`--privilege_gap` needs all probabilities of a model that is loaded here, not `--base_url`.")
    folder = Path(positional.dataset)
    if args.output is not None:
        output = Path(args.output)
    elif (folder / CUE_STORE).exists() or (folder / AUDIT_NAME).exists():
        output = folder
    elif measures or args.drop:
        raise ValueError(
            f"{positional.dataset!r} was not made by this command and is not written to. Name a folder for the result "
            "with `--output`."
        )
    else:
        output = None  # only the summary and the report
    dataset = load_split(positional.dataset, dataset_args.config_name, dataset_args.split)
    check_columns(dataset, cue_column="cue")
    if output is not None:
        prepare_folder(output, CUE_STORE, AUDIT_NAME)
        (output / AUDIT_NAME).touch()
    columns = {"question_column": dataset_args.question_column, "answer_column": args.answer_column}
    sampling = {"question_column": dataset_args.question_column, "seed": generator_args.seed}

    if args.fix == "regenerate":
        dataset = regenerate_cues(
            dataset,
            generator_args.make_generator(default_temperature=0.7),
            output,
            prompt=generator_args.make_prompt(),
            answer_column=args.answer_column,
            visible_text_column=args.visible_text_column,
            **sampling,
        )
    dataset = audit_cues(dataset, visible_text_column=args.visible_text_column, **columns)
    if args.recoverability is not None:
        dataset = measure_recoverability(
            dataset,
            generator_args.make_generator(default_temperature=0.7),
            output,
            num_samples=args.recoverability,
            prompt=generator_args.make_prompt(),
            **sampling,
        )
    if args.usefulness:
        dataset = measure_usefulness(dataset, generator_args.make_generator(), output, **columns)
    if args.privilege_gap:
        dataset = measure_privilege_gap(
            dataset, generator_args.make_generator(), output, completion_column=args.completion_column, **columns
        )

    console = Console()
    print_summary(dataset, console)
    if args.html is not None:
        write_html_report(dataset, args.html, **columns)
        console.print(f"The report with the images is in {args.html}", markup=False, soft_wrap=True)
    if output is None:
        return
    summary = summarize_audit(dataset)
    if args.drop:
        dataset = dataset.filter(lambda is_usable: is_usable, input_columns="cue_usable")
        if len(dataset) == 0:
            raise ValueError("No row has a usable cue: nothing would be left.")
    dataset = save_dataset(dataset, output)
    (output / AUDIT_NAME).write_text(json.dumps(summary, indent=2) + "\n")
    if (folder / CUE_STORE).exists():
        write_dataset_card(output, read_settings(folder / CUE_STORE), dataset, summary)
    console.print(f"{len(dataset):,} rows are in {output}", markup=False, soft_wrap=True)
