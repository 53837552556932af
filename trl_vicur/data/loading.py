"""Load a dataset by name: an id on the Hub, a folder, or a file."""

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, overload

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .dataset_folder import CUE_STORE, STATE
from .layouts import Layout, read_layout


FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
}


@overload
def load_split(
    name: str, config_name: str | None = None, split: str = "train", streaming: Literal[False] = False
) -> Dataset: ...
@overload
def load_split(
    name: str, config_name: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset: ...
def load_split(
    name: str, config_name: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Load a split of a dataset from the Hub, from a folder that `save_to_disk` wrote, or from a file.

    Args:
        name (`str`):
            Id on the Hub; folder of `save_to_disk`, of images with a `metadata.jsonl`, or of any other files that
            `datasets` reads; or file of JSON lines, CSV, Parquet or Arrow, or WebDataset shard (`.tar`).
        config_name (`str`, *optional*):
            Configuration of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Name of the split; files have only one.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether to return a stream, whose rows are read when they are used.

    Raises:
        `ValueError`: If the dataset or split does not exist, or a file is corrupt.
    """
    path = Path(name)
    if (path / CUE_STORE).exists() and not (path / STATE).exists():
        raise ValueError(f"The generation of cues in {name!r} has not finished. Run its command again to finish it.")
    if (path / STATE).exists() or (path / "dataset_dict.json").exists():
        dataset = load_from_disk(name)
        if isinstance(dataset, DatasetDict):
            if split not in dataset:
                raise ValueError(f"{name!r} has no split {split!r}, only {list(dataset)}. Choose one of them.")
            dataset = dataset[split]
        return dataset.to_iterable_dataset() if streaming else dataset
    if _is_path(name) and not path.exists():
        siblings = [str(each) for each in path.parent.iterdir()] if path.parent.is_dir() else []
        similar = get_close_matches(str(path), siblings, n=1)
        hint = f"Did you mean {similar[0]!r}?" if similar else "Check the path."
        raise ValueError(f"There is no file or folder {name!r}. {hint}")
    source, data_files = str(path.absolute()) if path.is_dir() else name, None
    options: dict[str, Any] = {}
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{name!r} cannot be read. Supported files: {', '.join(FORMATS)}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{name!r} is empty. Write it again.")
        source, config_name, data_files, split = FORMATS[path.suffix], None, name, "train"
        options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        # The overloads of `load_dataset` lack a `streaming` that is not a literal
        return load_dataset(  # pyright: ignore[reportCallIssue]
            source,
            config_name,
            data_files=data_files,
            split=split,
            streaming=streaming,  # pyright: ignore[reportArgumentType]
            **options,
        )
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be read: {error.__cause__ or error}") from error


@overload
def load_rows(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    streaming: Literal[False] = False,
    columns: Mapping[str, str] | None = None,
) -> tuple[Dataset, Layout]: ...
@overload
def load_rows(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
) -> tuple[Dataset | IterableDataset, Layout]: ...
def load_rows(
    name: str,
    config_name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
) -> tuple[Dataset | IterableDataset, Layout]:
    """
    Load a split of a dataset of any layout as `prompt`, `images` and `answer`, see [`read_layout`].

    Args:
        name, config_name, split, streaming:
            As in [`load_split`]. Relative paths of images start from the file or folder of this name.
        columns (`dict[str, str]`, *optional*):
            As in [`find_layout`].

    Returns:
        `tuple[Dataset | IterableDataset, Layout]`: The dataset, and the layout that was recognized.

    Raises:
        `ValueError`: As [`load_split`] and [`read_layout`]; names the dataset.
    """
    dataset = load_split(name, config_name, split, streaming)
    path = Path(name).absolute()
    folder = path if path.is_dir() else path.parent if path.is_file() else None
    try:
        return read_layout(dataset, columns, folder)
    except ValueError as error:
        raise ValueError(f"{name!r} cannot be read: {error}") from error


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: ids on the Hub have one slash and no suffix of a data file."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in FORMATS
