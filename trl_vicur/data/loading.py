"""Datasets by their name: an id on the Hub, a folder, or a file."""

from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError

from .dataset_folder import CUE_STORE, STATE


FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}


def load_split(
    name: str, config_name: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """
    Load a split of a dataset from the Hub, from a folder of `save_to_disk`, or from a file, which is its only split.

    Args:
        name (`str`):
            Id on the Hub, folder, or file of JSON lines, CSV, Parquet or Arrow.
        config_name (`str`, *optional*):
            Configuration of a dataset on the Hub.
        split (`str`, *optional*, defaults to `"train"`):
            Split, where the dataset has some.
        streaming (`bool`, *optional*, defaults to `False`):
            Whether rows are read when they are asked for. What `save_to_disk` left is read so in any case.

    Raises:
        `ValueError`: If there is no such dataset or split, or if a file is damaged.
    """
    path = Path(name)
    if (path / CUE_STORE).exists() and not (path / STATE).exists():
        raise ValueError(f"The generation of cues in {name!r} has not finished. Run its command again to finish it.")
    if (path / STATE).exists() or (path / "dataset_dict.json").exists():
        dataset = load_from_disk(name)
    else:
        source = {"path": name, "name": config_name, "split": split}
        if path.is_file():
            if path.suffix not in FORMATS:
                raise ValueError(f"{name!r} is none of the kinds of files that can be read: {', '.join(FORMATS)}.")
            if path.stat().st_size == 0:
                raise ValueError(f"{name!r} is empty. Write it again.")
            source = {"path": FORMATS[path.suffix], "data_files": name, "split": "train"}
        try:
            return load_dataset(**source, streaming=streaming)
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(f"{name!r} cannot be read: {error.__cause__ or error}") from error
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise ValueError(f"{name!r} has no split {split!r}, only {list(dataset)}. Choose one of them.")
        dataset = dataset[split]
    return dataset
