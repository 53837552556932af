"""Warns about thinking modes: privilege harms thinking models, and teacher and student need the same mode."""

import re
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import AutoProcessor, PreTrainedTokenizerBase, ProcessorMixin

from ..vicur_config import ViCuRConfig, template_variables


ThinkingMode = Literal["on", "off", "none"]
# Chat template variables: the first is Qwen's, GLM's and Gemma's, the second Granite's
SWITCHES = ("enable_thinking", "thinking")
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}]
OPEN_BLOCK = re.compile(r"<think>(?!.*</think>)", re.DOTALL)
CLOSED_BLOCK = re.compile(r"<think>\s*</think>")


def thinking_mode(
    render: Callable[..., str], chat_template_kwargs: dict[str, Any] | None, switches: Iterable[str] = SWITCHES
) -> ThinkingMode:
    """
    Find out which thinking mode a chat template puts the model in.

    Args:
        render (`Callable`):
            Renders one user turn and the generation prompt. Its keyword arguments are the template's variables.
        chat_template_kwargs (`dict`, *optional*):
            The variables that prompts are rendered with.
        switches (iterable of `str`, *optional*, defaults to `("enable_thinking", "thinking")`):
            Variables that may switch thinking on and off.

    Returns:
        `"on"`, `"off"`, or `"none"` if the template has no thinking mode.
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
    # Qwen3 thinks by default and marks prompts without thinking; Gemma 4 is the other way round
    return "off" if rendered == without else "on"


def thinking_mode_of_processor(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None
) -> ThinkingMode | None:
    """[`thinking_mode`] of a processor's chat template; `None` if the template fails on content blocks."""
    template = str(processing_class.chat_template)

    def render(**variables: Any) -> str:
        rendered = processing_class.apply_chat_template(
            MESSAGES, tokenize=False, add_generation_prompt=True, **variables
        )
        assert isinstance(rendered, str)  # because of `tokenize=False`
        return rendered

    # A processor treats variables that its template lacks as its own arguments
    try:
        return thinking_mode(render, chat_template_kwargs, [name for name in SWITCHES if name in template])
    except (TypeError, TemplateError):
        return None


def warn_about_thinking(processing_class: ProcessorMixin, args: ViCuRConfig) -> None:
    """Warn if the student thinks before it answers and the teacher sees privileged text."""
    if args.privilege != "none" and thinking_mode_of_processor(processing_class, template_variables(args)) == "on":
        warnings.warn(
            "The student's chat template renders prompts for thinking, but the teacher is privileged "
            f"(`privilege={args.privilege!r}`), which costs thinking models up to 17 % of their accuracy (arXiv "
            "2607.05184). Use the instruct checkpoint, `chat_template_kwargs={'enable_thinking': False}` if its "
            "template has this switch, or `privilege='none'`."
        )


def warn_about_thinking_teacher(
    teacher_name: str, teacher_mode: ThinkingMode | None, processing_class: ProcessorMixin, args: ViCuRConfig
) -> None:
    """
    Warn if the teacher's chat template and the student's, which renders the prompts of both, are in different modes.

    Args:
        teacher_name (`str`):
            Id or path of the teacher.
        teacher_mode (`"on"`, `"off"` or `"none"`, *optional*):
            Mode of the teacher's own chat template; `None` if unknown.
        processing_class ([`~transformers.ProcessorMixin`]):
            Processor of the student.
        args ([`ViCuRConfig`]):
            Training configuration.
    """
    student_mode = thinking_mode_of_processor(processing_class, template_variables(args))
    if teacher_mode is not None and student_mode is not None and teacher_mode != student_mode:
        does = {"on": "renders prompts for thinking", "off": "switches thinking off", "none": "has no thinking mode"}
        warnings.warn(
            f"Teacher and student are in different thinking modes: with `chat_template_kwargs="
            f"{args.chat_template_kwargs!r}` the chat template of the teacher {teacher_name!r} {does[teacher_mode]}, "
            f"but the student's, which renders the prompts of both, {does[student_mode]}. The teacher would score "
            "prompts unlike those it was trained on. Choose two thinking or two instruct checkpoints, or put both in "
            "the same mode with `chat_template_kwargs={'enable_thinking': ...}`."
        )


def load_thinking_mode(model_name: str, revision: str | None, args: ViCuRConfig) -> ThinkingMode | None:
    """[`thinking_mode`] of a teacher's own chat template; `None` if it has none (scoring does not need one)."""
    try:
        processing_class = AutoProcessor.from_pretrained(
            model_name, revision=revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError):
        return None
    # For a model without a processor, `AutoProcessor` returns a tokenizer, or an image processor
    if not isinstance(processing_class, ProcessorMixin | PreTrainedTokenizerBase):
        return None
    if processing_class.chat_template is None:
        return None
    return thinking_mode_of_processor(processing_class, template_variables(args))
