"""The prompt for a cue: it asks for the visible evidence that a question needs, and for nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..data.images import read_image
from ..data.messages import check_messages, check_placeholders, question_text
from ..data.rows import row_images, shorten
from .text_audit.control_text import CONTROL_TOKEN
from .text_audit.folding import fold_text


@dataclass(frozen=True)
class CuePrompt:
    """
    The prompt that asks for a cue.

    Args:
        version (`str`):
            Name of the prompt in the provenance of cues.
        user (`str`):
            Text of the user turn, after the images. `{question}` is replaced with the question; other braces are kept.
        system (`str`, *optional*):
            Text of the system turn.

    Raises:
        `ValueError`: If `user` has no `{question}`.
    """

    version: str
    user: str
    system: str | None = None

    def __post_init__(self):
        if "{question}" not in self.user:
            raise ValueError(f"The prompt {self.version!r} has no `{{question}}`, where the question goes.")

    @classmethod
    def from_file(cls, path: str | Path) -> "CuePrompt":
        """Make a prompt whose user turn is the text of a file and whose version is the file's name."""
        return cls(version=Path(path).name, user=Path(path).read_text(encoding="utf-8"))

    @property
    def settings(self) -> dict[str, Any]:
        """The prompt's entries in the settings of a [`ResponseStore`]."""
        return {"prompt_version": self.version, "prompt": [self.system, self.user]}

    def messages(self, question: str, images: list[Image.Image]) -> list[dict[str, Any]]:
        """Make the conversation that asks for a cue for `question` about `images`."""
        content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        # Not `str.format`: a question may contain braces
        content.append({"type": "text", "text": self.user.replace("{question}", question)})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        return messages


def cue_messages(row: dict[str, Any], question_column: str, prompt: CuePrompt) -> list[dict[str, Any]]:
    """
    Make the conversation that asks for a row's cue.

    Raises:
        `ValueError`: If the row has no image or no question, or a control token in its question.
    """
    if isinstance(row[question_column], list):
        check_messages(row[question_column])
    question = question_text(row[question_column] or "")
    if not question.strip():
        raise ValueError(f"`{question_column}` is {shorten(row[question_column])}, which asks nothing.")
    check_placeholders(question_column, row[question_column])
    if found := CONTROL_TOKEN.search(fold_text(question)):
        raise ValueError(f"The question contains the control token {found.group()!r}: {shorten(question)}.")
    images = [read_image(image) for image in row_images(row)]
    if not images:
        raise ValueError("The row has no image.")
    return prompt.messages(question, images)


# If you change the text, change the version: cues from different prompts are different data.
CUE_PROMPT = CuePrompt(
    version="1",
    system="You look at images and report what can be seen in them. You do not solve problems.",
    user="""\
Somebody else will answer the question below. Point out what they have to look at in the image.

Question:
{question}

Report only evidence that is visible in the image and that the question needs:
- labels, numbers and words, exactly as they are written in the image, and which part each belongs to;
- marks (right angles, ticks, arrows, colours) and where they are;
- positions and relations that can be seen: inside, on, left of, connected with, taller than;
- in charts and tables, the series, axes, units and the values that have to be read.

Do not answer the question, and do not say which option is right. Do not calculate. Do not name theorems, formulas or \
steps towards a solution. Do not report anything that cannot be seen or that you are unsure of.

Reply with the evidence only, in one to four short plain sentences.""",
)
