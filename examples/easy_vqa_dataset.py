"""
Loads easy-VQA as data for visual-cue distillation, and evaluates models on it with greedy decoding.

The PyPI package `easy-vqa` contains 4,000 training and 1,000 test images, each showing one shape in one colour, and
about ten questions per image. This module turns it into `datasets.Dataset`s in TRL's prompt-only conversational
format:

- `prompt`: one user message, the question as plain text;
- `images`: the one image;
- `cue`: what the image shows, e.g. "a teal circle", deduced from all questions about the image and their answers; it
  is the same in all rows of an image, whatever their answers are;
- `answer`: one word, e.g. "no".
"""

import random
import re
import time
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

import easy_vqa
import torch
from datasets import Dataset, Features, Image, List, Value
from rich.progress import track
from transformers import PreTrainedModel, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages

from trl_vicur import ViCuRConfig
from trl_vicur.data.rows import row_images
from trl_vicur.data.teacher_prompt import add_privilege


COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")

# Builds the teacher's prompt from the student's: the trainer's default
HINT_TEMPLATE = ViCuRConfig.teacher_prompt_template

# Images of easy-VQA's training set for each purpose. The remaining images are for distillation.
NUM_VISION_IMAGES = 1000
NUM_BASE_IMAGES = 20
SPLIT_SEED = 0

EVIDENCE_PATTERN = re.compile(r"the image shows (a \w+ \w+) \.")
ANSWER_PATTERN = re.compile(r"the answer is (\w+) \.")


class Scene(NamedTuple):
    """The contents of one image."""

    color: str
    shape: str

    @property
    def cue(self) -> str:
        return f"a {self.color} {self.shape}"


def find_word(text: str, words: Iterable[str]) -> str | None:
    """Returns the one of `words` that occurs in `text`, or `None`."""
    return next((word for word in re.findall(r"\w+", text) if word in words), None)


@cache
def answer_question(question: str, scene: Scene) -> str | None:
    """
    Answers an easy-VQA question about a scene. Returns `None` if the question does not apply, such as the colour of
    the circle in an image without a circle.
    """
    color, shape = find_word(question, COLORS), find_word(question, SHAPES)
    fits = color in (None, scene.color) and shape in (None, scene.shape)
    if question.startswith("what"):
        if not fits:
            return None
        return scene.color if "color" in question else scene.shape
    negated = find_word(question, ("not", "no")) is not None
    return "yes" if fits != negated else "no"


def deduce_scenes(rows: list[tuple[str, str, int]]) -> dict[int, Scene]:
    """
    Deduces what each image shows from all `(question, answer, image_id)` about it: each answer rules out scenes.
    Returns only the images for which exactly one scene remains, about nine in ten.
    """
    candidates = {}
    for question, answer, image_id in rows:
        possible = candidates.get(image_id, [Scene(color, shape) for color in COLORS for shape in SHAPES])
        candidates[image_id] = [scene for scene in possible if answer_question(question, scene) == answer]
    return {image_id: scenes[0] for image_id, scenes in candidates.items() if len(scenes) == 1}


