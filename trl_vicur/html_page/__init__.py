"""HTML page that shows rows of a dataset: one self-contained file, which treats all text as untrusted."""

import base64
import hashlib
import re
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from ..data.full_disk import explain_full_disk
from ..data.images import read_image
from ..data.rows import RowReader


MAX_IMAGE_SIZE = 320  # pixels, of the longer side
# Limits per row, to bound page size, memory and time
MAX_IMAGES_PER_ROW = 6
MAX_TEXT_LENGTH = 4000

# Characters that a reader cannot see, or that change how surrounding text is displayed: control characters, zero-width
# spaces, text-direction overrides, and tag characters, which can hide whole prompts. Joiners and direction marks are
# not included: emoji, Persian and Hebrew need them.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]"
)


def check_page(path: str | Path, max_rows: int) -> Path:
    """
    Raises:
        `ValueError`: If the path is a folder, or if `max_rows` is less than 1.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"`path` is {str(path)!r}, which is a folder. Name a file in it.")
    if max_rows < 1:
        raise ValueError(f"`max_rows` must be at least 1, got {max_rows}.")
    return path


def undecoded_rows(dataset: Dataset, numbers: Iterable[int], columns: list[str]) -> Iterator[dict[str, Any]]:
    """
    Rows with the given numbers, with those of `columns` that exist and with `images` or `image`. Images are not
    decoded, so an unreadable image does not lose its row.
    """
    # The same preference as in the trainer and in `generate_cues`
    columns = [*columns, "images" if "images" in dataset.column_names else "image"]
    columns = [column for column in columns if column in dataset.column_names]
    rows = RowReader(dataset.select_columns(columns).with_format(None))
    for number in numbers:
        yield rows[number]


def write_page(template: Path, path: Path, **variables: Any) -> None:
    """
    Write a page. It works without JavaScript, which is used only for filtering.

    Args:
        template (`Path`):
            Jinja template that extends `page.html.jinja`.
        path (`Path`):
            The file. It is created, or replaced, only when the page is complete.
        variables:
            Variables of the template. Iterators are consumed as the page is written, so only one row's images are in
            memory at a time.

    Raises:
        `OSError`: If the file cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["content_hash"] = content_hash
    page = environment.get_template(template.name).stream(**variables)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        with explain_full_disk(path), unfinished.open("wb") as file:
            page.dump(file, encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def show_images(images: list) -> dict[str, Any]:
    """Prepare the images of a row for the macro `row_images`."""
    return {"images": [show_image(image) for image in images[:MAX_IMAGES_PER_ROW]], "num_images": len(images)}


def show_image(image: Image.Image | dict | str | None) -> dict[str, Any]:
    """Make a thumbnail (a data URL, its size and the image's size), or say why the image cannot be shown."""
    source = image["path"] if isinstance(image, dict) and image.get("bytes") is None else image
    if image is None or source is None:
        return {"error": "The dataset has neither its bytes nor its path."}
    if isinstance(source, str) and "://" in source:
        # Otherwise, a report would fetch every URL in the dataset and wait for it
        return {"error": f"It is not in the dataset, and a report downloads nothing: {readable(source, 200)}"}
    try:
        thumbnail = read_image(image)
        size = thumbnail.size
        thumbnail.info = {}  # do not save the file's comment and colour profile, which may be large
        thumbnail.thumbnail((MAX_IMAGE_SIZE, MAX_IMAGE_SIZE))
        # Drawings are smaller, and stay sharp, as PNG; photographs are smaller as JPEG
        encoded = min(encode(thumbnail, "PNG"), encode(thumbnail, "JPEG"), key=len)
    except ValueError as error:
        return {"error": readable(str(error), 400)}
    return {"url": encoded, "size": thumbnail.size, "original_size": size}


def encode(image: Image.Image, image_format: str) -> str:
    """Encode the image as a data URL."""
    buffer = BytesIO()
    image.save(buffer, image_format, quality=85, optimize=True)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def readable(text: str, max_length: int = MAX_TEXT_LENGTH) -> str:
    """Truncate the text to `max_length` characters, and spell out invisible ones."""
    shown = INVISIBLE.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", text[:max_length])
    return shown if len(text) <= max_length else f"{shown}… ({len(text) - max_length:,} more characters)"


def content_hash(text: str) -> str:
    """Hash a script for the content security policy that allows it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
