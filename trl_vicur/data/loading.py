"""Load a dataset by name: an id on the Hub, a folder, or a file."""

from pathlib import Path
from typing import Literal, overload

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .dataset_folder import CUE_STORE, STATE


FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


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
            Id on the Hub, folder, or file in JSON lines, CSV, Parquet or Arrow format.
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
    source, data_files = name, None
    if path.is_file():
        if path.suffix not in FORMATS:
            raise ValueError(f"{name!r} cannot be read. Supported files: {', '.join(FORMATS)}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{name!r} is empty. Write it again.")
        source, config_name, data_files, split = FORMATS[path.suffix], None, name, "train"
    try:
        # The overloads of `load_dataset` lack a `streaming` that is not a literal
        return load_dataset(  # pyright: ignore[reportCallIssue]
            source,
            config_name,
            data_files=data_files,
            split=split,
            streaming=streaming,  # pyright: ignore[reportArgumentType]
        )
    except (DatasetGenerationError, ValueError) as error:
        raise ValueError(f"{name!r} cannot be read: {error.__cause__ or error}") from error
