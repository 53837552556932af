"""What a dataset row holds: its images, its texts, and how to read it."""

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import Any

from datasets import Dataset
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.image_utils import load_image


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


def read_image(image: Image.Image | dict | str) -> Image.Image:
    """
    An image as RGB pixels, upright, with the `format` of its file.

    Args:
        image (`PIL.Image.Image`, `dict` or `str`):
            An image, a `datasets` image that is not decoded (`bytes` or `path`), a path or a URL.

    Raises:
        `ValueError` or `OSError`: If the image cannot be read.
    """
    if isinstance(image, dict):
        image = image["path"] if image.get("bytes") is None else Image.open(BytesIO(image["bytes"]))
    if isinstance(image, str) and not image.startswith(("http://", "https://")):
        image = Image.open(image)
    rgb = load_image(image)
    rgb.format = getattr(image, "format", None)  # a URL has none
    return rgb


def message_texts(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The texts of messages whose contents are strings or lists of blocks."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif content is not None:
            yield from (block["text"] for block in content if block["type"] == "text")


def question_text(prompt: str | list[dict[str, Any]]) -> str:
    """What a prompt asks: the text itself, or the texts of its user turns."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message_texts([message for message in prompt if message["role"] == "user"]))


def control_token_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern:
    """A pattern that finds the special tokens which a tokenizer would read out of plain text."""
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    # Without special tokens, a pattern that never matches
    return re.compile("|".join(re.escape(token) for token in tokens) or r"(?!)")


def row_getter(dataset: Dataset) -> Callable[[int], dict[str, Any]]:
    """Reads rows without decoding their images, which is most of the work; `image_size` checks them instead."""
    image_column = "images" if "images" in dataset.column_names else "image"
    if dataset.format["type"] is not None:  # a transform or format of the user's makes the rows
        return dataset.__getitem__
    images = dataset.select_columns([image_column]).with_format("arrow")
    others = dataset.remove_columns([image_column])
    return lambda number: {**others[number], image_column: images[number][image_column].to_pylist()[0]}


def shorten(value: Any) -> str:
    """The value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
