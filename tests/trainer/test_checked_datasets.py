"""
The check of all rows before training: it may use several processes, is remembered until something that it depends on
changes, and always names the first bad row.
"""

import os
import subprocess
import sys
from pathlib import Path
from socket import socket

import checked_datasets
import datasets
import pytest
import torch
from built_trainers import make_config
from checked_datasets import COUNT, check, make_checker, make_dataset
from datasets import Dataset, Features, Image, List, load_from_disk
from PIL import Image as PILImage
from tiny_models import make_image, make_processor, make_rows

from trl_vicur import CueRecoveryConfig
from trl_vicur.trainer.checks.datasets import check_dataset, find_bad_rows
from trl_vicur.trainer.checks.receipts import MIN_ROWS, receipt_of
from trl_vicur.trainer.checks.rows import OPTIONS, RowChecker


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Sets the cache of `datasets`, and returns a function that lists its receipts."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return lambda: sorted((tmp_path / "cache").glob("trl_vicur_checked_datasets/*"))


@pytest.fixture
def checked(monkeypatch):
    """The questions of the rows that have been checked."""
    numbers = []
    check = RowChecker.check
    monkeypatch.setattr(
        RowChecker, "check", lambda self, row: (numbers.append(row["prompt"][-1]["content"]), check(self, row))[1]
    )
    return numbers


# --- Several processes ---


@pytest.mark.parametrize("num_proc", [None, 1, 2])
def test_first_bad_row_is_named_with_any_number_of_processes(tmp_path, num_proc):
    dataset = make_dataset(tmp_path / "rows", bad=(41, 43, 90))
    with pytest.raises(ValueError, match="^Row 41 of train_dataset: `cue` is ''"):
        check(dataset, dataset_num_proc=num_proc)


@pytest.mark.parametrize("num_proc", [1, 2])
def test_doctor_gets_all_bad_rows_in_order(tmp_path, num_proc):
    dataset = make_dataset(tmp_path / "rows", bad=(90, 41, 43))
    checker = make_checker(dataset_num_proc=num_proc)
    errors = [str(error) for error in find_bad_rows(dataset, "d", checker, checker.args)]
    assert [error.partition(":")[0] for error in errors] == ["Row 41 of d", "Row 43 of d", "Row 90 of d"]


# For scripts that run in other processes
PATHS = os.pathsep.join([str(Path(checked_datasets.__file__).parent), str(Path(__file__).parents[2])])
TWO_PROCESSES = """
import sys
from pathlib import Path
import datasets
from checked_datasets import *
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2])
asked = []
check_row = RowChecker.check
RowChecker.check = lambda self, row: (asked.append(row), check_row(self, row))[1]
for name in sys.argv[3:]:
    try:
        check(load_from_disk(f"{sys.argv[1]}/{name}"))
        print(f"{name} has passed after {len(asked)} rows")
    except ValueError as error:
        print(str(error)[:6])
"""


@pytest.mark.slow
def test_every_rank_names_the_first_bad_row_of_all_ranks(tmp_path):
    """Rows 41 and 90 belong to different ranks. Both ranks know that the good dataset has been checked."""
    make_dataset(tmp_path / "good")
    make_dataset(tmp_path / "bad", bad=(41, 90))
    arguments = [str(tmp_path), str(datasets.config.HF_DATASETS_CACHE), "good", "good", "bad"]
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": PATHS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, *arguments],
            env={**environment, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        lines = process.communicate(timeout=300)[0].splitlines()
        half = COUNT // 2
        assert lines == [f"good has passed after {half} rows"] * 2 + ["Row 41"]


def test_check_does_not_change_the_random_state(tmp_path):
    """The random state determines the weights of a new adapter, and a resumed run may skip the check."""
    dataset, state = make_dataset(tmp_path / "rows"), torch.get_rng_state()
    check(dataset, dataset_num_proc=2)
    assert torch.equal(torch.get_rng_state(), state)


# --- Receipts ---


def test_dataset_that_has_passed_is_not_checked_again(tmp_path, checked, cache):
    dataset = make_dataset(tmp_path / "rows")
    check(dataset)
    assert len(checked) == COUNT and len(cache()) == 1
    check(load_from_disk(str(tmp_path / "rows")))
    check(dataset, learning_rate=0.5, max_steps=7)
    assert len(checked) == COUNT and len(cache()) == 1


def test_dataset_with_a_bad_row_is_checked_again(tmp_path, checked, cache):
    dataset = make_dataset(tmp_path / "rows", bad=[50])
    for _ in range(2):
        with pytest.raises(ValueError, match="Row 50 of train_dataset"):
            check(dataset)
    assert not cache()
    check(dataset, missing_privilege="none")
    with pytest.raises(ValueError, match="Row 50 of train_dataset"):
        check(dataset)


def test_killed_check_is_not_remembered(tmp_path, monkeypatch, cache):
    dataset = make_dataset(tmp_path / "rows")

    def interrupt(self, row):
        if row["cue"].endswith("90"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(RowChecker, "check", interrupt)
        check(dataset)
    assert not cache()


def test_columns_and_number_of_rows_are_always_checked(tmp_path, cache):
    dataset, checker = make_dataset(tmp_path / "rows"), make_checker()
    check(dataset, checker)
    with pytest.raises(ValueError, match=f"has {COUNT} row"):
        check_dataset(dataset, "train_dataset", checker, checker.args, min_rows=COUNT + 1)


def other_template():
    processor = make_processor()
    processor.chat_template += " "
    return processor


def other_tokenizer():
    processor = make_processor()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    return processor


def other_image_size():
    processor = make_processor()
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    return processor


CHANGES = {
    "column": dict(privilege="answer"),
    "template": dict(teacher_prompt_template="{prompt} Hint: {privilege}"),
    "completion": dict(max_completion_length=9),
    "context": dict(max_length=2047),
    "chat-template": dict(processor=other_template),
    "tokenizer": dict(processor=other_tokenizer),
    "image-size": dict(processor=other_image_size),
    "sink": dict(recovery_configs=[CueRecoveryConfig(sink_token="first", sink_token_ids=[257])]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_receipt_depends_on_everything_that_the_check_reads(tmp_path, change):
    dataset = make_dataset(tmp_path / "rows")
    change = {name: value() if callable(value) else value for name, value in change.items()}
    assert receipt_of(dataset, make_checker(**change)) != receipt_of(dataset, make_checker())


def test_limits_of_pillow_change_the_receipt(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "rows")
    before = receipt_of(dataset, make_checker())
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 10**6)
    assert receipt_of(dataset, make_checker()) != before


def test_receipt_depends_on_every_option_that_the_check_reads():
    class Recorder:
        def __init__(self, args):
            self.args, self.read = args, set()

        def __getattr__(self, name):
            derived = getattr(type(self.args), name, None)
            if isinstance(derived, property):
                return derived.fget(self)  # reads options
            self.read.add(name)
            return getattr(self.args, name)

    for arguments in ({}, {"privilege": "answer"}, {"privilege": "none"}, {"missing_privilege": "none"}):
        checker = make_checker(**arguments)
        recorder = checker.args = Recorder(make_config(**arguments))
        video = [make_image(0, (32, 32))] * 2
        for change in (
            {},
            {"cue": None, "answer": None},
            {"cue": "long " * 500, "answer": "long " * 500},
            {"prompt": None},
            {"videos": [video]},
            {"images": [make_image(0)] * 600},
            {"images": ["none.png"]},
        ):
            try:
                checker.check({**make_rows(1)[0], **change})
            except ValueError:
                pass
        assert recorder.read <= set(OPTIONS)


def test_rewritten_files_change_the_receipt(tmp_path):
    dataset, checker = make_dataset(tmp_path / "rows"), make_checker()
    before = receipt_of(dataset, checker)
    file = dataset.cache_files[0]["filename"]
    os.utime(file, ns=(1, 1))
    assert receipt_of(dataset, checker) != before
    assert receipt_of(dataset.select(range(COUNT - 1)), checker) != receipt_of(dataset, checker)


@pytest.mark.parametrize("is_decoded", [True, False])
def test_image_that_changes_on_disk_is_checked_again(tmp_path, is_decoded, cache):
    file = tmp_path / "image.png"
    make_image(0).save(file)
    rows = [{**row, "images": [str(file)]} for row in make_rows(COUNT)]
    features = Dataset.from_list(rows).features
    dataset = Dataset.from_list(rows, Features({**features, "images": List(Image())}) if is_decoded else features)
    check(dataset)
    check(dataset)
    assert len(cache()) == 1
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="Row 0 of train_dataset: An image"):
        check(dataset)


def test_rows_that_may_change_unnoticed_are_checked_each_time(tmp_path, monkeypatch):
    dataset, checker = make_dataset(tmp_path / "rows"), make_checker()
    assert receipt_of(dataset, checker) is not None
    assert receipt_of(dataset.with_transform(lambda rows: rows), checker) is None
    remote = dataset.remove_columns("images").add_column("images", [["https://example.com/a.png"]] * COUNT)
    assert receipt_of(remote, checker) is None
    assert receipt_of(dataset.select(range(MIN_ROWS - 1)), checker) is None  # too few rows for a receipt
    monkeypatch.setattr(datasets, "is_caching_enabled", lambda: False)
    assert receipt_of(dataset, checker) is None


@pytest.mark.slow
def test_another_process_finds_the_receipt(tmp_path):
    """Digests do not depend on the order of sets or on addresses."""
    dataset = make_dataset(tmp_path / "rows")
    code = """
import sys
from pathlib import Path
import datasets
from checked_datasets import *
from trl_vicur.trainer.checks.receipts import receipt_of
datasets.config.HF_DATASETS_CACHE = Path(sys.argv[2])
print(receipt_of(load_from_disk(sys.argv[1]), make_checker()))
"""
    arguments = [str(tmp_path / "rows"), str(datasets.config.HF_DATASETS_CACHE)]
    output = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": PATHS, "PYTHONHASHSEED": "7"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert output.strip() == str(receipt_of(dataset, make_checker()))


def test_receipt_that_cannot_be_written_only_warns(tmp_path, caplog):
    (tmp_path / "cache").write_text("no folder")
    check(make_dataset(tmp_path / "rows"))
    assert "The next run will check the rows again" in caplog.text
