"""Names of models and datasets: ids on the Hub, or local paths, which must not be published."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from datasets import Dataset, IterableDataset


@contextmanager
def naming_model(name: str) -> Iterator[None]:
    """
    Add the model's name to errors of loading it, because Hugging Face's messages do not always contain it.

    Args:
        name (`str`):
            Id or folder of the model.

    Raises:
        `OSError`: Instead of an `OSError` or `ValueError`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise OSError(f"The model {name!r} cannot be loaded: {error}") from error


def hub_model_name(name: str | None) -> str | None:
    """The model's id on the Hub; `None` for a local folder."""
    return None if not name or Path(name).is_dir() or Path(name).is_absolute() else name


def hub_dataset_name(dataset: Dataset | IterableDataset | None, name: str | None = None) -> str | None:
    """
    A dataset's id on the Hub, from the given name or from the source of its files.

    Returns:
        `str` or `None`: The id; `None` for a local dataset.
    """
    if name is not None:
        return None if os.path.exists(name) else name
    sources = (dataset.info.download_checksums if dataset is not None else None) or {}
    names = {match[1] for source in sources if (match := re.match(r"hf://datasets/([^@/]+/[^@/]+)[@/]", source))}
    return names.pop() if len(names) == 1 else None
