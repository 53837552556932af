"""Names the rows of a stream, so that errors can identify a row."""

from typing import Any

from datasets import Features, IterableDataset, LargeList, List, Value
from datasets import Image as ImageFeature


# Column with the name of each row of a stream
ROW_NAME = "streamed_row_name"


def name_streamed_rows(dataset: IterableDataset, name: str) -> IterableDataset:
    """
    Add a column [`ROW_NAME`] to a stream, so that errors name the row even after rows are shuffled, repeated, skipped
    or split between ranks. Images stay undecoded, so that the check of a row finds unreadable ones.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            The stream. Rows that already have a name keep it.
        name (`str`):
            Name of the stream in errors.

    Returns:
        [`~datasets.IterableDataset`]: The stream with the column.
    """
    features = dataset.features
    if features is not None:
        features = Features({column: _undecoded(feature) for column, feature in features.items()})
        dataset = dataset.cast(features)
        features = Features({**features, ROW_NAME: Value("string")})
    return dataset.map(
        lambda row, number: {ROW_NAME: f"Streamed row {number} of {name}", **row}, with_indices=True, features=features
    )


def _undecoded(feature: Any) -> Any:
    """The feature, with images at any depth left as bytes and paths."""
    if isinstance(feature, dict):
        return {key: _undecoded(value) for key, value in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return type(feature)(_undecoded(feature.feature))
    # If the feature sets a mode, `datasets` must decode and convert the image
    return ImageFeature(decode=False) if isinstance(feature, ImageFeature) and feature.mode is None else feature
