"""What a generator is asked for: the visible evidence that a question needs, and nothing else."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image


@dataclass(frozen=True)
class CuePrompt:
    """
    The prompt that asks for a cue.

    Args:
        version (`str`):
            Its name in the provenance of cues.
        user (`str`):
            Text of the user turn, behind the images. `{question}` stands for the question; other braces are text.
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
        """The text of a file as user turn; the file's name is the version."""
        return cls(version=Path(path).name, user=Path(path).read_text(encoding="utf-8"))

    def messages(self, question: str, images: list[Image.Image]) -> list[dict[str, Any]]:
        """The conversation that asks for a cue to `question` in `images`."""
        content = [{"type": "image", "image": image} for image in images]
        # Not str.format: braces in a question are text
        content.append({"type": "text", "text": self.user.replace("{question}", question)})
        messages = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        return messages


# A changed text is a new version: cues of different texts are different data.
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
