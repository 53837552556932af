"""Clear errors for a full disk."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """
    Add the fix to errors about a full disk.

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
            f"The disk is full ({error.strerror}). All finished work is kept; free some space and run the same "
            "command again",
            str(folder),
        ) from error
