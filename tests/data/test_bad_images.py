"""
Bad and hostile images, in a table. Trainer (student and teacher), cue generation and heat maps all see the same
picture, or all refuse the image before training, with the reason and a fix.
"""

import base64
import io
import os
from collections.abc import Callable
from pathlib import Path
from zlib import compress, crc32

import numpy as np
import pytest
import torch
from built_trainers import build
from datasets import Dataset
from image_files import encoded
from PIL import Image, ImageOps
from tiny_models import make_image, make_processor, make_rows

from trl_vicur.cues.prompts import CUE_PROMPT, cue_messages
from trl_vicur.data.images import image_size, read_image
from trl_vicur.heatmap.plot import load_images
from trl_vicur.trainer.checks.rows import with_row_number


# --- Helpers for the table ---


def data(image_bytes: bytes) -> Callable:
    """An image as a dataset holds it."""
    return lambda folder: {"bytes": image_bytes, "path": None}


def path(name: str, image_bytes: bytes) -> Callable:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(image_bytes)
        return str(folder / name)

    return write


def value(image) -> Callable:
    return lambda folder: image


def pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe.png")
    return str(folder / "pipe.png")


def png_chunk(name: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + name + content + crc32(name + content).to_bytes(4, "big")


def png_that_says(width: int, height: int) -> bytes:
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    return PNG[:8] + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", compress(b"\0" * 9)) + png_chunk(b"IEND", b"")


def transparent(mode: str) -> Image.Image:
    """The left half is red, the right half is fully transparent."""
    image = Image.new("RGBA", (64, 64), "red")
    image.paste((0, 0, 0, 0), (32, 0, 64, 64))
    if mode == "PA":  # Pillow before 12 converts the colours only
        palette = image.convert("P")
        palette.putalpha(image.getchannel("A"))
        return palette
    return image.convert(mode)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(WIDE, "PNG", exif=exif)


NOISE = make_image(0)
WIDE = make_image(1, (64, 32))
PIXEL = Image.new("RGB", (1, 1), (9, 9, 9))
HALF_RED = Image.new("RGB", (64, 64), "red")
HALF_RED.paste("white", (32, 0, 64, 64))
PNG = encoded(NOISE, "PNG")
JPEG = encoded(NOISE, "JPEG")
CMYK_JPEG = encoded(NOISE.convert("CMYK"), "JPEG")
PALETTE = NOISE.convert("P")
BLACK_IS_TRANSPARENT = dict(transparency=(0, 0, 0))
ANIMATED = dict(save_all=True, append_images=[make_image(2), make_image(3)], lossless=True)
GIF = encoded(PALETTE, "GIF", **ANIMATED)
BITS_16 = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
BITS_8 = Image.fromarray((BITS_16 // 256).astype(np.uint8)).convert("RGB")
BOMB_IN_TEXT = PNG[:33] + png_chunk(b"zTXt", b"Comment\0\0" + compress(b"\0" * 2**27)) + PNG[33:]

NO_IMAGE = "it is not an image, or has an unknown format. Replace it, or leave it out."
NO_FILE = "the file does not exist. Replace it, or leave it out."
NO_TYPE = "expected a PIL image, a path, a URL, or a `datasets` image with 'bytes' or 'path', not"

# The image and the expected picture
ACCEPTED = {
    "in-memory": (value(NOISE), NOISE),
    "bytes": (data(PNG), NOISE),
    "bytes-and-missing-path": (value({"bytes": PNG, "path": "gone.png"}), NOISE),
    "path": (path("a.png", PNG), NOISE),
    "path-in-dict": (lambda folder: {"bytes": None, "path": path("a.png", PNG)(folder)}, NOISE),
    "wrong-extension": (path("a.jpg", PNG), NOISE),
    "file-url": (lambda folder: "file://" + path("a.png", PNG)(folder), NOISE),
    "data-url": (value("data:image/png;base64," + base64.b64encode(PNG).decode()), NOISE),
    "opened-file": (lambda folder: Image.open(path("a.jpg", JPEG)(folder)), Image.open(io.BytesIO(JPEG))),
    # Sizes
    "1x1": (value(PIXEL), PIXEL),
    "1x1-grey": (data(encoded(PIXEL.convert("L"), "PNG")), PIXEL),
    "3x1": (value(make_image(4, (3, 1))), make_image(4, (3, 1))),
    "aspect-of-190": (value(make_image(5, (190, 1))), make_image(5, (190, 1))),
    # Colours
    "bilevel": (value(NOISE.convert("1")), NOISE.convert("1").convert("RGB")),
    "grey": (value(NOISE.convert("L")), NOISE.convert("L").convert("RGB")),
    "palette": (data(encoded(PALETTE, "PNG")), PALETTE.convert("RGB")),
    "cmyk": (value(NOISE.convert("CMYK")), NOISE.convert("CMYK").convert("RGB")),
    "cmyk-jpeg": (path("a.jpg", CMYK_JPEG), Image.open(io.BytesIO(CMYK_JPEG)).convert("RGB")),
    "cmyk-tiff": (data(encoded(NOISE.convert("CMYK"), "TIFF")), NOISE.convert("CMYK").convert("RGB")),
    "ycbcr": (value(NOISE.convert("YCbCr")), NOISE.convert("YCbCr").convert("RGB")),
    "hsv": (value(NOISE.convert("HSV")), NOISE.convert("HSV").convert("RGB")),
    "16-bit": (value(Image.fromarray(BITS_16)), BITS_8),
    "16-bit-png": (path("a.png", encoded(Image.fromarray(BITS_16), "PNG")), BITS_8),
    "16-bit-big-endian": (value(Image.fromarray(BITS_16.astype(">u2"))), BITS_8),
    # Transparency: as a viewer shows it on white, whatever the hidden colours
    "rgba": (value(transparent("RGBA")), HALF_RED),
    "rgba-path": (path("a.png", encoded(transparent("RGBA"), "PNG")), HALF_RED),
    "rgba-webp": (data(encoded(transparent("RGBA"), "WEBP", lossless=True)), HALF_RED),
    "premultiplied": (value(transparent("RGBA").convert("RGBa")), HALF_RED),
    "grey-with-alpha": (value(transparent("LA")), ImageOps.grayscale(HALF_RED).convert("RGB")),
    "palette-with-alpha": (value(transparent("PA")), HALF_RED),
    "palette-with-transparency": (data(encoded(transparent("RGBA"), "GIF")), HALF_RED),
    "transparent-colour": (data(encoded(transparent("RGB"), "PNG", **BLACK_IS_TRANSPARENT)), HALF_RED),
    "transparent-grey": (
        path("a.png", encoded(transparent("L"), "PNG", transparency=0)),
        ImageOps.grayscale(HALF_RED).convert("RGB"),
    ),
    # The first of several frames
    "animated-gif": (path("a.gif", GIF), PALETTE.convert("RGB")),
    "animated-webp": (path("a.webp", encoded(NOISE, "WEBP", **ANIMATED)), NOISE),
    "animated-png": (data(encoded(NOISE, "PNG", **ANIMATED)), NOISE),
    "pages-of-tiff": (data(encoded(NOISE, "TIFF", save_all=True, append_images=[WIDE])), NOISE),
    "pictures-of-mpo": (
        data(encoded(NOISE, "MPO", save_all=True, append_images=[WIDE])),
        Image.open(io.BytesIO(JPEG)),
    ),
    # Orientation
    "exif-1": (data(turned(1)), WIDE),
    "exif-2": (data(turned(2)), ImageOps.mirror(WIDE)),
    "exif-3": (data(turned(3)), WIDE.rotate(180)),
    "exif-4": (path("a.png", turned(4)), ImageOps.flip(WIDE)),
    "exif-5": (data(turned(5)), WIDE.transpose(Image.Transpose.TRANSPOSE)),
    "exif-6": (path("a.png", turned(6)), WIDE.rotate(-90, expand=True)),
    "exif-7": (data(turned(7)), WIDE.transpose(Image.Transpose.TRANSVERSE)),
    "exif-8": (lambda folder: Image.open(io.BytesIO(turned(8))), WIDE.rotate(90, expand=True)),
    "invalid-exif-orientation": (data(turned(77)), WIDE),
}

# The image and the expected error
REFUSED = {
    "none": (value(None), f"An image (None) cannot be read: {NO_TYPE} NoneType. Replace it"),
    "number": (value(5), f"(5) cannot be read: {NO_TYPE} int"),
    "bare-bytes": (value(PNG), f"{NO_TYPE} bytes"),
    "array": (value(np.asarray(NOISE)), f"{NO_TYPE} ndarray"),
    "nested-list": (value([NOISE]), f"{NO_TYPE} list"),
    "empty-dict": (value({}), f"({{}}) cannot be read: {NO_TYPE}"),
    "neither-bytes-nor-path": (value({"bytes": None, "path": None}), NO_TYPE),
    # Locations
    "missing-file": (lambda folder: str(folder / "gone.png"), f"gone.png') cannot be read: {NO_FILE}"),
    "missing-file-in-dict": (value({"bytes": None, "path": "/no/a.png"}), f"('/no/a.png') cannot be read: {NO_FILE}"),
    "directory": (str, NO_FILE),
    "pipe": (pipe, NO_FILE),
    "device": (value("/dev/zero"), NO_FILE),
    "empty-path": (value(""), f"An image ('') cannot be read: {NO_FILE}"),
    "nul-in-path": (value("a\0.png"), "An image ('a\\x00.png') cannot be read: "),
    "long-path": (value("a" * 10_000), "aaa…) cannot be read: File name too long"),
    "closed-port": (value("http://127.0.0.1:9/a.png"), "('http://127.0.0.1:9/a.png') cannot be read: <urlopen"),
    "closed-port-in-dict": (value({"bytes": None, "path": "http://127.0.0.1:9/a.png"}), "Connection refused"),
    "unknown-scheme": (value("gopher://a/b.png"), "('gopher://a/b.png') cannot be read: Protocol not known"),
    "data-url-of-text": (value("data:text/plain,hello"), NO_IMAGE),
    # Damage
    "no-bytes": (data(b""), f"An image (0 bytes) cannot be read: {NO_IMAGE}"),
    "empty-file": (path("a.png", b""), NO_IMAGE),
    "text": (path("a.png", b"no image at all"), NO_IMAGE),
    "html": (path("a.png", b"<!DOCTYPE html><title>404</title>"), NO_IMAGE),
    "svg": (path("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), NO_IMAGE),
    "signature-only": (data(PNG[:8]), "An image (8 bytes) cannot be read: "),
    "truncated-png": (path("a.png", PNG[:-200]), "a.png') cannot be read: image file is truncated"),
    "truncated-png-bytes": (data(PNG[:-200]), "cannot be read: image file is truncated"),
    "truncated-jpeg": (path("a.jpg", JPEG[:-200]), "cannot be read: image file is truncated"),
    "truncated-gif": (data(encoded(PALETTE, "GIF")[:-900]), "cannot be read: image file is truncated"),
    "truncated-webp": (data(encoded(NOISE, "WEBP")[:-900]), "cannot be read: "),
    "truncated-opened-file": (lambda folder: Image.open(io.BytesIO(PNG[:-200])), "image file is truncated"),
    "flipped-bits": (data(PNG[:60] + bytes([PNG[60] ^ 255]) + PNG[61:]), "cannot be read: broken data stream"),
    # Sizes
    "no-pixels": (value(Image.new("RGB", (0, 5))), "cannot be read: it has 0×5 pixels"),
    "20000x20000-png": (data(png_that_says(20_000, 20_000)), "(400000000 pixels) exceeds limit of 178956970 pixels"),
    "20000x20000-bilevel": (lambda folder: Image.new("1", (20_000, 20_000)), "its 20000×20000 pixels exceed"),
    "largest-png": (data(png_that_says(2**31 - 1, 2**31 - 1)), "decompression bomb"),
    "bomb-in-text": (data(BOMB_IN_TEXT), "Decompressed data too large"),
    # Pixels of unknown range
    "32-bit": (value(Image.new("I", (64, 64), 70_000)), "mode 'I' have no known range. Scale them to 8 bits"),
    "float": (data(encoded(Image.new("F", (64, 64), 0.5), "TIFF")), "mode 'F' have no known range"),
}


# --- Tests ---


@pytest.fixture(scope="module")
def processor():
    return make_processor()


@pytest.fixture(scope="module")
def trainer(processor):
    return build(Dataset.from_list(make_rows(1)), processor=processor, max_completion_length=2)


def row_with(image) -> dict:
    return {**make_rows(1)[0], "images": [image]}


def in_cues(image) -> Image.Image:
    """The image that a cue generator receives."""
    (message,) = cue_messages(row_with(image), "prompt", CUE_PROMPT)[1:]
    return message["content"][0]["image"]


def in_heatmap(image) -> Image.Image:
    """The image that the heat map is drawn over."""
    _, (loaded,) = load_images([{"role": "user", "content": [{"type": "image", "image": image}]}])
    return loaded


@pytest.mark.parametrize("make, picture", ACCEPTED.values(), ids=ACCEPTED)
def test_trainer_generator_and_heatmap_see_the_same_picture(tmp_path, trainer, processor, make, picture):
    row = row_with(make(tmp_path))
    assert image_size(row["images"][0]) == picture.size
    trainer._row_checker.check(row)
    for seen in (read_image(make(tmp_path)), in_cues(make(tmp_path)), in_heatmap(make(tmp_path))):
        assert seen.mode == "RGB" and np.array_equal(np.asarray(seen), np.asarray(picture))

    batch = trainer._generate_and_score_completions([row])
    expected = processor.image_processor([picture], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    num_tokens = int(expected["image_grid_thw"].prod()) // 4
    for prompt_ids in (batch["prompt_ids"], batch["teacher_prompt_ids"]):
        assert (prompt_ids == processor.image_token_id).sum() == num_tokens


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_bad_image_is_refused(tmp_path, trainer, make, message):
    with pytest.raises(ValueError) as refusal:
        with_row_number(trainer._row_checker.check, lambda: row_with(make(tmp_path)), "Row 0")
    assert str(refusal.value).startswith("Row 0: An image (") and message in str(refusal.value)
    assert len(str(refusal.value)) < 600
    for see in (in_cues, in_heatmap):
        (tmp_path / see.__name__).mkdir()
        with pytest.raises(ValueError) as refusal:
            see(make(tmp_path / see.__name__))
        assert message in str(refusal.value)


def test_shape_that_the_processor_refuses(trainer):
    with pytest.raises(ValueError, match=r"does not accept images of the sizes \[\(1000, 1\)\], in pixels: .*Crop or"):
        trainer._row_checker.check(row_with(make_image(0, (1000, 1))))


def test_pillows_size_limit_applies(trainer, monkeypatch):
    image = make_image(0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", image.width * image.height // 2 - 1)
    with pytest.raises(ValueError, match="its 64×64 pixels exceed the limit of 4094"):
        trainer._row_checker.check(row_with(image))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    trainer._row_checker.check(row_with(image))
