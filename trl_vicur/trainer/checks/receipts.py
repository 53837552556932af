"""
Remembers which datasets have passed the row check, so that a resumed run need not check a million rows again.

A dataset that has passed leaves an empty file, its receipt, in the cache of `datasets`. The file's name is a digest of
everything that the result depends on, so a receipt is never out of date, and a killed check leaves none.
"""

import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import datasets.config
import pyarrow as pa
from datasets import Dataset

from ...data.rows import VISUAL_COLUMNS
from .rows import RowChecker


logger = logging.getLogger(__name__)

# Checking fewer rows is faster than computing the digest
MIN_ROWS = 100


def receipt_of(dataset: Dataset, checker: RowChecker) -> Path | None:
    """
    The file that exists if all rows of the dataset have passed this check.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset.
        checker ([`RowChecker`]):
            Checks a row.

    Returns:
        `Path` or `None`: `None` if the dataset is small, if caching is off ([`~datasets.disable_caching`]), or if rows
            could change unnoticed because a transform computes them or their images are URLs.
    """
    if len(dataset) < MIN_ROWS or not datasets.is_caching_enabled() or dataset.format["type"] is not None:
        return None
    try:
        files = [_file_state(file["filename"]) for file in dataset.cache_files]
        for column in VISUAL_COLUMNS:
            if column in dataset.column_names:
                for chunk in dataset.data.column(column).chunks:
                    files += map(_file_state, _paths(chunk))
    except ValueError:
        return None
    # A dataset loaded from disk reads its fingerprint from a file there, so include the state of its data files
    parts = (dataset._fingerprint, len(dataset), dataset.column_names, files, checker.digest)
    name = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE, "trl_vicur_checked_datasets", name)


def write_receipt(receipt: Path) -> None:
    """Record that a dataset has passed. If the file cannot be written, the next run checks again."""
    try:
        receipt.parent.mkdir(parents=True, exist_ok=True)
        receipt.touch()
    except OSError as error:
        logger.warning(f"The next run will check the rows again, because {receipt} cannot be written ({error}).")


def _file_state(path: str) -> tuple[str, int, int] | str:
    """Size and modification time, to notice changes. For a missing file only the path; the row check reports it."""
    try:
        state = os.stat(path)
    except OSError:
        return path
    return path, state.st_size, state.st_mtime_ns


def _paths(values: pa.Array) -> Iterator[str]:
    """
    Paths of a column's images and videos that are stored in files outside the dataset.

    Raises:
        `ValueError`: If one is a URL, or if the column cannot hold images or videos.
    """
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    kind = values.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _paths(values.flatten())
    elif pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}:
        fields = dict(zip([field.name for field in kind], values.flatten(), strict=True))
        yield from _paths(fields["path"].filter(fields["bytes"].is_null()))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        for path in values.to_pylist():
            if path is not None and not path.startswith("data:"):
                if "://" in path:
                    raise ValueError(f"{path} may change unnoticed.")
                yield path
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        raise ValueError(f"{kind} is not a type of images or videos.")
