"""Check the columns and all rows of a dataset, in parallel, before any weights are loaded."""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset, Value
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from ...data.layouts import UnknownLayoutError, parse_columns, read_layout
from ...data.rows import RowReader
from ..vicur_config import ViCuRConfig
from .receipts import receipt_of, write_receipt
from .rows import RowChecker, check_columns, with_row_number
from .streams import name_streamed_rows


ROWS_PER_BATCH = 16


def check_dataset(
    dataset: Dataset | IterableDataset, name: str, checker: RowChecker, args: ViCuRConfig, min_rows: int = 1
) -> Dataset | IterableDataset:
    """
    Check a dataset's columns and, unless it is streamed, each of its rows. Each rank checks its share of the rows.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset. The trainer checks rows of a stream as it reads them.
        name (`str`):
            Name of the dataset in errors.
        checker ([`RowChecker`]):
            Checks a row.
        args ([`ViCuRConfig`]):
            Training configuration.
        min_rows (`int`, *optional*, defaults to `1`):
            Smallest number of rows.

    Returns:
        [`~datasets.Dataset`] or [`~datasets.IterableDataset`]: The dataset with TRL's columns, see [`read_prompts`];
        for a stream the result of [`name_streamed_rows`].

    Raises:
        `ValueError`: If it is not a dataset, has too few rows, lacks a column or has a bad row. The error gives the
            column or the row's number.
    """
    dataset = read_prompts(dataset, name, args)
    check_shape(dataset, name, args, min_rows)
    if isinstance(dataset, IterableDataset):
        return name_streamed_rows(dataset, name)
    receipt = receipt_of(dataset, checker)
    if all(_gather_from_ranks(receipt is not None and receipt.exists(), args)):
        return dataset
    first = next(_problems(dataset, name, checker, args), None)
    # Every rank raises the dataset's first problem, not the first of its own share
    if problems := [problem for problem in _gather_from_ranks(first, args) if problem is not None]:
        raise ValueError(min(problems)[1])
    if receipt is not None:
        write_receipt(receipt)
    return dataset


def read_prompts(dataset: Dataset | IterableDataset, name: str, args: ViCuRConfig) -> Dataset | IterableDataset:
    """
    Read a dataset of any known layout as `prompt`, `images` and `answer`, see [`read_layout`]. One with a `prompt` of
    messages stays as it is.

    Raises:
        `ValueError`: If the layout is ambiguous, or if a row does not have it.
    """
    columns = parse_columns(args.columns)
    if not isinstance(dataset, (Dataset, IterableDataset)):  # which `check_shape` refuses
        return dataset
    names = dataset.column_names
    if names is None:  # of a generator's stream
        names = list(next(iter(dataset.take(1)), {}))
    is_text = dataset.features is not None and dataset.features.get("prompt") == Value("string")
    if not columns and "prompt" in names and not is_text:
        return dataset
    try:
        with args.main_process_first(desc=f"reading {name}"):
            return read_layout(dataset, columns)[0]
    except UnknownLayoutError:
        if columns:
            raise
        return dataset
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def find_bad_rows(
    dataset: Dataset | IterableDataset, name: str, checker: RowChecker, args: ViCuRConfig, min_rows: int = 1
) -> Iterator[ValueError]:
    """
    All errors that [`check_dataset`] would raise one after the other while a user fixes the dataset: too few rows,
    then each bad row in order. Same arguments.

    Raises:
        `ValueError`: If it is not a dataset or lacks a column.
    """
    try:
        check_shape(dataset, name, args, min_rows)
    except TooFewRowsError as error:
        yield error
    if isinstance(dataset, Dataset):
        for _, problem in _problems(dataset, name, checker, args):
            yield ValueError(problem)


class TooFewRowsError(ValueError):
    """The dataset has fewer rows than one step needs."""


def check_shape(dataset: Dataset | IterableDataset, name: str, args: ViCuRConfig, min_rows: int = 1) -> None:
    """
    Run the checks of [`check_dataset`] that read no rows. Same arguments.

    Raises:
        `ValueError`: If it is not a dataset or lacks a column.
        [`TooFewRowsError`]: If it has too few rows.
    """
    if not isinstance(dataset, (Dataset, IterableDataset)):
        held = f" of {list(dataset)}" if isinstance(dataset, dict) else ""
        raise ValueError(
            f"{name} must be a `datasets.Dataset` or `IterableDataset`, got a {type(dataset).__name__}{held}. Choose "
            "one split, or build it with `Dataset.from_list`."
        )
    if dataset.column_names is not None:
        check_columns(dataset.column_names, name, args)
    if isinstance(dataset, Dataset) and len(dataset) < min_rows:
        raise TooFewRowsError(
            f"{name} has {len(dataset)} row(s), expected at least {min_rows}: an incomplete batch is left out. Use "
            "more rows, or a smaller batch (`per_device_train_batch_size`, `gradient_accumulation_steps`, processes)."
        )


def _gather_from_ranks(value: Any, args: ViCuRConfig) -> list[Any]:
    """The value of each rank, in order."""
    return gather_object([value]) if args.world_size > 1 else [value]


class _RowProblems(TorchDataset):
    """The problem of each row, or `None`; a torch dataset, so that a `DataLoader` checks rows in parallel."""

    def __init__(self, dataset: Dataset, name: str, checker: RowChecker, numbers: range):
        self.rows = RowReader(dataset)
        self.name = name
        self.checker = checker
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[int, str] | None:
        number = self.numbers[index]
        try:
            with_row_number(self.checker.check, lambda: self.rows[number], f"Row {number} of {self.name}")
        except ValueError as error:
            return number, str(error)


def _problems(dataset: Dataset, name: str, checker: RowChecker, args: ViCuRConfig) -> Iterator[tuple[int, str]]:
    """Number and problem of each bad row in this rank's share of the dataset, in order."""
    numbers = range(args.process_index, len(dataset), args.world_size)
    num_workers = args.dataset_num_proc or 1
    loader = DataLoader(
        _RowProblems(dataset, name, checker, numbers),
        batch_size=ROWS_PER_BATCH,
        collate_fn=list,
        # For few rows, starting workers takes longer than the check
        num_workers=num_workers if num_workers > 1 and len(numbers) > num_workers * ROWS_PER_BATCH else 0,
        generator=torch.Generator(),  # the global one also draws a new adapter's initial weights
    )
    is_silent = args.disable_tqdm or args.process_index != 0
    with tqdm(total=len(numbers), desc=f"Checking {name}", unit="row", disable=is_silent) as progress:
        for batch in loader:
            yield from filter(None, batch)
            progress.update(len(batch))
