"""Checks of the datasets before training, so that no bad row costs a training run."""

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

from datasets import Dataset, IterableDataset
from PIL import Image
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import is_conversational, prepare_multimodal_messages

from .teacher_context import add_privilege, get_privilege
from .vicur_config import ViCuRConfig


class RowChecker:
    """
    Checks that a dataset row can be trained on.

    Args:
        args ([`ViCuRConfig`]):
            Training configuration.
        processing_class ([`~transformers.ProcessorMixin`]):
            Processor of the student.
        max_length (`int`):
            Context length of the model, in tokens.
    """

    def __init__(self, args: ViCuRConfig, processing_class: ProcessorMixin, max_length: int):
        self.args = args
        self.processing_class = processing_class
        self.max_prompt_length = max_length - (args.max_completion_length or 0)
        self.max_length = max_length
        self.control_token = control_token_pattern(processing_class.tokenizer)

    def check(self, row: dict[str, Any]) -> None:
        """
        Raises:
            `ValueError`: With what is wrong and how to mend it; without the row's number, which the caller knows.
        """
        prompt = row["prompt"]
        if not is_conversational(row):
            raise ValueError(
                "`prompt` must be a list of messages, each with 'role' and 'content', got "
                f"{_shorten(prompt)}. Images can only be placed in conversational prompts."
            )
        privilege = get_privilege(row, self.args)
        teacher_prompt = add_privilege(prompt, privilege, self.args.teacher_prompt_template)
        for name, text in [*_message_texts(prompt), ("privilege", privilege or "")]:
            if found := self.control_token.search(text):
                raise ValueError(
                    f"The text of `{name}` contains the control token {found.group()!r}: {_shorten(text)}. Data must "
                    "not steer the chat format; remove the token."
                )
        images = row_images(row)
        prepare_multimodal_messages(prompt, images=images)
        sizes = [image_size(image) for image in images]
        self._check_length(teacher_prompt, [size for size in sizes if size is not None])

    def _check_length(self, prompt: list[dict[str, Any]], image_sizes: list[tuple[int, int]]) -> None:
        num_image_tokens = 0
        if image_sizes:
            sizes = [[height, width] for width, height in image_sizes]
            num_image_tokens = sum(
                self.processing_class._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"]
            )
        # A text has at most as many tokens as bytes, so most rows need not be tokenized
        texts = [text for _, text in _message_texts(prompt)]
        if (
            num_image_tokens + sum(len(text.encode("utf-8", "replace")) + 64 for text in texts)
            <= self.max_prompt_length
        ):
            return
        text = self.processing_class.apply_chat_template(
            prepare_multimodal_messages(prompt, images=[None] * len(image_sizes)),
            tokenize=False,
            add_generation_prompt=True,
            **(self.args.chat_template_kwargs or {}),
        )
        length = len(self.processing_class.tokenizer.encode(text, add_special_tokens=False)) + num_image_tokens
        if length > self.max_prompt_length:
            raise ValueError(
                f"The prompt (as the teacher sees it) has {length} tokens, {num_image_tokens} of them visual; with "
                f"`max_completion_length={self.args.max_completion_length}` it exceeds the model's context of "
                f"{self.max_length} tokens. Shorten it, shrink its images, or remove the row."
            )


