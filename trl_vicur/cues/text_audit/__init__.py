"""Text audit of a visual cue: does it describe visible evidence, or does it leak the answer or steer a model?"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...extras import needs_extra
from .control_text import find_control_text, find_hidden_text
from .folding import fold_text


@dataclass(frozen=True)
class CueAudit:
    """
    Findings of the text audit of one cue.

    Args:
        answer_leak (`str`):
            `"leak"` if the cue states the answer, `"possible"` if it does but the image may show the value, `"none"`
            otherwise.
        reasoning_leak (`bool`):
            Whether it contains part of the solution: a theorem, a step, a conclusion, a computed value.
        control_text (`bool`):
            Whether it contains control tokens or text that addresses the model.
        reasons (`list[str]`):
            One sentence per finding, which quotes the cue.
    """

    answer_leak: Literal["none", "possible", "leak"]
    reasoning_leak: bool
    control_text: bool
    reasons: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        """Whether the cue may be used as recoverable privilege, as far as its text shows."""
        return self.answer_leak != "leak" and not self.reasoning_leak and not self.control_text


def audit_cue(cue: str, question: str, answer: str | None = None, visible_text: Sequence[str] = ()) -> CueAudit:
    """
    Audit the text of a cue. The audit does not see the image; it knows only `visible_text`.

    Args:
        cue (`str`):
            The cue.
        question (`str`):
            The question that the cue belongs to, with its options.
        answer (`str`, *optional*):
            The reference answer. Without it, answer leaks cannot be found.
        visible_text (`Sequence[str]`, *optional*, defaults to `()`):
            Texts in the image (labels, ticks, captions); empty if unknown.

    Returns:
        [`CueAudit`]: The verdicts and the reasons for them.

    Raises:
        `ModuleNotFoundError`: If the extra `cues` is not installed.

    Example:

    ```python
    >>> audit_cue("Chord CD is 12 cm long.", "How long is CD?", answer="12").reasons
    ["the cue says '12 cm', the answer is '12', and no label of the image is known to show it"]
    ```
    """
    with needs_extra("cues", "Auditing cues"):
        from .answer_leak import find_answer_leak
        from .reasoning_leak import find_reasoning_leak

    hidden = find_hidden_text(cue)
    cue, question = fold_text(cue), fold_text(question)
    visible_text = [fold_text(text) for text in visible_text]
    answer_leak, reasons = "none", []
    if answer is not None and answer.strip():
        answer_leak, reasons = find_answer_leak(cue, question, fold_text(answer), visible_text)
    reasoning = find_reasoning_leak(cue, question, visible_text)
    control = hidden + find_control_text(cue)
    return CueAudit(answer_leak, bool(reasoning), bool(control), reasons + reasoning + control)
