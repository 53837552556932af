"""Images for the teacher alone: crops of the student's images to boxes that a dataset names."""

import json
from collections.abc import Iterator
from typing import Any, Literal, get_args

from datasets import Dataset, Features, List, concatenate_datasets
from datasets import Image as ImageFeature
from PIL import Image

from .columns import check_columns, find_image_column
from .images import read_image
from .rows import row_images, shorten


BoxFormat = Literal["xyxy", "xywh"]
BoxUnit = Literal["pixels", "thousandths", "fractions"]
# Keys of boxes within a row's objects: Qwen-VL's, COCO's, and other spellings
BOX_KEYS = ("bbox_2d", "bbox", "box")


def crop_images(
    dataset: Dataset,
    box_column: str,
    box_format: BoxFormat = "xyxy",
    box_unit: BoxUnit = "pixels",
    margin: float = 0.1,
) -> Dataset:
    """
    Add the column `teacher_images`: each row's image, cropped to the row's boxes.

    Args:
        dataset ([`~datasets.Dataset`]):
            Dataset with a column `images` or `image` and one with boxes.
        box_column (`str`):
            Column with one box per row, or a list of boxes. A box is four numbers; a dict with `bbox_2d` (Qwen-VL),
            `bbox` (COCO) or `box`, and with `image`, the number of the image, if the row has several; or either as
            a JSON string.
        box_format (`str`, *optional*, defaults to `"xyxy"`):
            `"xyxy"` for left, top, right and bottom (Qwen-VL), `"xywh"` for left, top, width and height (COCO).
        box_unit (`str`, *optional*, defaults to `"pixels"`):
            `"pixels"` (COCO, Qwen2.5-VL), `"thousandths"` of the image's sides (Qwen3-VL), or `"fractions"` of them.
        margin (`float`, *optional*, defaults to `0.1`):
            Width of the surroundings that a crop keeps on each side, as a fraction of the box's longer side.

    Returns:
        [`~datasets.Dataset`]: The dataset with `teacher_images`, a list of crops for each row. Rows without a box have
        `None`: the teacher sees the student's images.

    Raises:
        `ValueError`: If an option is unknown, a column is missing, or a box is malformed or outside its image; names
            the row by its number.
    """
    check_columns(dataset, box_column=box_column)
    for name, value, choices in (("box_format", box_format, BoxFormat), ("box_unit", box_unit, BoxUnit)):
        if value not in get_args(choices):
            raise ValueError(f"`{name}` is {value!r}, expected one of {list(get_args(choices))}.")
    if margin < 0:
        raise ValueError(f"`margin` must not be negative, got {margin}.")

    def crop(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            images = row_images(row)
            boxes = _read_boxes(row[box_column])
            crops = [_crop(images, index, box, box_format, box_unit, margin) for index, box in boxes]
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        return {"teacher_images": crops or None}

    image_column = find_image_column(dataset)
    rows = dataset.select_columns([image_column, box_column])
    features = Features({"teacher_images": List(ImageFeature())})
    crops = rows.map(crop, with_indices=True, remove_columns=rows.column_names, features=features, desc="Cropping")
    others = dataset.remove_columns([name for name in features if name in dataset.column_names])
    return concatenate_datasets([others, crops], axis=1)


def _read_boxes(value: Any) -> Iterator[tuple[int, list[float]]]:
    """The boxes of a row, each with the number of its image."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"the boxes are {shorten(value)}, expected JSON.") from error
    if value is None:
        return
    if isinstance(value, dict) or (isinstance(value, list) and value and _is_number(value[0])):
        value = [value]
    if not isinstance(value, list):
        raise ValueError(f"the boxes are {shorten(value)}, expected a list of boxes.")
    for item in value:
        index, box = 0, item
        if isinstance(item, dict):
            item = {key: part for key, part in item.items() if part is not None}
            index, box = item.get("image", 0), next((item[key] for key in BOX_KEYS if key in item), None)
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise ValueError(f"the box {shorten(item)} is not four numbers, nor a dict with one of {list(BOX_KEYS)}.")
        yield index, box


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _crop(
    images: list, index: int, box: list[float], box_format: BoxFormat, box_unit: BoxUnit, margin: float
) -> Image.Image:
    if not 0 <= index < len(images):
        raise ValueError(f"the box {box} is in image {index}, but the row has {len(images)} image(s).")
    image = read_image(images[index])
    left, top, right, bottom = box if box_format == "xyxy" else (*box[:2], box[0] + box[2], box[1] + box[3])
    if left >= right or top >= bottom:
        raise ValueError(f"the box {box} is empty as {box_format!r}. Check `box_format`.")
    whole = {"pixels": image.size, "thousandths": (1000, 1000), "fractions": (1, 1)}[box_unit]
    # Annotators' boxes may end a pixel behind the edge
    tolerance = 1 / max(image.size)
    if (
        min(left, top) < -tolerance * max(whole)
        or right > whole[0] * (1 + tolerance)
        or bottom > whole[1] * (1 + tolerance)
    ):
        raise ValueError(
            f"the box {box} is outside its image of {image.width}×{image.height} pixels, in {box_unit}. Check "
            "`box_unit`."
        )
    x_scale, y_scale = image.width / whole[0], image.height / whole[1]
    surroundings = margin * max((right - left) * x_scale, (bottom - top) * y_scale)
    return image.crop(
        (
            max(0, round(left * x_scale - surroundings)),
            max(0, round(top * y_scale - surroundings)),
            min(image.width, max(1, round(right * x_scale + surroundings))),
            min(image.height, max(1, round(bottom * y_scale + surroundings))),
        )
    )
