"""Datasets large enough for the row check to write a receipt, and a function that runs the check."""

from built_trainers import make_config
from datasets import Dataset, load_from_disk
from tiny_models import make_image, make_processor, make_rows

from trl_vicur.trainer.checks.datasets import check_dataset
from trl_vicur.trainer.checks.receipts import MIN_ROWS
from trl_vicur.trainer.checks.rows import RowChecker


COUNT = MIN_ROWS + 20


def make_dataset(folder, bad=(), count: int = COUNT) -> Dataset:
    """Rows on disk, like any large dataset."""
    rows = [{**row, "images": [make_image(0, (8, 8))]} for row in make_rows(count)]
    for number in bad:
        rows[number]["cue"] = ""
    Dataset.from_list(rows).save_to_disk(str(folder))
    return load_from_disk(str(folder))


def make_checker(processor=None, max_length=2048, recovery_configs=(), **arguments) -> RowChecker:
    processor = make_processor() if processor is None else processor
    return RowChecker(make_config(**arguments), processor, max_length, recovery_configs=recovery_configs)


def check(dataset, checker=None, **arguments):
    checker = make_checker(**arguments) if checker is None else checker
    return check_dataset(dataset, "train_dataset", checker, checker.args)
