"""Datasets loaded by name: a folder can be streamed like a dataset on the Hub."""

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from trl_vicur.data.loading import load_split


@pytest.mark.parametrize("has_splits", [False, True], ids=["dataset", "splits"])
def test_a_saved_dataset_is_streamed_on_demand(tmp_path, has_splits):
    dataset = Dataset.from_list([{"question": f"What is {i}?"} for i in range(3)])
    saved = DatasetDict(train=dataset) if has_splits else dataset
    saved.save_to_disk(str(tmp_path / "rows"))
    loaded, streamed = (load_split(str(tmp_path / "rows"), streaming=streaming) for streaming in (False, True))
    assert isinstance(loaded, Dataset) and isinstance(streamed, IterableDataset)
    assert list(streamed) == list(loaded) == list(dataset)
