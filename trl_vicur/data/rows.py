"""What a dataset row holds: its images, its videos, its texts, and how to read it."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import numpy as np
from datasets import Dataset
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers import ProcessorMixin


DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte
ROLES = ("system", "user", "assistant", "tool")
BLOCK_TYPES = ("text", "image", "video")
# "<image>", "<image 1>", "<image_1>", "<video>": image and video slots of other prompt formats
PLACEHOLDER = re.compile(r"<(image|video)(?:[ _-]?\d{1,3})?>", re.IGNORECASE)
VISUAL_COLUMNS = ("images", "image", "videos", "video")


def row_images(row: dict[str, Any]) -> list:
    """
    The images of a row, from its column `images` or `image`; an empty list for a row without any.

    Raises:
        `ValueError`: If `images` is no list.
    """
    return _list_of(row, "image")


def row_videos(row: dict[str, Any]) -> list:
    """
    The videos of a row, from its column `videos` or `video`; an empty list for a row without any.

    Raises:
        `ValueError`: If `videos` is no list.
    """
    return _list_of(row, "video")


def _list_of(row: dict[str, Any], kind: str) -> list:
    column = f"{kind}s"
    if column not in row:
        return [] if row.get(kind) is None else [row[kind]]
    values = [] if row[column] is None else row[column]
    if not isinstance(values, (list, tuple)):
        raise ValueError(
            f"`{column}` must be a list, got {type(values).__name__}: {shorten(values)}. Put a single {kind} into a "
            f"list, or into a column `{kind}`."
        )
    return list(values)


@contextmanager
def open_image(image: Image.Image | dict | str) -> Iterator[Image.Image]:
    """
    An image, opened if it is not one yet; it is checked not to be larger than Pillow allows.

    Args:
        image (`PIL.Image.Image`, `dict` or `str`):
            An image, a `datasets` image that is not decoded (`bytes` or `path`), a path or a URL.

    Raises:
        `ValueError`: If the image cannot be read, be it here or while the context is open.
    """
    try:
        with nullcontext(image) if isinstance(image, Image.Image) else Image.open(_image_source(image)) as opened:
            width, height = opened.size
            if not width * height:
                raise ValueError(f"it has {width}×{height} pixels")
            # Pillow checks files; what is in memory already would still be copied, several times
            if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"its {width}×{height} pixels exceed the limit of {2 * Image.MAX_IMAGE_PIXELS} "
                    "(`2 * PIL.Image.MAX_IMAGE_PIXELS`)"
                )
            if opened.mode in ("I", "F", "La"):
                raise ValueError(
                    f"pixels of Pillow's mode {opened.mode!r} have no known range. Scale them to 8 bits (mode 'L' or "
                    "'RGB')"
                )
            yield opened
    except Exception as error:
        problem = str(error)
        if isinstance(error, UnidentifiedImageError):
            problem = "it is no image, or of an unknown format"
        elif isinstance(error, OSError) and error.strerror:  # the name has been said
            problem = error.strerror
        raise ValueError(
            f"An image ({_describe_image(image)}) cannot be read: {problem.rstrip('.')}. Replace it, or leave it out."
        ) from error


def _describe_image(image: Any) -> str:
    if isinstance(image, dict) and image.get("bytes") is not None:
        return f"{len(image['bytes'])} bytes"
    if isinstance(image, dict) and image.get("path") is not None:
        return shorten(image["path"])
    return shorten(image)


def _image_source(image: Any) -> str | BytesIO:
    """What Pillow opens: a file's path, or bytes."""
    if isinstance(image, str):
        image = {"path": image}
    if not isinstance(image, dict) or (image.get("bytes") is None and image.get("path") is None):
        raise ValueError(
            "expected a PIL image, a path, a URL, or a `datasets` image with 'bytes' or 'path', not "
            f"{type(image).__name__}"
        )
    if image.get("bytes") is not None:
        return BytesIO(image["bytes"])
    path = image["path"]
    if path.startswith(("http://", "https://", "data:")):
        with urlopen(Request(path, headers={"User-Agent": "trl-vicur"}), timeout=DOWNLOAD_TIMEOUT) as response:
            return BytesIO(response.read())
    if "://" in path:
        with fsspec.open(path, "rb") as file:
            return BytesIO(file.read())
    if not Path(path).is_file():  # what is none, such as a pipe, might be waited for
        raise ValueError("there is no such file")
    return path


def image_size(image: Image.Image | dict | str) -> tuple[int, int]:
    """
    Width and height of an image in pixels, as it is seen (upright), after checking that it can be read.

    Args:
        image (`PIL.Image.Image`, `dict` or `str`):
            An image, a `datasets` image that is not decoded (`bytes` or `path`), a path or a URL.

    Raises:
        `ValueError`: If the image cannot be read.
    """
    with open_image(image) as opened:
        width, height = opened.size
        # All of the data is decoded, because a header says nothing about its end; a JPEG at an eighth of its size
        if opened is not image:
            opened.draft("L", (1, 1))
        opened.load()
        is_turned = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if is_turned else (width, height)


