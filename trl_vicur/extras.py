"""Optional dependencies: if one is missing, the error names the extra to install."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs_extra(extra: str, user: str) -> Iterator[None]:
    """
    Context manager for imports of packages that only an extra installs.

    Args:
        extra (`str`):
            Name of the extra in `pyproject.toml`.
        user (`str`):
            The function, class or command that needs the packages.

    Raises:
        `ModuleNotFoundError`: If a package is missing. The message names the extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{user} needs {error.name}, which is not installed. Install it with `pip install 'trl-vicur[{extra}]'`.",
            name=error.name,
        ) from error
