"""A digest of a dataset, so that a resumed run can recognize it."""

import hashlib
from typing import Any

from datasets import Dataset


def dataset_digest(dataset: Dataset) -> str:
    """
    A digest of all values, including images. Unlike a `datasets` fingerprint, it depends only on the rows.

    Args:
        dataset ([`~datasets.Dataset`]):
            The columns that a run reads.
    """
    hasher = hashlib.blake2b(digest_size=16)

    def update(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            hasher.update(b"[")
            for item in value:
                update(item)
            hasher.update(b"]")
        elif isinstance(value, dict):
            update([value[key] for key in sorted(value)])
        else:
            data = value if isinstance(value, bytes) else repr(value).encode()
            hasher.update(len(data).to_bytes(8, "little") + data)

    table: Any  # datasets annotates the batches of every format as dicts
    for table in dataset.with_format("arrow").iter(batch_size=100):
        update(table.to_pydict())
    return hasher.hexdigest()
