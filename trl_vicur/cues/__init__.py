"""Generate visual cues with any vision-language model, and check that a student can recover them."""

from ..generation import (
    ChatRequest,
    ChatResponse,
    Generator,
    GeneratorUnavailableError,
    OpenAIGenerator,
    TransformersGenerator,
)
from .audit import audit_cues
from .generate import generate_cues
from .privilege_gap import measure_privilege_gap
from .prompts import CUE_PROMPT, CuePrompt
from .recoverability import measure_recoverability
from .regenerate import regenerate_cues
from .report import write_html_report
from .text_audit import CueAudit, audit_cue
from .usefulness import measure_usefulness


__all__ = [
    "CUE_PROMPT",
    "ChatRequest",
    "ChatResponse",
    "CueAudit",
    "CuePrompt",
    "Generator",
    "GeneratorUnavailableError",
    "OpenAIGenerator",
    "TransformersGenerator",
    "audit_cue",
    "audit_cues",
    "generate_cues",
    "measure_privilege_gap",
    "measure_recoverability",
    "measure_usefulness",
    "regenerate_cues",
    "write_html_report",
]
