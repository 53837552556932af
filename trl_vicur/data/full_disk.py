"""What is said when the disk gets full."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def explain_full_disk(folder: Path) -> Iterator[None]:
    """
    Raises:
        `OSError`: If the disk gets full; says what to do.
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
