"""Models by their name: an id on the Hub, or a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def naming_model(name: str) -> Iterator[None]:
    """
    While active, what cannot be loaded is named: Hugging Face's messages do not always say which model they are about.

    Args:
        name (`str`):
            Id or folder of the model.

    Raises:
        `OSError`: In place of an `OSError` or `ValueError`.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise OSError(f"The model {name!r} cannot be loaded: {error}") from error


def hub_model_name(name: str | None) -> str | None:
    """A model's id, unless it is a folder on this machine."""
    return None if not name or Path(name).is_dir() or Path(name).is_absolute() else name
