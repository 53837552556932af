"""Thinking modes of chat templates: privilege costs thinking models, and teacher and student must agree on one."""

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import AutoProcessor, ProcessorMixin

from .vicur_config import ViCuRConfig


ThinkingMode = Literal["on", "off", "none"]
SWITCHES = ("enable_thinking", "thinking")  # variables of chat templates: Qwen's, GLM's and Gemma's; Granite's
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}]
OPEN_BLOCK = re.compile(r"<think>(?!.*</think>)", re.DOTALL)
CLOSED_BLOCK = re.compile(r"<think>\s*</think>")


def thinking_mode(
    render: Callable[..., str], chat_template_kwargs: dict[str, Any] | None, switches: Iterable[str] = SWITCHES
) -> ThinkingMode:
    """
    The mode that a chat template puts a model into.

    Args:
        render (`Callable`):
            Renders one user turn and the generation prompt, with the keyword arguments as the template's variables.
        chat_template_kwargs (`dict`, *optional*):
            The variables that prompts are rendered with.
        switches (iterable of `str`, *optional*, defaults to `("enable_thinking", "thinking")`):
            Variables that may switch thinking on and off.

    Returns:
        `"on"`, `"off"`, or `"none"` if the template knows no thinking.
    """
    kwargs = chat_template_kwargs or {}
    rendered = render(**kwargs)
    if OPEN_BLOCK.search(rendered):
        return "on"
    if CLOSED_BLOCK.search(rendered):
        return "off"
    with_thinking, without = (render(**{**kwargs, **dict.fromkeys(switches, value)}) for value in (True, False))
    if with_thinking == without:
        return "none"
    # Qwen3 thinks by default and has a mark for not thinking; Gemma 4 is the other way around
    return "off" if rendered == without else "on"


def thinking_mode_of_processor(
    processing_class: ProcessorMixin, chat_template_kwargs: dict[str, Any] | None
) -> ThinkingMode | None:
    """[`thinking_mode`] of a processor's chat template; `None` if it fails on contents in blocks."""
    template = str(processing_class.chat_template)

    def render(**variables: Any) -> str:
        return processing_class.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **variables)

    # A processor takes what its template does not know for an argument of its own
    try:
        return thinking_mode(render, chat_template_kwargs, [name for name in SWITCHES if name in template])
    except (TypeError, TemplateError):
        return None


def warn_about_thinking(processing_class: ProcessorMixin, args: ViCuRConfig) -> None:
    """Warn if the student thinks before it answers and the teacher sees a privilege."""
    if args.privilege != "none" and thinking_mode_of_processor(processing_class, args.chat_template_kwargs) == "on":
        warnings.warn(
            f"The student's chat template renders prompts for thinking, and `privilege={args.privilege!r}`: a teacher "
            "with privilege costs thinking models up to 17 % of their accuracy (arXiv 2607.05184). Use the instruct "
            "version of the checkpoint; or, if its template has the switch, "
            "`chat_template_kwargs={'enable_thinking': False}`; or `privilege='none'`."
        )


def warn_about_thinking_teacher(
    teacher_name: str, teacher_mode: ThinkingMode | None, processing_class: ProcessorMixin, args: ViCuRConfig
) -> None:
    """
    Warn if the teacher's own chat template puts it into another mode than the student's does, which renders what the
    teacher reads.

    Args:
        teacher_name (`str`):
            Id or path of the teacher.
        teacher_mode (`"on"`, `"off"` or `"none"`, *optional*):
            Mode that its own chat template puts it into; `None` if it is not known.
        processing_class ([`~transformers.ProcessorMixin`]):
            Processor of the student.
        args ([`ViCuRConfig`]):
            Training configuration.
    """
    student_mode = thinking_mode_of_processor(processing_class, args.chat_template_kwargs)
    if None not in (teacher_mode, student_mode) and teacher_mode != student_mode:
        does = {"on": "renders prompts for thinking", "off": "switches thinking off", "none": "has no thinking mode"}
        warnings.warn(
            f"Teacher and student are in different thinking modes: with `chat_template_kwargs="
            f"{args.chat_template_kwargs!r}` the chat template of the teacher {teacher_name!r} {does[teacher_mode]}, "
            f"but the student's, which renders the prompts of both, {does[student_mode]}. The teacher would score "
            "prompts unlike those that it was trained on. Choose two thinking or two instruct checkpoints, or put "
            "both into the same mode with `chat_template_kwargs={'enable_thinking': ...}`."
        )


def load_thinking_mode(model_name: str, revision: str | None, args: ViCuRConfig) -> ThinkingMode | None:
    """[`thinking_mode`] of a model's own chat template; `None` if it has none, since a teacher reads token ids."""
    try:
        processing_class = AutoProcessor.from_pretrained(
            model_name, revision=revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError):
        return None
    if getattr(processing_class, "chat_template", None) is None:
        return None
    return thinking_mode_of_processor(processing_class, args.chat_template_kwargs)
