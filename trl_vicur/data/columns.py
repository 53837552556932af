"""Which columns of a dataset hold the question, the images and what else cues are made and audited from."""

from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset


def check_dataset(dataset: Dataset) -> None:
    """
    Raises:
        `TypeError`: If it is no map-style dataset of one split.
        `ValueError`: If it has no rows.
    """
    if isinstance(dataset, DatasetDict):
        raise TypeError(f"Expected one split, got a DatasetDict with the splits {list(dataset)}. Choose one of them.")
    if isinstance(dataset, IterableDataset):
        raise TypeError(
            "Expected a `Dataset`, got an `IterableDataset`: an interrupted run finds its rows again by number. "
            "Load it without `streaming=True`; it is read from disk row by row."
        )
    if not isinstance(dataset, Dataset):
        raise TypeError(f"Expected a `datasets.Dataset`, got {type(dataset).__name__}.")
    if len(dataset) == 0:
        raise ValueError("The dataset has no rows.")


def find_question_column(dataset: Dataset, question_column: str | None) -> str:
    """
    The column with the questions: the given one, or else `prompt` or `question`.

    Raises:
        `ValueError`: If there is no such column.
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
    The column with the images, `images` or `image`.

    Raises:
        `ValueError`: If there is no such column.
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
        `ValueError`: If one of the columns is missing; names the argument that asks for it.
    """
    for argument, column in columns.items():
        if column not in dataset.column_names:
            raise ValueError(f"`{argument}` is {column!r}, but the dataset has only {dataset.column_names}.")


def set_column(dataset: Dataset, name: str, values: list[Any], feature: Any) -> Dataset:
    """The dataset with a column of the given values and feature, in place of the one of that name, if there is one."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns([name])
    return dataset.add_column(name, values, feature=feature)
