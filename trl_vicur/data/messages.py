"""Conversations: check their structure, read their texts, and find control tokens and placeholders in them."""

import re
from collections.abc import Iterator
from typing import Any

from transformers import ProcessorMixin

from .rows import shorten


ROLES = ("system", "user", "assistant", "tool")
BLOCK_TYPES = ("text", "image", "video")
# "<image>", "<image 1>", "<image_1>", "<video>": image and video slots of other prompt formats
PLACEHOLDER = re.compile(r"<(image|video)(?:[ _-]?\d{1,3})?>", re.IGNORECASE)


def check_messages(messages: Any) -> None:
    """
    Raises:
        `ValueError`: If the value is not a list of messages whose contents are strings or lists of text, image and
            video blocks. The error gives the message's number.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"expected a list of messages, each with 'role' and 'content', got {shorten(messages)}.")
    for number, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise ValueError(f"message {number} must be a dict with a role of {ROLES}, got {shorten(message)}.")
        content = message.get("content")
        if isinstance(content, str) or (content is None and role == "assistant" and message.get("tool_calls")):
            continue
        if not isinstance(content, list):
            raise ValueError(
                f"the content of message {number} must be a string or a list of blocks, got {shorten(content)}."
            )
        for block in content:
            block_type = block.get("type") if isinstance(block, dict) else None
            if block_type not in BLOCK_TYPES or (block_type == "text" and not isinstance(block.get("text"), str)):
                raise ValueError(
                    f"each block of message {number} must be a dict with a type of {BLOCK_TYPES}, and a text block "
                    f"needs a string 'text', got {shorten(block)}."
                )


def check_placeholders(column: str, value: str | list[dict[str, Any]] | None) -> None:
    """
    Args:
        column (`str`):
            The dataset column that the value is from.
        value (`str` or `list[dict]`, *optional*):
            A text, or the messages of a conversation.

    Raises:
        `ValueError`: If a string in the value contains another format's placeholder, which a model would read as text.
    """
    for text in all_strings(value):
        if placeholder := PLACEHOLDER.search(text):
            kind = placeholder[1].lower()
            if isinstance(value, str):
                fix = f"Remove it; {kind}s are read from the column `{kind}s`"
            else:
                fix = f"Replace it with a block {{'type': '{kind}'}} in `{column}`, or remove it"
            raise ValueError(
                f"The text of `{column}` contains the placeholder {placeholder[0]!r}, which the model would read as "
                f"text: {shorten(text)}. {fix}."
            )


def message_texts(messages: list[dict[str, Any]]) -> Iterator[str]:
    """The texts of messages whose contents are strings or lists of blocks."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            yield content
        elif content is not None:
            yield from (block["text"] for block in content if block["type"] == "text")


def question_text(prompt: str | list[dict[str, Any]]) -> str:
    """The question in a prompt: the prompt itself if it is a string, else the texts of its user turns."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message_texts([message for message in prompt if message["role"] == "user"]))


def all_strings(value: Any) -> Iterator[str]:
    """Every string within nested dicts and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from all_strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from all_strings(item)


def control_token_pattern(processing_class: ProcessorMixin) -> re.Pattern:
    """A pattern that matches all strings a processor reads as control tokens: special tokens and placeholders."""
    tokens = {token.content for token in processing_class.tokenizer.added_tokens_decoder.values() if token.special}
    # A processor replaces its `image_token`, `video_token` etc. in texts, even if they are not special tokens
    tokens |= {
        value for name, value in vars(processing_class).items() if name.endswith("_token") and isinstance(value, str)
    }
    # Without control tokens, a pattern that never matches
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)) or r"(?!)")


def count_blocks(messages: list[dict[str, Any]], block_type: str) -> int:
    """Number of blocks of a type (`"image"`, `"video"`) in the messages."""
    contents = [content for message in messages if isinstance(content := message.get("content"), list)]
    return sum(block["type"] == block_type for content in contents for block in content)
