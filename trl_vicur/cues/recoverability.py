"""Could the student find the evidence itself? Compares the cue with cues sampled from image and question alone."""

from itertools import groupby
from pathlib import Path

from datasets import Dataset, Value

from ..data.columns import set_columns
from ..data.questions import QuestionRows
from ..generation import Generator
from ..generation.response_store import ResponseStore, open_store
from .agreement import agreement, content_tokens, semantic_entropy
from .audit_summary import mean_of_columns
from .generate import ask_for_cues
from .prompts import CUE_PROMPT, CuePrompt


STORE_NAME = "recoverability.sqlite"


def measure_recoverability(
    dataset: Dataset,
    generator: Generator,
    output: str | Path | None = None,
    num_samples: int = 4,
    prompt: CuePrompt = CUE_PROMPT,
    question_column: str | None = None,
    cue_column: str = "cue",
    seed: int = 0,
) -> Dataset:
    """
    Estimate how far the student's own input X determines a cue S, which makes it recoverable (ViCuR, Sec. 3.1).

    Cues are sampled from images and question alone. If they agree with the row's cue, a model that sees the image can
    find that evidence. If they disagree with each other, the image does not determine the cue: their
    [`semantic_entropy`] estimates H(S | X). Each sample is saved as soon as it arrives: after an interruption, the
    same call continues.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, a question and a cue. Rows without a cue are skipped.
        generator ([`Generator`]):
            A generator with a temperature above zero. Use the student's own model to measure what the student can
            find, or the model that wrote the cues to measure how far the image determines them.
        output (`str` or `Path`, *optional*):
            Folder for the samples, in the file `recoverability.sqlite`. Without it, they are not saved.
        num_samples (`int`, *optional*, defaults to `4`):
            Samples per row, at least two.
        prompt, question_column, cue_column (*optional*):
            As in [`generate_cues`] and [`audit_cues`].
        seed (`int`, *optional*, defaults to `0`):
            Sample `j` of row `i` has the seed `seed + i * num_samples + j`.

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns

        - `cue_agreement` (`float` between 0 and 1): mean [`agreement`] of the samples with the cue. `None` without a
          cue, or if all samples failed.
        - `cue_entropy` (`float`, in nats): `None` without a cue, or if fewer than two samples succeeded.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing, if the generator does not sample, if `num_samples` is below two, or if
            `output` was begun with different settings or a different dataset.
        [`GeneratorUnavailableError`], `OSError`: If no request can succeed, or if the disk is full.
    """
    rows = QuestionRows(dataset, question_column, cue_column=cue_column)
    check_sampling(generator, num_samples)
    settings = {**generator.settings, **prompt.settings, "num_samples": num_samples, "seed": seed, **rows.settings()}
    numbers = [number * num_samples + i for number in rows.with_text(cue_column) for i in range(num_samples)]
    with open_store(output, STORE_NAME, settings) as store:
        ask_for_cues(
            generator, store, numbers, rows, prompt, seed, "Sampling cues", lambda n: n // num_samples, "sample"
        )
        columns = compare_samples(store, rows.values(cue_column), num_samples)
    return set_columns(dataset, columns, Value("float64"))


def summarize_recoverability(dataset: Dataset) -> dict[str, int | float]:
    """
    The means of `cue_agreement` and `cue_entropy` (in nats) over the rows that have them, and the numbers of these
    rows under the same names with the suffix `_rows`.
    """
    return mean_of_columns(dataset, ["cue_agreement"]) | mean_of_columns(dataset, ["cue_entropy"])


def check_sampling(generator: Generator, num_samples: int) -> None:
    """
    Raises:
        `ValueError`: If all samples would be the same, or if there are fewer than two.
    """
    temperature = generator.settings["temperature"]
    if not temperature > 0.0:
        raise ValueError(
            f"The generator's `temperature` is {temperature}, so all its samples would be the same text. Set it above "
            "zero, e.g. `temperature=1.0`."
        )
    if num_samples < 2:
        raise ValueError(f"`num_samples` must be at least 2 to compare samples, got {num_samples}.")


def compare_samples(store: ResponseStore, cues: list[str], num_samples: int) -> dict[str, list[float | None]]:
    """Compute the agreement of each row's samples with its cue, and the samples' entropy."""
    agreements: list[float | None] = [None] * len(cues)
    entropies: list[float | None] = [None] * len(cues)
    for number, responses in groupby(store, key=lambda response: response[0] // num_samples):
        samples = [content_tokens(text) for _, text, _, _ in responses if text is not None]
        if samples:
            cue = content_tokens(cues[number])
            agreements[number] = sum(agreement(cue, sample) for sample in samples) / len(samples)
        if len(samples) > 1:
            entropies[number] = semantic_entropy(samples)
    return {"cue_agreement": agreements, "cue_entropy": entropies}