def check_dataset(
    dataset: Dataset | IterableDataset | dict[str, Dataset], name: str, checker: RowChecker, args: ViCuRConfig
) -> None:
    """
    Check a dataset's columns and, unless it is streamed, each of its rows. Processes share the rows between them.

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them):
            The dataset. Rows of an iterable dataset are checked when they are trained on.
        name (`str`):
            What to call it in errors.
        checker ([`RowChecker`]):
            The check of a row.
        args ([`ViCuRConfig`]):
            Training configuration.

    Raises:
        `ValueError`: If a column is missing or a row is bad; names the column, or the row by number.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]", checker, args)
        return
    if dataset.column_names is not None:
        check_columns(dataset.column_names, name, args)
    if isinstance(dataset, IterableDataset):
        return
    numbers = range(args.process_index, len(dataset), args.world_size)
    progress = tqdm(numbers, desc=f"Checking {name}", disable=args.disable_tqdm or args.process_index != 0)
    get_row = _row_getter(dataset)
    for number in progress:
        with_row_number(checker.check, lambda number=number: get_row(number), f"Row {number} of {name}")


def check_columns(column_names: list[str], name: str, args: ViCuRConfig) -> None:
    """
    Raises:
        `ValueError`: If a column that the trainer reads is missing.
    """
    required = ["prompt"]
    if args.privilege == "cue":
        required.append(args.cue_column)
    elif args.privilege == "answer":
        required.append(args.answer_column)
    for column in required:
        if column not in column_names:
            raise ValueError(
                f"{name} has no column `{column}`; with `privilege={args.privilege!r}` it must have {required} and "
                f"`images` or `image`, but it has {column_names}."
            )
    if "images" not in column_names and "image" not in column_names:
        raise ValueError(
            f"{name} has no column `images` or `image`, only {column_names}. Rows without one may be None."
        )


def with_row_number(check: Callable[[dict], None], get_row: Callable[[], dict], row_name: str) -> None:
    """Run `check` on a row; errors, also those of reading it, name the row."""
    try:
        check(get_row())
    except Exception as error:
        raise ValueError(f"{row_name}: {error}") from error


def control_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """A pattern that finds the special tokens which a tokenizer would read out of plain text."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # Without special tokens, a pattern that never matches
    return re.compile("|".join(re.escape(token) for token in tokens) or r"(?!)")


def row_images(row: dict[str, Any]) -> list:
    """The images of a row, from its column `images` or `image`; an empty list for a text-only row."""
    if "images" in row:
        return list(row["images"] or [])
    return [] if row["image"] is None else [row["image"]]


def image_size(image: Image.Image | dict | str) -> tuple[int, int] | None:
    """
    Width and height of an image in pixels, after checking that it can be read; `None` for a URL.

    Args:
        image (`PIL.Image.Image`, `dict` or `str`):
            An image, a `datasets` image that is not decoded (`bytes` or `path`), a path or a URL.

    Raises:
        `ValueError`: If the image cannot be read.
    """
    if isinstance(image, Image.Image):
        image.load()  # reads the file now, if it has only been opened
        return image.size
    if isinstance(image, str) and image.startswith(("http://", "https://")):
        return None
    if isinstance(image, str):
        image = {"path": image, "bytes": None}
    if not isinstance(image, dict):
        raise ValueError(f"An image must be a PIL image, a path or a URL, got {type(image).__name__}.")
    source = BytesIO(image["bytes"]) if image.get("bytes") is not None else image["path"]
    try:
        with Image.open(source) as opened:
            size = opened.size
            # All of the data is decoded, because a header says nothing about its end; a JPEG at an eighth of its size
            opened.draft("L", (1, 1))
            opened.load()
    except Exception as error:
        where = f"{len(image['bytes'])} bytes" if image.get("bytes") is not None else repr(image["path"])
        raise ValueError(f"An image ({where}) cannot be read: {error}. Replace the file or remove the row.") from error
    return size


def _row_getter(dataset: Dataset) -> Callable[[int], dict[str, Any]]:
    """Reads rows without decoding their images, which is most of the work; `image_size` checks them instead."""
    image_column = "images" if "images" in dataset.column_names else "image"
    if dataset.format["type"] is not None:  # a transform or format of the user's makes the rows
        return dataset.__getitem__
    images = dataset.select_columns([image_column]).with_format("arrow")
    others = dataset.remove_columns([image_column])
    return lambda number: {**others[number], image_column: images[number][image_column].to_pylist()[0]}


def _message_texts(prompt: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for message in prompt:
        content = message.get("content")
        if isinstance(content, str):
            yield "prompt", content
        elif content is not None:
            yield from (("prompt", block["text"]) for block in content if block["type"] == "text")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
