"""The study's domains: their rows, splits and base models, and how completions are scored."""

import re
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, DatasetDict, Image, List, load_dataset, load_from_disk
from geometry import ANSWER_PATTERN, load_geometry
from math_verify import parse, verify
from transformers import PreTrainedModel, ProcessorMixin


STUDY = Path(__file__).parent
sys.path.append(str(STUDY.parent))

import easy_vqa_dataset  # noqa: E402  (in the folder above)


class Domain(NamedTuple):
    """
    Args:
        base (`str`): Folder or id of the model that all students start from.
        load (`Callable`): Loads a split: `"distillation"`, `"validation"`, `"test"`, in some domains `"test_ood"`.
        test_splits (`tuple[str, ...]`): The splits that students are tested on.
        score (`Callable`): Maps `(completion, row)` to `(answer is right, evidence is right)`; the latter is `None` if
            evidence cannot be judged.
        metric (`str`): Selects learning rates on `"validation"`: `"accuracy"` or `"grounded_accuracy"`.
        layer_interval (`int`): As in `CueRecoveryConfig`.
        training (`dict`): Trainer options that all cells share.
    """

    base: str
    load: Callable[[str], Dataset]
    test_splits: tuple[str, ...]
    score: Callable[[str, dict[str, Any]], tuple[bool, bool | None]]
    metric: str
    layer_interval: int
    training: dict[str, Any]


# Nearly one epoch, for the tiny models of the two domains that need no download
TINY_TRAINING = {"max_steps": 120, "per_device_train_batch_size": 32, "bf16": False, "gradient_checkpointing": False}


# --- (a) easy-VQA, as in the quickstart ---

NUM_TRAINING_ROWS = 4000  # no more than training uses, since the trainer checks all rows
NUM_VALIDATION_IMAGES = 200
NUM_TEST_QUESTIONS = 1000


@cache
def easy_vqa_validation_paths() -> frozenset[str]:
    return frozenset(sorted(set(image_paths(easy_vqa_dataset.load_easy_vqa("distillation"))))[:NUM_VALIDATION_IMAGES])


def image_paths(dataset: Dataset) -> list[str]:
    return [image["path"] for [image] in dataset.cast_column("images", List(Image(decode=False)))["images"]]


def load_easy_vqa(split: str) -> Dataset:
    """easy-VQA, with some images of the distillation split held out for validation."""
    if split == "test":
        return easy_vqa_dataset.load_easy_vqa("test").select(range(NUM_TEST_QUESTIONS))
    dataset = easy_vqa_dataset.load_easy_vqa("distillation")
    is_validation = split == "validation"
    paths = image_paths(dataset)
    rows = [row for row, path in enumerate(paths) if (path in easy_vqa_validation_paths()) == is_validation]
    return dataset.select(rows[: 300 if is_validation else NUM_TRAINING_ROWS])


def score_easy_vqa(completion: str, row: dict[str, Any]) -> tuple[bool, bool]:
    return (
        easy_vqa_dataset.ANSWER_PATTERN.findall(completion) == [row["answer"]],
        easy_vqa_dataset.EVIDENCE_PATTERN.findall(completion) == [row["cue"]],
    )


# --- (b) geometry diagrams ---


def score_geometry(completion: str, row: dict[str, Any]) -> tuple[bool, bool]:
    return ANSWER_PATTERN.findall(completion) == [row["answer"]], completion.startswith(f"{row['cue']} . ")


# --- Rows of real datasets, such as Geometry3K or Vision-R1 ---

QUESTION_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth")
IMAGE_COLUMNS = ("images", "image")


def find_column(dataset: Dataset, names: tuple[str, ...]) -> str:
    found = next((name for name in names if name in dataset.column_names), None)
    if found is None:
        raise ValueError(f"The dataset needs one of the columns {names}, but has {dataset.column_names}.")
    return found


