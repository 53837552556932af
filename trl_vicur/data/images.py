"""Read images and videos from any form that a dataset row holds them in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .rows import shorten


DOWNLOAD_TIMEOUT = 60.0  # seconds without a byte


@contextmanager
def open_image(image: Image.Image | dict | str) -> Iterator[Image.Image]:
    """
    Open an image, and check its size against Pillow's limit.

    Args:
        image (`PIL.Image.Image`, `dict` or `str`):
            An image, a `datasets` image that is not decoded (`bytes` or `path`), a path or a URL.

    Raises:
        `ValueError`: If the image cannot be read, now or while the context is open.
    """
    try:
        with nullcontext(image) if isinstance(image, Image.Image) else Image.open(_image_source(image)) as opened:
            width, height = opened.size
            if not width * height:
                raise ValueError(f"it has {width}×{height} pixels")
            # Pillow checks only files, but reading makes several copies of an image in memory, too
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
            problem = "it is not an image, or has an unknown format"
        elif isinstance(error, OSError) and error.strerror:  # without the file name, which the message already has
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
    """The image's file, as a path or as bytes."""
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
            # fsspec annotates a single file as a list of files
            return BytesIO(file.read())  # pyright: ignore[reportAttributeAccessIssue]
    if not Path(path).is_file():  # opening a pipe could wait forever
        raise ValueError("the file does not exist")
    return path


def image_size(image: Image.Image | dict | str) -> tuple[int, int]:
    """
    Check that an image can be read, and return its width and height in pixels after rotating it upright.

    Args:
        image (`PIL.Image.Image`, `dict` or `str`):
            An image, a `datasets` image that is not decoded (`bytes` or `path`), a path or a URL.

    Raises:
        `ValueError`: If the image cannot be read.
    """
    with open_image(image) as opened:
        width, height = opened.size
        # Decode the whole image, because a truncated file can have an intact header. For speed, decode a JPEG at an
        # eighth of its size
        if opened is not image:
            opened.draft("L", (1, 1))
        opened.load()
        is_turned = opened.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return (height, width) if is_turned else (width, height)


def read_image(image: Image.Image | dict | str) -> Image.Image:
    """
    Read an image as RGB: rotated upright, transparent parts on white, the first frame of an animation. Its `format` is
    that of the file.

    Args:
        image (`PIL.Image.Image`, `dict` or `str`):
            An image, a `datasets` image that is not decoded (`bytes` or `path`), a path or a URL.

    Raises:
        `ValueError`: If the image cannot be read.
    """
    with open_image(image) as opened:
        upright = ImageOps.exif_transpose(opened)
        if upright.mode.startswith("I;16"):
            # Pillow would clip to 255, which makes all but the darkest pixels white
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        if upright.has_transparency_data:
            upright = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
        rgb = upright.convert("RGB")
        rgb.format = opened.format
    return rgb


def read_video(video: Sequence | np.ndarray) -> np.ndarray:
    """
    Read the frames of a video as 8-bit integers, `(frames, height, width, 3)`.

    Args:
        video (list or `numpy.ndarray`):
            Its frames: a list of images, each in a form that [`read_image`] accepts, or an array (or nested lists) of
            integers from 0 to 255, of shape `(frames, height, width, 3)` or `(frames, 3, height, width)`.

    Raises:
        `ValueError`: If a frame cannot be read, or if the frames differ in size.
    """
    if isinstance(video, (list, tuple)) and video and isinstance(video[0], (Image.Image, dict, str)):
        frames = [read_image(frame) for frame in video]
        if len(sizes := {frame.size for frame in frames}) > 1:
            raise ValueError(f"The frames of a video have the sizes {sorted(sizes)}, expected one. Resize them.")
        return np.stack([np.asarray(frame) for frame in frames])
    try:
        array = np.asarray(video)
    except ValueError:  # nested lists of different lengths
        array = np.empty((0, 0, 0, 0))
    if array.ndim == 4 and array.shape[1] == 3 != array.shape[3]:
        array = array.transpose(0, 2, 3, 1)
    is_video = array.ndim == 4 and array.shape[3] == 3 and array.size and np.issubdtype(array.dtype, np.integer)
    if not is_video or array.min() < 0 or array.max() > 255:
        raise ValueError(
            f"A video ({shorten(video)}) cannot be read: expected a list of frames (images of one size), or an array "
            "of integers from 0 to 255 of shape (frames, height, width, 3). Replace it, or leave it out."
        )
    return np.ascontiguousarray(array, dtype=np.uint8)
