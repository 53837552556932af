"""Reads the images and videos of a dataset row, and rows without decoding their images."""

from typing import Any

from datasets import Dataset


VISUAL_COLUMNS = ("images", "image", "videos", "video")


def row_images(row: dict[str, Any]) -> list:
    """
    The images of a row, from its column `images` or `image`; an empty list for a row without images.

    Raises:
        `ValueError`: If `images` is not a list.
    """
    return _list_of(row, "image")


def row_videos(row: dict[str, Any]) -> list:
    """
    The videos of a row, from its column `videos` or `video`; an empty list for a row without videos.

    Raises:
        `ValueError`: If `videos` is not a list.
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


class RowReader:
    """
    Read rows without decoding their images, which takes most of the time; [`image_size`] checks images instead.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
    """

    def __init__(self, dataset: Dataset):
        # A user's transform or format expects complete rows
        is_formatted = dataset.format["type"] is not None
        columns = [] if is_formatted else [column for column in VISUAL_COLUMNS if column in dataset.column_names]
        self.visuals = dataset.select_columns(columns).with_format("arrow") if columns else None
        self.others = dataset.remove_columns(columns) if columns else dataset

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.others[number]
        if self.visuals is None:
            return row
        visuals: Any = self.visuals[number]  # a table; datasets annotates the rows of every format as dicts
        return {**row, **visuals.to_pylist()[0]}


def shorten(value: Any) -> str:
    """A value's `repr` for error messages, cut after 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