def load_rows(path: str, split: str, num_validation_rows: int = 500) -> Dataset:
    """
    Loads rows of a dataset with the columns of the study: `prompt`, `images`, `answer`, and `cue` if it has one.

    Args:
        path (`str`):
            An id on the Hub, or a folder of `save_to_disk` (for example the output of `trl-vicur cues generate`, which
            keeps all columns and adds `cue`).
        split (`str`):
            `"test"`, or `"distillation"` and `"validation"`, into which the dataset's `train` is split.

    Raises:
        `ValueError`: If a column or split is missing.
    """
    dataset = load_from_disk(path) if Path(path).is_dir() else load_dataset(path)
    if isinstance(dataset, Dataset):
        dataset = DatasetDict(train=dataset)
    name = "test" if split == "test" else "train"
    if name not in dataset:
        raise ValueError(f"{path} needs a split '{name}', but has {list(dataset)}.")
    dataset = dataset[name]
    if name == "train":
        parts = dataset.train_test_split(num_validation_rows, seed=0)
        dataset = parts["test" if split == "validation" else "train"]
    question, answer, image = (
        find_column(dataset, names) for names in (QUESTION_COLUMNS, ANSWER_COLUMNS, IMAGE_COLUMNS)
    )

    def texts(row: dict[str, Any]) -> dict[str, Any]:
        prompt = row[question]
        if isinstance(prompt, str):
            # These datasets mark the image's place in the text; TRL puts images before the text
            prompt = [{"role": "user", "content": prompt.replace("<image>", "").strip()}]
        return {"prompt": prompt, "answer": re.sub(r"</?answer>", "", str(row[answer])).strip()}

    kept = {question, answer, image, "cue"}
    dataset = dataset.remove_columns([column for column in dataset.column_names if column not in kept])
    return dataset.map(texts, remove_columns=sorted({question, answer} - {"prompt", "answer"}))


def score_math(completion: str, row: dict[str, Any]) -> tuple[bool, None]:
    return verify(parse(f"${row['answer']}$"), parse(completion)), None


def rows_domain(path: str, model: str) -> Domain:
    """A domain of real rows with a real model, trained like the paper's Geometry3K ablations (Table 3)."""
    training = {"num_train_epochs": 100, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 8}
    training |= {"max_completion_length": 2048}
    return Domain(model, partial(load_rows, path), ("test",), score_math, "accuracy", 5, training)


DOMAINS = {
    "easy_vqa": Domain(
        base=str(STUDY.parent / "quickstart_base"),
        load=load_easy_vqa,
        test_splits=("test",),
        score=score_easy_vqa,
        metric="grounded_accuracy",
        layer_interval=2,
        training={**TINY_TRAINING, "max_completion_length": 24},
    ),
    "geometry": Domain(
        base=str(STUDY / "geometry_base"),
        load=load_geometry,
        test_splits=("test", "test_ood"),
        score=score_geometry,
        metric="accuracy",
        layer_interval=2,
        training={**TINY_TRAINING, "max_completion_length": 40},
    ),
}
# The same domains with bases that have an attention sink, as large language models do (attention_sink.py)
DOMAINS |= {
    f"{name}_sink": DOMAINS[name]._replace(base=str(STUDY / f"{name}_sink_base")) for name in ("easy_vqa", "geometry")
}


def shortened(domain: Domain, max_rows: int) -> Domain:
    """The domain with at most `max_rows` rows of each split."""

    def load(split: str) -> Dataset:
        dataset = domain.load(split)
        return dataset.select(range(min(max_rows, len(dataset))))

    return domain._replace(load=load)


# --- Evaluation ---


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    domain: Domain,
    dataset: Dataset,
    hint_column: str | None = None,
    batch_size: int = 256,
) -> dict[str, Any]:
    """
    Completes every prompt greedily and scores the completions.

    Returns:
        `dict[str, Any]`: The shares `accuracy`, `grounded_accuracy` (both answer and evidence are right) and
            `evidence_accuracy`, the latter two only if evidence can be judged; and `right`, a string with one digit
            per row: 1 for a right answer plus 2 for right evidence.
    """
    was_training = model.training
    model.eval()
    max_new_tokens = domain.training["max_completion_length"]
    scores = []
    for start in range(0, len(dataset), batch_size):
        rows = [dataset[row] for row in range(start, min(start + batch_size, len(dataset)))]
        texts = easy_vqa_dataset.complete_batch(model, processor, rows, hint_column, max_new_tokens)
        scores += [domain.score(text, row) for text, row in zip(texts, rows, strict=True)]
    model.train(was_training)
    result = {"accuracy": sum(answer for answer, _ in scores) / len(scores)}
    if scores[0][1] is not None:
        result["grounded_accuracy"] = sum(answer and evidence for answer, evidence in scores) / len(scores)
        result["evidence_accuracy"] = sum(evidence for _, evidence in scores) / len(scores)
    result["right"] = "".join(str(int(answer) + 2 * bool(evidence)) for answer, evidence in scores)
    return result
