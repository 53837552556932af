"""Read a dataset row once, and build the conversations that the student and the teacher see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl.data_utils import prepare_multimodal_messages

from .images import read_image, read_video
from .rows import row_images, row_videos, shorten
from .teacher_prompt import add_privilege


@dataclass(frozen=True)
class Example:
    """
    A dataset row in the form that training uses.

    Args:
        prompt (`list[dict]`):
            The student's conversation. All contents are lists of blocks, which hold the decoded images and videos.
        teacher_prompt (`list[dict]`):
            The teacher's conversation, in the same form.
    """

    prompt: list[dict[str, Any]]
    teacher_prompt: list[dict[str, Any]]


def read_row(
    row: dict[str, Any], privilege_column: str | None, missing_privilege: str, teacher_prompt_template: str
) -> Example:
    """
    Read a dataset row.

    Args:
        row (`dict`):
            The row, with its images and videos in any form that [`~trl_vicur.data.images.read_image`] and
            [`~trl_vicur.data.images.read_video`] accept.
        privilege_column (`str`, *optional*):
            Column with the privileged text. `None` if the teacher reads the student's prompt.
        missing_privilege (`str`):
            What to do if the text is missing: `"error"` raises, `"none"` gives the teacher the student's prompt.
        teacher_prompt_template (`str`):
            Template with the fields `{prompt}` and `{privilege}`.

    Raises:
        `ValueError`: If an image, a video or the privileged text cannot be read.
    """
    # Decode here, once for all readers: TRL and processors treat different file formats differently
    images = [read_image(image) for image in row_images(row)]
    videos = [read_video(video) for video in row_videos(row)]
    privilege = read_privilege(row, privilege_column, missing_privilege)
    teacher_prompt = add_privilege(row["prompt"], privilege, teacher_prompt_template)
    return Example(fill_prompt(row["prompt"], images, videos), fill_prompt(teacher_prompt, images, videos))


def read_privilege(row: dict[str, Any], column: str | None, missing_privilege: str) -> str | None:
    """
    The privileged text of a dataset row, which only the teacher sees.

    Args:
        row (`dict`):
            The dataset row.
        column (`str`, *optional*):
            Column with the text. `None` if the teacher sees no such text.
        missing_privilege (`str`):
            What to do if the text is missing: `"error"` or `"none"`.

    Returns:
        `str` or `None`: The text; `None` if the teacher sees the student's prompt.

    Raises:
        `ValueError`: If the text is missing and `missing_privilege` is `"error"`, or if it is not a string.
    """
    if column is None:
        return None
    privilege = row.get(column)
    if isinstance(privilege, str) and any(char.isprintable() and not char.isspace() for char in privilege):
        return privilege
    if privilege is None or isinstance(privilege, str):
        if missing_privilege == "none":
            return None
        raise ValueError(
            f"`{column}` is {shorten(privilege)}, expected the text that only the teacher sees. Fill it in, or set "
            "`missing_privilege='none'` to let the teacher see the plain prompt for such rows."
        )
    raise ValueError(f"`{column}` must be a string, got {type(privilege).__name__}: {shorten(privilege)}.")


def fill_prompt(prompt: list[dict[str, Any]], images: Sequence, videos: Sequence) -> list[dict[str, Any]]:
    """
    Put images and videos into the blocks of a prompt. TRL's `prepare_multimodal_messages` does so only for images.

    Args:
        prompt (`list[dict]`):
            Messages. Either all contents are strings; then the images and after them the videos go before the text of
            the first user turn. Or there is a block `{"type": "image"}` or `{"type": "video"}` for each.
        images (sequence):
            The images.
        videos (sequence):
            The videos.

    Returns:
        `list[dict]`: New messages, whose contents are lists of blocks; the given ones are not modified.

    Raises:
        `ValueError`: If the numbers of blocks and of images or videos differ.
    """
    first_user = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
    if videos and first_user is not None and not any(isinstance(message.get("content"), list) for message in prompt):
        visuals = [{"type": "image"}] * len(images) + [{"type": "video"}] * len(videos)
        content = [*visuals, {"type": "text", "text": prompt[first_user]["content"]}]
        prompt = [*prompt[:first_user], {**prompt[first_user], "content": content}, *prompt[first_user + 1 :]]

    num_blocks = 0
    filled = []
    for message in prompt:
        if isinstance(message.get("content"), list):
            content = []
            for block in message["content"]:
                if block["type"] == "video":
                    if num_blocks < len(videos):
                        block = {**block, "video": videos[num_blocks]}
                    num_blocks += 1
                content.append(block)
            message = {**message, "content": content}
        filled.append(message)
    if num_blocks != len(videos):
        raise ValueError(
            f"Number of videos provided ({len(videos)}) does not match number of video placeholders ({num_blocks})."
        )
    return prepare_multimodal_messages(filled, images=list(images))
