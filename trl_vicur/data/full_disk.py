"""Clear errors for a full disk."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """
    Add to errors of a full disk what to do.

    Raises:
        `OSError`: If the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"The disk is full ({error.strerror}). Everything up to here is kept; free some space and run the same "
            "again",
            str(folder),
        ) from error
