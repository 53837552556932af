"""Crops of the student's images to a dataset's boxes, for the teacher."""

import json

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trl_vicur.data.crops import crop_images


def picture(width: int = 40, height: int = 20) -> Image.Image:
    """Red but for a blue rectangle from (10, 5) to (20, 15)."""
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (10, 5, 20, 15))
    return image


BLUE = Image.new("RGB", (10, 10), "blue")


@pytest.mark.parametrize(
    "boxes, options",
    [
        ([10, 5, 20, 15], {}),
        ([[10, 5, 20, 15]], {}),
        ({"bbox_2d": [10, 5, 20, 15], "label": "blue"}, {}),
        ([{"bbox_2d": [10, 5, 20, 15], "label": "blue"}], {}),
        (json.dumps([{"bbox_2d": [10, 5, 20, 15]}]), {}),
        ([{"bbox": [10, 5, 10, 10], "category_id": 3}], {"box_format": "xywh"}),
        ([10.0, 5.0, 10.0, 10.0], {"box_format": "xywh"}),
        ([250, 250, 500, 750], {"box_unit": "thousandths"}),
        ([0.25, 0.25, 0.5, 0.75], {"box_unit": "fractions"}),
    ],
)
def test_boxes_as_datasets_write_them(boxes, options):
    dataset = Dataset.from_list([{"images": [picture()], "bbox": boxes}])
    crops = crop_images(dataset, "bbox", margin=0.0, **options)[0]["teacher_images"]
    assert [crop.tobytes() for crop in crops] == [BLUE.tobytes()]
    assert crops[0].size == BLUE.size


def test_the_image_of_a_box_can_be_named():
    row = {"images": [Image.new("RGB", (40, 20)), picture()], "objects": [{"image": 1, "bbox": [10, 5, 20, 15]}]}
    crops = crop_images(Dataset.from_list([row]), "objects", margin=0.0)[0]["teacher_images"]
    assert crops[0].tobytes() == BLUE.tobytes()


def test_rows_without_boxes_have_no_images_for_the_teacher():
    rows = [{"image": picture(), "bbox": [10, 5, 20, 15]}, {"image": picture(), "bbox": None}]
    dataset = crop_images(Dataset.from_list(rows), "bbox")
    assert [row["teacher_images"] is None for row in dataset] == [False, True]
    assert dataset.column_names == ["image", "bbox", "teacher_images"]


@pytest.mark.parametrize(
    "boxes, options, message",
    [
        ([10, 5, 60, 15], {}, r"Row 1: the box \[10, 5, 60, 15\] is outside its image of 40×20 pixels, in pixels"),
        ([20, 5, 10, 15], {}, r"Row 1: the box \[20, 5, 10, 15\] is empty as 'xyxy'. Check `box_format`"),
        ([10, 5, 20], {}, r"Row 1: the box \[10, 5, 20\] is not four numbers"),
        ([{"bbox": [1, 2, 3, 4], "image": 2}], {}, r"is in image 2, but the row has 1 image\(s\)"),
        ("10 5 20 15", {}, "Row 1: the boxes are '10 5 20 15', expected JSON"),
        ([10, 5, 20, 15], {"box_format": "cxcywh"}, "`box_format` is 'cxcywh', expected one of"),
        ([10, 5, 20, 15], {"box_unit": "percent"}, "`box_unit` is 'percent', expected one of"),
        ([10, 5, 20, 15], {"margin": -1.0}, "`margin` must not be negative, got -1.0"),
        ([10, 5, 20, 15], {"box_column": "boxes"}, "`box_column` is 'boxes', but the dataset has only"),
    ],
)
def test_bad_boxes_are_refused(boxes, options, message):
    rows = [{"images": [picture()], "bbox": None}, {"images": [picture()], "bbox": boxes}]
    with pytest.raises(ValueError, match=message):
        crop_images(Dataset.from_list(rows), **{"box_column": "bbox", **options})


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_a_crop_contains_its_box(data):
    width, height = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    right, bottom = data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height))
    image = Image.new("RGB", (width, height), "red")
    image.paste("blue", (left, top, right, bottom))
    margin = data.draw(st.floats(0, 2))
    dataset = Dataset.from_list([{"images": [image], "bbox": [left, top, right, bottom]}])
    crop = crop_images(dataset, "bbox", margin=margin)[0]["teacher_images"][0]
    is_blue = (np.asarray(crop) == (0, 0, 255)).all(axis=-1)
    assert is_blue.sum() == (right - left) * (bottom - top)
