"""Conversations of other formats, rewritten as messages with blocks for images and videos."""

import json
import re
from typing import Any

from .messages import PLACEHOLDER
from .rows import shorten


# Names of the roles in ShareGPT's, LLaVA's and ms-swift's files
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "observation": "tool",
}
# Parts of turns that messages of roles and contents would lose
LOST_KEYS = ("tool_calls", "function_call", "images", "image", "videos", "video")
NUMBERED_IMAGE = re.compile(r"<image[ _-]?(\d{1,3})>", re.IGNORECASE)
# An image's path within the text, as in Qwen-VL's files
IMAGE_TAG = re.compile(r"<img>(.+?)</img>", re.IGNORECASE)


def read_messages(value: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """
    Rewrite a conversation as messages of TRL, in which images and videos are blocks without their payload.

    Args:
        value (`list` or `str`):
            Turns with `role` and `content`, with `from` and `value` (LLaVA, ShareGPT), or pairs of `human` or `user`
            and `assistant` (ms-swift, the_cauldron); or a JSON string of such a list. Contents are strings, in which
            `<image>` stands for an image and `<img>path</img>` names one, or lists of OpenAI's or Qwen-VL's blocks.

    Returns:
        `tuple[list[dict], list]`: The messages, and the images that they named or contained, in order.

    Raises:
        `ValueError`: If this is no conversation; names the turn by its number.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"expected turns of a conversation, got {shorten(value)}.") from error
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list of turns, got {shorten(value)}.")
    messages, images = [], []
    for number, turn in enumerate(value):
        for role, content in _read_turn(turn, number):
            content, found = read_content(content, f"turn {number}")
            messages.append({"role": role, "content": content})
            images += found
    return messages, images


def _read_turn(turn: Any, number: int) -> list[tuple[str, Any]]:
    """Roles and contents of a turn; a pair of question and answer is two."""
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} must be a dict, got {shorten(turn)}.")
    turn = {key: item for key, item in turn.items() if item is not None}  # Arrow gives all turns the same keys
    if lost := [key for key in LOST_KEYS if turn.get(key)]:
        raise ValueError(f"turn {number} has {lost[0]!r}, which cannot be read. Write it into the turn's content.")
    for role in ("human", "user"):
        if role in turn and "assistant" in turn:
            return [("user", turn[role]), ("assistant", turn["assistant"])]
    for role_key, content_key in (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content")):
        if role_key in turn and content_key in turn:
            role = ROLES.get(str(turn[role_key]).lower())
            if role is None:
                raise ValueError(
                    f"turn {number} has the {role_key} {turn[role_key]!r}, expected one of {list(ROLES)}."
                )
            return [(role, turn[content_key])]
    raise ValueError(f"turn {number} has the keys {list(turn)}, expected 'role' and 'content', or 'from' and 'value'.")


def read_content(content: Any, name: str) -> tuple[str | list[dict[str, Any]], list[Any]]:
    """
    Rewrite one turn's content.

    Args:
        content (`str` or `list`):
            The text, with placeholders of images and videos, or blocks.
        name (`str`):
            The turn, for errors.

    Returns:
        `tuple[str | list[dict], list]`: The text, or blocks if it has images or videos; and the images that the
        content named or contained.

    Raises:
        `ValueError`: If a block is of an unknown kind.
    """
    if isinstance(content, str):
        return _split_placeholders(content)
    if not isinstance(content, list):
        raise ValueError(f"the content of {name} must be a string or a list of blocks, got {shorten(content)}.")
    blocks, images = [], []
    for block in content:
        if isinstance(block, str):
            block = {"type": "text", "text": block}
        if not isinstance(block, dict):
            raise ValueError(f"a block of {name} must be a dict, got {shorten(block)}.")
        block = {key: item for key, item in block.items() if item is not None}
        kind = block.get("type", "text" if "text" in block else "image" if "image" in block else None)
        if kind in ("text", "input_text") and isinstance(block.get("text"), str):
            text, found = _split_placeholders(block["text"])
            blocks += text if isinstance(text, list) else [{"type": "text", "text": text}]
            images += found
        elif kind in ("image", "image_url", "input_image"):
            blocks.append({"type": "image"})
            image = next((block[key] for key in ("image", "image_url", "url", "path", "base64") if key in block), None)
            if isinstance(image, dict) and "url" in image:
                image = image["url"]
            if image is not None:
                images.append(image)
        elif kind == "video" and block.keys() <= {"type"}:
            blocks.append({"type": "video"})
        else:
            raise ValueError(f"a block of {name} is {shorten(block)}, expected text, an image, or a bare video block.")
    return blocks, images


def _split_placeholders(text: str) -> tuple[str | list[dict[str, Any]], list[str]]:
    """The text, or its blocks if it has placeholders, without the white space between them and the text."""
    images = IMAGE_TAG.findall(text)
    parts = PLACEHOLDER.split(IMAGE_TAG.sub("<image>", text))  # text, kind, text, kind, …, text
    if len(parts) == 1:
        return text, images
    numbers = [int(number) for number in NUMBERED_IMAGE.findall(text)]
    if numbers != sorted(numbers):
        raise ValueError(
            f"the text refers to its images in the order {numbers}, expected ascending numbers: {shorten(text)}. "
            "Renumber the images."
        )
    blocks = []
    for part, kind in zip(parts[::2], [*parts[1::2], None], strict=True):
        if part := part.strip():
            blocks.append({"type": "text", "text": part})
        if kind is not None:
            blocks.append({"type": kind.lower()})
    return blocks, images
