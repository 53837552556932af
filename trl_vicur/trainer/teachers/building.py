"""Chooses the teacher. This is the only place where options decide which model scores the completions."""

from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin
from trl.trainer.utils import get_config_model_id

from ...cue_recovery import CueRecoveryConfig
from ...hub.names import hub_model_name
from ..checks.adapter_base import trainable_base_weights
from ..mixed_precision import ForwardRedirection
from ..vicur_config import ViCuRConfig
from .separate_teacher import SeparateTeacher, copy_of_base, shard, warn_about_copy
from .served_teacher import ServedTeacher
from .student_teachers import AdapterOffTeacher, EMATeacher, LiveTeacher
from .teacher import HiddenStates, Teacher
from .teacher_server import TeacherServer


def build_teacher(
    args: ViCuRConfig,
    student: PreTrainedModel | PeftModel,
    teacher_model: nn.Module | None,
    server: TeacherServer | None,
    processing_class: ProcessorMixin,
    accelerator: Accelerator,
    forward_redirection: ForwardRedirection,
    hidden_states: HiddenStates,
) -> Teacher:
    """
    Build the teacher that a trainer's options ask for.

    Args:
        args ([`ViCuRConfig`]):
            Training configuration.
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student before training.
        teacher_model (`nn.Module`, *optional*):
            A separate teacher, as TRL prepared it.
        server ([`TeacherServer`], *optional*):
            Client of the teacher's server.
        processing_class ([`~transformers.ProcessorMixin`]):
            Processor of the student.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
        forward_redirection ([`ForwardRedirection`]):
            Runs a method inside a wrapped model's forward.
        hidden_states (`Callable`):
            Runs a model over completions after the teacher's prompts, see `HiddenStates`.
    """
    if server is not None:
        chat_template_kwargs = args.chat_template_kwargs or {}
        assert isinstance(chat_template_kwargs, dict)  # the configuration parses JSON strings
        return ServedTeacher(server, processing_class, chat_template_kwargs)
    run = hidden_states, args.temperature
    if teacher_model is not None:
        name = hub_model_name(get_config_model_id(accelerator.unwrap_model(teacher_model).config)) or "another model"
        if accelerator.is_fsdp2:
            teacher_model = shard(teacher_model, accelerator)
        return SeparateTeacher(*run, teacher_model, accelerator, forward_redirection, name)
    if args.teacher_model_kind == "live":
        return LiveTeacher(*run, args.num_iterations)
    if args.teacher_model_kind == "ema":
        return EMATeacher(*run, student, args.teacher_update_rate, args.teacher_sync_steps)
    if isinstance(student, PeftModel):
        trained = trainable_base_weights(student)
        if not trained:
            return AdapterOffTeacher(*run)
        if not any(
            isinstance(config, CueRecoveryConfig) and config.train_base for config in student.peft_config.values()
        ):
            warn_about_copy(student, trained)
    return SeparateTeacher(
        *run, copy_of_base(student, accelerator), accelerator, forward_redirection, AdapterOffTeacher.description
    )
