"""A folder that holds a dataset and what the next run needs beside it. The dataset appears whole or not at all."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, concatenate_datasets, load_from_disk

from .full_disk import explain_full_disk


UNFINISHED = "unfinished"  # folder within the folder, where a dataset is before it is whole
CUE_STORE = "cues.sqlite"  # responses of the cue generator, beside the dataset made from them
STATE = "state.json"  # without it, `load_from_disk` sees no dataset


def prepare_folder(folder: Path, *markers: str) -> None:
    """
    Make the folder, or check that it is one that a run may go on in, which one of the files `markers` tells.

    Raises:
        `ValueError`: If it holds files of somebody else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {str(folder)!r} is a file. Name a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    is_ours = any((folder / marker).exists() for marker in markers)
    if not is_ours and (files := sorted(path.name for path in folder.iterdir())):
        raise ValueError(
            f"The output {str(folder)!r} holds files of something else ({', '.join(files[:5])}). Name a new folder, "
            "or one that an earlier run began."
        )


def save_dataset(
    dataset: Dataset, folder: Path, columns: Iterator[pa.RecordBatch] | None = None, schema: pa.Schema | None = None
) -> Dataset:
    """
    Save a dataset in the folder, in place of the one that is there.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset; its images are copied into the folder.
        folder (`Path`):
            The folder.
        columns (`Iterator[pyarrow.RecordBatch]`, *optional*):
            Columns to add, in batches of rows; they replace those of the same names. They pass through a file, not
            through memory.
        schema (`pyarrow.Schema`, *optional*):
            Their names and types.

    Returns:
        [`~datasets.Dataset`]: The dataset, loaded from the folder.

    Raises:
        `OSError`: If the disk is full. The dataset that was there before is still whole.
    """
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # of a killed process
    try:
        with explain_full_disk(folder):
            unfinished.mkdir(parents=True)
            if columns is not None:
                with (
                    pa.OSFile(str(unfinished / "columns.arrow"), "wb") as sink,
                    pa.ipc.new_stream(sink, schema) as writer,
                ):
                    for batch in columns:
                        writer.write_batch(batch)
                dataset = dataset.remove_columns([name for name in schema.names if name in dataset.column_names])
                added = Dataset.from_file(str(unfinished / "columns.arrow"))
                dataset = concatenate_datasets([dataset.with_format(None), added], axis=1)
            dataset.save_to_disk(str(unfinished / "dataset"))
        # From here on the new files are whole, and renaming them needs no space. Of a process that is killed in
        # between, no dataset is left to be seen, but the next run makes it again from what is stored beside it.
        (folder / STATE).unlink(missing_ok=True)
        for path in folder.glob("data-*.arrow"):
            path.unlink()
        files = sorted((unfinished / "dataset").iterdir(), key=lambda path: path.name == STATE)  # the state comes last
        for path in files:
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return load_from_disk(str(folder))