def read_image(image: Image.Image | dict | str) -> Image.Image:
    """
    An image as it is seen, in RGB: upright, on white where it is transparent, the first frame of an animation; with
    the `format` of its file.

    Args:
        image (`PIL.Image.Image`, `dict` or `str`):
            An image, a `datasets` image that is not decoded (`bytes` or `path`), a path or a URL.

    Raises:
        `ValueError`: If the image cannot be read.
    """
    with open_image(image) as opened:
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):
            # Pillow would clip, so that all but the darkest pixels are white
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        rgb = upright.convert("RGB")
        rgb.format = opened.format
    return rgb


def read_video(video: Sequence | np.ndarray) -> np.ndarray:
    """
    The frames of a video, `(frames, height, width, 3)`, in 8 bits.

    Args:
        video (list or `numpy.ndarray`):
            Its frames: a list of images as [`read_image`] takes them, or an array (also as nested lists) of integers
            from 0 to 255, of shape `(frames, height, width, 3)` or `(frames, 3, height, width)`.

    Raises:
        `ValueError`: If a frame cannot be read, or if these are no frames of one size.
    """
    if isinstance(video, (list, tuple)) and video and isinstance(video[0], (Image.Image, dict, str)):
        frames = [read_image(frame) for frame in video]
        if len(sizes := {frame.size for frame in frames}) > 1:
            raise ValueError(f"The frames of a video have the sizes {sorted(sizes)}, expected one. Resize them.")
        return np.stack(frames)
    try:
        array = np.asarray(video)
    except ValueError:  # nested lists of several lengths
        array = np.empty(0)
    if array.ndim == 4 and array.shape[1] == 3 != array.shape[3]:
        array = array.transpose(0, 2, 3, 1)
    is_video = array.ndim == 4 and array.shape[3] == 3 and array.size and np.issubdtype(array.dtype, np.integer)
    if not is_video or array.min() < 0 or array.max() > 255:
        raise ValueError(
            f"A video ({shorten(video)}) cannot be read: expected a list of frames (images of one size), or an array "
            "of integers from 0 to 255 of shape (frames, height, width, 3). Replace it, or leave it out."
        )
    return np.ascontiguousarray(array, dtype=np.uint8)


def check_messages(messages: Any) -> None:
    """
    Raises:
        `ValueError`: If these are no messages of a conversation, with contents that are strings or lists of blocks of
            text, images and videos; names the message by its number.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected a list of messages, each with 'role' and 'content', got {shorten(messages)}.")
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"message {number} must be a dict with a role of {ROLES}, got {shorten(message)}.")
        content = message.get("content")
        if isinstance(content, str) or (content is None and role == "assistant" and message.get("tool_calls")):
            continue
        if not isinstance(content, list):
            raise ValueError(
                f"the content of message {number} must be a string or a list of blocks, got {shorten(content)}."
            )
        for block in content:
            block_type = block.get("type") if isinstance(block, dict) else None
            if block_type not in BLOCK_TYPES or (block_type == "text" and not isinstance(block.get("text"), str)):
                raise ValueError(
                    f"each block of message {number} must be a dict with a type of {BLOCK_TYPES}, and with a string "
                    f"'text' if it is one, got {shorten(block)}."
                )


def check_placeholders(column: str, value: Any) -> None:
    """
    Raises:
        `ValueError`: If a string in the value has a placeholder of another format, which a model would read as text.
    """
    for text in all_strings(value):
        if placeholder := PLACEHOLDER.search(text):
            kind = placeholder[1].lower()
            raise ValueError(
                f"The text of `{column}` contains the placeholder {placeholder[0]!r}, which the model would read as "
                f"text: {shorten(text)}. Replace it with a block {{'type': '{kind}'}} in `prompt`, or remove it."
            )


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


def all_strings(value: Any) -> Iterator[str]:
    """Every string within nested dicts and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from all_strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from all_strings(item)


def control_token_pattern(processing_class: ProcessorMixin) -> re.Pattern:
    """A pattern that finds the tokens which a processor would read out of plain text: special ones, placeholders."""
    tokens = {token.content for token in processing_class.tokenizer.added_tokens_decoder.values() if token.special}
    # Processors replace `image_token` and the like by text, whatever the tokenizer calls them
    tokens |= {
        value for name, value in vars(processing_class).items() if name.endswith("_token") and isinstance(value, str)
    }
    # Without such tokens, a pattern that never matches
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


class RowReader:
    """
    Read rows without decoding their images, which is most of the work; `image_size` checks the images instead.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
    """

    def __init__(self, dataset: Dataset):
        # A user's transform or format expects whole rows
        is_formatted = dataset.format["type"] is not None
        columns = [] if is_formatted else [column for column in VISUAL_COLUMNS if column in dataset.column_names]
        self.visuals = dataset.select_columns(columns).with_format("arrow") if columns else None
        self.others = dataset.remove_columns(columns) if columns else dataset

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.others[number]
        return row if self.visuals is None else {**row, **self.visuals[number].to_pylist()[0]}


def shorten(value: Any) -> str:
    """The value as an error quotes it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
