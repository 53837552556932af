"""The teacher's prompt: the student's prompt with the privilege added to its last user turn."""

import re
from string import Formatter
from typing import Any


TEACHER_PROMPT_TEMPLATE = "{prompt}\n\n[Hint]: {privilege}"


def add_privilege(prompt: list[dict[str, Any]], privilege: str | None, template: str) -> list[dict[str, Any]]:
    """
    Add the privilege to the text of the last user turn.

    Args:
        prompt (`list[dict]`):
            Messages of a conversational prompt; contents are strings or lists of blocks.
        privilege (`str`, *optional*):
            The privileged text. `None` leaves the prompt unchanged.
        template (`str`):
            Template with the fields `{prompt}` and `{privilege}`. Braces in the two texts are literal.

    Returns:
        `list[dict]`: New messages; the given ones are not modified.

    Raises:
        `ValueError`: If the prompt has no user turn.
    """
    if privilege is None:
        return prompt
    index = next((i for i in reversed(range(len(prompt))) if prompt[i]["role"] == "user"), None)
    if index is None:
        raise ValueError("`prompt` has no message with role 'user' to add the teacher's privilege to.")
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
    """
    The text that identifies a leaked hint, e.g. `"Hint"`: the words before the privilege on its line or, if there are
    none, the nearest earlier line with words. If `{prompt}` comes first, text before it does not count. Empty if no
    words are left.
    """
    introduction = ""
    for literal, field, _, _ in Formatter().parse(template):
        introduction += literal
        if field == "privilege":
            break
        if field is not None:
            introduction = ""
    lines = [re.sub(r"^\W+|\W+$", "", line) for line in introduction.splitlines()]
    return next(filter(None, reversed(lines)), "")