def load_easy_vqa(split: str) -> Dataset:
    """
    Loads one split as a dataset with the columns `prompt`, `images`, `cue` and `answer`.

    Args:
        split (`str`):
            One of

            - `"vision"`: images on which the base model's vision tower learns shapes and colours;
            - `"base"`: a few of these, on which the base model learns to put into words what it sees;
            - `"distillation"`: images that the base model never saw;
            - `"test"`: easy-VQA's test questions.

            No image is in two splits, except that `"vision"` includes the images of `"base"`.
    """
    if split == "test":
        rows = list(zip(*easy_vqa.get_test_questions(), strict=True))
        image_paths = easy_vqa.get_test_image_paths()
    else:
        rows = list(zip(*easy_vqa.get_train_questions(), strict=True))
        image_paths = easy_vqa.get_train_image_paths()
    scenes = deduce_scenes(rows)
    image_ids = sorted(scenes)
    random.Random(SPLIT_SEED).shuffle(image_ids)
    image_ids = {
        "vision": image_ids[:NUM_VISION_IMAGES],
        "base": image_ids[:NUM_BASE_IMAGES],
        "distillation": image_ids[NUM_VISION_IMAGES:],
        "test": image_ids,
    }[split]
    selected = set(image_ids)
    rows = [row for row in rows if row[2] in selected]
    # easy-VQA groups rows by image. After shuffling, any prefix of the dataset is a random sample.
    random.Random(SPLIT_SEED).shuffle(rows)
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": question}] for question, _, _ in rows],
            # Paths; images are decoded when a row is read. The processor resizes 64x64 to the model's 96x96 pixels.
            "images": [[image_paths[image_id]] for _, _, image_id in rows],
            "cue": [scenes[image_id].cue for _, _, image_id in rows],
            "answer": [answer for _, answer, _ in rows],
        },
        features=Features(
            {
                "prompt": List({"role": Value("string"), "content": Value("string")}),
                "images": List(Image(mode="RGB")),
                "cue": Value("string"),
                "answer": Value("string"),
            }
        ),
    )


def encode(rows: list[dict], processor: ProcessorMixin, hint_column: str | None = None) -> dict[str, torch.Tensor]:
    """Turns dataset rows into left-padded model inputs, with the hint of `hint_column`, if given, in the prompt."""
    conversations = []
    for row in rows:
        hint = None if hint_column is None else row[hint_column]
        prompt = add_privilege(row["prompt"], hint, HINT_TEMPLATE)
        conversations.append(prepare_multimodal_messages(prompt, images=row_images(row)))
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@torch.no_grad()
def complete_batch(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    rows: list[dict],
    hint_column: str | None = None,
    max_new_tokens: int = 24,
) -> list[str]:
    """Completes the prompts of one batch of rows greedily."""
    inputs = encode(rows, processor, hint_column).to(model.device)
    output_ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return processor.batch_decode(output_ids[:, inputs["input_ids"].size(1) :], skip_special_tokens=True)


def complete(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    dataset: Dataset,
    hint_column: str | None = None,
    batch_size: int = 256,
    description: str = "Evaluating",
) -> list[str]:
    """Completes every prompt of the dataset greedily."""
    model.eval()
    completions = []
    for start in track(range(0, len(dataset), batch_size), description=description):
        rows = [dataset[row] for row in range(start, min(start + batch_size, len(dataset)))]
        completions += complete_batch(model, processor, rows, hint_column)
    return completions


def score(completions: list[str], dataset: Dataset) -> dict[str, float]:
    """
    Scores completions of the form "the image shows a teal circle . the answer is no .".

    Returns:
        `dict[str, float]`: The shares of completions with the right answer (`accuracy`), with the right evidence
            (`evidence_accuracy`), with both (`grounded_accuracy`), and with the word "Hint" (`hint_leakage`).
    """
    answer_right, evidence_right, both_right, leaked = 0, 0, 0, 0
    for completion, cue, answer in zip(completions, dataset["cue"], dataset["answer"], strict=True):
        right_answer = ANSWER_PATTERN.findall(completion) == [answer]
        right_evidence = EVIDENCE_PATTERN.findall(completion) == [cue]
        answer_right += right_answer
        evidence_right += right_evidence
        both_right += right_answer and right_evidence
        leaked += "Hint" in completion
    return {
        "accuracy": answer_right / len(dataset),
        "grounded_accuracy": both_right / len(dataset),
        "evidence_accuracy": evidence_right / len(dataset),
        "hint_leakage": leaked / len(dataset),
    }


def evaluate(
    model: PreTrainedModel, processor: ProcessorMixin, dataset: Dataset, hint_column: str | None = None, **kwargs
) -> dict[str, float]:
    """Completes and scores the dataset. Returns the scores, and the `seconds` that it took."""
    start = time.perf_counter()
    scores = score(complete(model, processor, dataset, hint_column, **kwargs), dataset)
    return scores | {"seconds": time.perf_counter() - start}
