"""Find and check the dataset columns from which cues are generated and audited."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset


def check_dataset(dataset: Dataset) -> None:
    """
    Raises:
        `TypeError`: If it is not a map-style dataset of one split.
        `ValueError`: If it has no rows.
    """
    if isinstance(dataset, DatasetDict):
        raise TypeError(f"Expected one split, got a DatasetDict with the splits {list(dataset)}. Choose one of them.")
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "Expected a `Dataset`, got an `IterableDataset`, but resuming needs row numbers. Load it without "
            "`streaming=True`; a `Dataset` is also read from disk row by row."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(f"Expected a `datasets.Dataset`, got {type(dataset).__name__}.")
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows.")


def find_question_column(dataset: Dataset, question_column: str | None) -> str:
    """
    The column of questions: the given one, by default `prompt` or `question`.

    Raises:
        `ValueError`: If the dataset has no such column.
    """
    candidates = ["prompt", "question"] if question_column is None else [question_column]
    for column in candidates:
        if column in dataset.column_names:
            return column
    raise ValueError(
        f"The dataset has no column {' or '.join(map(repr, candidates))}, only {dataset.column_names}. Name the one "
        "that holds the questions with `question_column`."
    )


def find_image_column(dataset: Dataset) -> str:
    """
    The column of images, `images` or `image`.

    Raises:
        `ValueError`: If the dataset has no such column.
    """
    for column in ("images", "image"):
        if column in dataset.column_names:
            return column
    raise ValueError(
        f"The dataset has no column 'images' or 'image', only {dataset.column_names}. Rename the one that holds the "
        "images with `dataset.rename_column`."
    )


def check_columns(dataset: Dataset, **columns: str) -> None:
    """
    Raises:
        `ValueError`: If a column is missing. The error names the argument that requires it.
    """
    for argument, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(f"`{argument}` is {column!r}, but the dataset has only {dataset.column_names}.")


def set_column(dataset: Dataset, name: str, values: list[Any], feature: Any) -> Dataset:
    """Add a column, or replace the one of that name."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns([name])
    return dataset.add_column(name, values, feature=feature)


def set_columns(dataset: Dataset, columns: dict[str, list[Any]], feature: Any) -> Dataset:
    """Set several columns of the same feature, see [`set_column`]."""
    for name, values in columns.items():
        dataset = set_column(dataset, name, values, feature)
    return dataset


def iterate_rows(dataset: Dataset, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The given columns of each row, as Python objects, whatever the dataset's format."""
    for row in dataset.select_columns(columns).with_format(None):
        assert isinstance(row, dict)  # `datasets` annotates rows of any format
        yield row


def iterate_tables(dataset: Dataset, columns: list[str], batch_size: int = 1000) -> Iterator[pa.Table]:
    """The given columns of a dataset in batches of rows, with images as they are stored."""
    for table in dataset.select_columns(columns).with_format("arrow").iter(batch_size):
        assert isinstance(table, pa.Table)  # `datasets` annotates batches of any format
        yield table
