"""A folder with a dataset and the files that the next run needs. The dataset is written completely or not at all."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, concatenate_datasets

from .full_disk import explain_full_disk


UNFINISHED = "unfinished"  # subfolder that a dataset is first written to
CUE_STORE = "cues.sqlite"  # responses of the cue generator
STATE = "state.json"  # `load_from_disk` needs it to recognize a dataset


def prepare_folder(folder: Path, *markers: str) -> None:
    """
    Create the folder, or check that an earlier run can be resumed in it.

    Args:
        folder (`Path`):
            The folder.
        markers (`str`):
            Names of files; the folder of an earlier run has at least one of them.

    Raises:
        `ValueError`: If the folder contains other files.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {str(folder)!r} is a file. Give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    is_ours = any((folder / marker).exists() for marker in markers)
    if not is_ours and (files := sorted(path.name for path in folder.iterdir())):
        raise ValueError(
            f"The output {str(folder)!r} contains other files ({', '.join(files[:5])}). Give a new folder, or one "
            "that an earlier run created."
        )


def save_dataset(
    dataset: Dataset, folder: Path, columns: Iterator[pa.RecordBatch] | None = None, schema: pa.Schema | None = None
) -> Dataset:
    """
    Save a dataset in the folder, replacing an earlier one.

    Args:
        dataset ([`~datasets.Dataset`]):
            The dataset; its images are copied into the folder.
        folder (`Path`):
            The folder.
        columns (`Iterator[pyarrow.RecordBatch]`, *optional*):
            Columns to add, in batches of rows; they replace columns of the same names. They are written to a file
            batch by batch, not collected in memory.
        schema (`pyarrow.Schema`, *optional*):
            Names and types of `columns`.

    Returns:
        [`~datasets.Dataset`]: The dataset, loaded from the folder.

    Raises:
        `OSError`: If the disk is full. The earlier dataset is then unchanged.
    """
    unfinished = folder / UNFINISHED
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed process
    try:
        with explain_full_disk(folder):
            unfinished.mkdir(parents=True)
            if columns is not None:
                assert schema is not None  # given with `columns`
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
        # The new files are complete, and renaming them needs no disk space. If the process is killed during the
        # renames, the folder has no valid dataset, but the next run writes it again from the stored responses.
        (folder / STATE).unlink(missing_ok=True)
        for path in folder.glob("data-*.arrow"):
            path.unlink()
        files = sorted((unfinished / "dataset").iterdir(), key=lambda path: path.name == STATE)  # the state last
        for path in files:
            path.replace(folder / path.name)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return Dataset.load_from_disk(str(folder))
