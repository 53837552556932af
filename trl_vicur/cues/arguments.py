"""Arguments of the commands `trl-vicur cues generate` and `trl-vicur cues audit`."""

from dataclasses import dataclass, field
from typing import Literal

from ..data.layouts import COLUMNS_HELP
from ..generation import Generator, OpenAIGenerator, TransformersGenerator
from .prompts import CUE_PROMPT, CuePrompt


@dataclass
class DatasetArguments:
    """The dataset and its question column."""

    config_name: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the Hub."})
    split: str = field(default="train", metadata={"help": "Split of a dataset that has several."})
    question_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with questions (strings or conversational prompts). Default: `prompt`, or else `question`."
        },
    )
    columns: str | None = field(default=None, metadata={"help": COLUMNS_HELP})


@dataclass
class GeneratorArguments:
    """The model to ask, and how to sample from it."""

    model: str | None = field(
        default=None,
        metadata={"help": "Name of the model at `base_url`; without `base_url`, id or folder of a local model."},
    )
    base_url: str | None = field(
        default=None,
        metadata={
            "help": "URL of an OpenAI-compatible endpoint, e.g. http://localhost:8000/v1. Its key, if it needs "
            "one, is read from the environment variable OPENAI_API_KEY."
        },
    )
    concurrency: int = field(default=16, metadata={"help": "Concurrent requests to an endpoint."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds before a request times out."})
    max_retries: int = field(default=5, metadata={"help": "Retries of a request that failed in transit."})
    adapter: str | None = field(default=None, metadata={"help": "PEFT adapter for a local model."})
    revision: str | None = field(default=None, metadata={"help": "Revision of a local model."})
    dtype: str = field(default="auto", metadata={"help": "Data type of a local model."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch of a local model."})
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of a text, in tokens."})
    temperature: float | None = field(
        default=None,
        metadata={"help": "Sampling temperature: by default 0 (greedy), or 0.7 where samples must differ."},
    )
    top_p: float = field(default=1.0, metadata={"help": "Total probability of the tokens to sample from."})
    seed: int = field(default=0, metadata={"help": "Seed for sampling."})
    prompt_file: str | None = field(
        default=None,
        metadata={"help": "Text file with a prompt that contains `{question}`; replaces the built-in prompt."},
    )

    def make_prompt(self) -> CuePrompt:
        return CUE_PROMPT if self.prompt_file is None else CuePrompt.from_file(self.prompt_file)

    def make_generator(self, default_temperature: float = 0.0) -> Generator:
        if self.model is None:
            raise ValueError("`--model` is missing: name the model to ask.")
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
        metadata={"help": "Id on the Hub, a folder written by `save_to_disk`, or a JSON lines, CSV or Parquet file."}
    )
    output: str = field(metadata={"help": "Folder for the result, and for resuming after an interruption."})
    retry_failed: bool = field(default=False, metadata={"help": "Retry the rows that failed in an earlier run."})


@dataclass
class AuditArguments:
    """Arguments of `trl-vicur cues audit`."""

    html: str | None = field(default=None, metadata={"help": "File for a report with the images."})
    output: str | None = field(
        default=None,
        metadata={"help": "Folder for the audited dataset; by default the one that `cues generate` wrote."},
    )
    answer_column: str = field(default="answer", metadata={"help": "Column with the reference answers."})
    visible_text_column: str = field(
        default="visible_text", metadata={"help": "Column with lists of the texts in each image."}
    )
    drop: bool = field(default=False, metadata={"help": "Drop the rows whose cue is not usable."})
    fix: Literal["regenerate"] | None = field(
        default=None,
        metadata={"help": "`regenerate` has the model write new cues where one is missing or not usable."},
    )
    recoverability: int | None = field(
        default=None,
        metadata={"help": "Number of cues to sample per row, to measure how much they agree with the row's cue."},
    )
    usefulness: bool = field(
        default=False, metadata={"help": "Measure whether the model answers better with the cue."}
    )
    privilege_gap: bool = field(
        default=False,
        metadata={"help": "Measure how much the cue, and the answer, change the model's predictions as a teacher."},
    )
    completion_column: str | None = field(
        default=None,
        metadata={"help": "Column with the completions to measure the privilege gap on; by default the model's own."},
    )

    def check_model(self, generator: GeneratorArguments) -> None:
        """
        Raises:
            `ValueError`: If an option needs a model and there is none, or if the model cannot measure the gap.
        """
        if self.asks_a_model and generator.model is None:
            raise ValueError(
                "`--fix`, `--recoverability`, `--usefulness` and `--privilege_gap` need a model. Set `--model`."
            )
        if self.privilege_gap and generator.base_url is not None:
            raise ValueError("`--privilege_gap` needs the full distributions of a local model, not `--base_url`.")

    @property
    def asks_a_model(self) -> bool:
        return bool(self.fix or self.recoverability is not None or self.usefulness or self.privilege_gap)
