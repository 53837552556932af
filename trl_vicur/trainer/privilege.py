"""What only the teacher sees of a dataset row."""

from typing import Any

from ..data.rows import shorten
from .vicur_config import ViCuRConfig


def privilege_column(args: ViCuRConfig) -> str | None:
    """The dataset column with the privileged text; `None` if the teacher sees none."""
    return {"cue": args.cue_column, "answer": args.answer_column, "none": None}[args.privilege]


def get_privilege(row: dict[str, Any], args: ViCuRConfig) -> str | None:
    """
    The privileged text of a dataset row.

    Args:
        row (`dict`):
            The dataset row.
        args ([`ViCuRConfig`]):
            Names the kind of privilege, its column, and what happens where it is missing.

    Returns:
        `str` or `None`: The text; `None` where the teacher sees the student's prompt.

    Raises:
        `ValueError`: If there is no such text and `args.missing_privilege` is `"error"`, or if it is not a string.
    """
    column = privilege_column(args)
    if column is None:
        return None
    privilege = row.get(column)
    if isinstance(privilege, str) and any(char.isprintable() and not char.isspace() for char in privilege):
        return privilege
    if privilege is None or isinstance(privilege, str):
        if args.missing_privilege == "none":
            return None
        raise ValueError(
            f"`{column}` is {shorten(privilege)}, expected the text that only the teacher sees. Fill it in, or set "
            "`missing_privilege='none'` to let the teacher see the plain prompt for such rows."
        )
    raise ValueError(f"`{column}` must be a string, got {type(privilege).__name__}: {shorten(privilege)}.")
