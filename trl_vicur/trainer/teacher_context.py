"""What the teacher sees: the student's prompt with the privilege added to its last user turn."""

from typing import Any

from .vicur_config import ViCuRConfig


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
    if args.privilege == "none":
        return None
    column = args.cue_column if args.privilege == "cue" else args.answer_column
    privilege = row.get(column)
    if isinstance(privilege, str) and privilege.strip():
        return privilege
    if privilege is None or privilege == "" or isinstance(privilege, str):
        if args.missing_privilege == "none":
            return None
        raise ValueError(
            f"`{column}` is {privilege!r}, expected the text that only the teacher sees. Fill it in, or set "
            "`missing_privilege='none'` to let the teacher see the plain prompt for such rows."
        )
    raise ValueError(f"`{column}` must be a string, got {type(privilege).__name__}: {privilege!r}.")


def add_privilege(prompt: list[dict[str, Any]], privilege: str | None, template: str) -> list[dict[str, Any]]:
    """
    Add the privilege to the text of the last user turn.

    Args:
        prompt (`list[dict]`):
            Messages of a conversational prompt; contents are strings or lists of blocks.
        privilege (`str`, *optional*):
            The privileged text. `None` leaves the prompt as it is.
        template (`str`):
            Template with the fields `{prompt}` and `{privilege}`. Braces within the two texts are text.

    Returns:
        `list[dict]`: New messages; the given ones are not modified.

    Raises:
        `ValueError`: If the prompt has no user turn.
    """
    if privilege is None:
        return prompt
    index = next((i for i in reversed(range(len(prompt))) if prompt[i]["role"] == "user"), None)
    if index is None:
        raise ValueError("`prompt` has no message with role 'user' that the teacher's privilege could be added to.")
    content = prompt[index]["content"]
    if isinstance(content, str):
        content = template.format(prompt=content, privilege=privilege)
    else:
        content = list(content)
        block = next((i for i in reversed(range(len(content))) if content[i]["type"] == "text"), None)
        text = "" if block is None else content[block]["text"]
        new_block = {"type": "text", "text": template.format(prompt=text, privilege=privilege)}
        if block is None:
            content.append(new_block)
        else:
            content[block] = new_block
    return [*prompt[:index], {**prompt[index], "content": content}, *prompt[index + 1 :]]


def hint_marker(template: str) -> str:
    """The word by which a leaked hint is recognized: the text between prompt and privilege, e.g. `"Hint"`."""
    return template.partition("{prompt}")[2].partition("{privilege}")[0].strip(" \n\t[](){}<>:*#-")
