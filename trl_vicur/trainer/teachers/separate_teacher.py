"""A teacher with weights of its own in this process: a larger model, or a frozen copy of the student."""

import copy
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, fsdp2_prepare_model
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed

from ..lm_head import LMHead
from ..mixed_precision import ForwardRedirection
from .scores import StateScores
from .teacher import HiddenStates, Model, Teacher


class SeparateTeacher(Teacher):
    """
    A teacher model separate from the student.

    Args:
        hidden_states (`Callable`):
            Runs a model over completions, see `HiddenStates`.
        temperature (`float`):
            Temperature of the scores.
        model (`nn.Module`):
            The teacher, as accelerate or DeepSpeed wrapped it.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
        forward_redirection ([`ForwardRedirection`]):
            Runs a method inside a wrapped model's forward, so that FSDP gathers its shards.
        description (`str`):
            The teacher's name in a model card.
    """

    def __init__(
        self,
        hidden_states: HiddenStates,
        temperature: float,
        model: nn.Module,
        accelerator: Accelerator,
        forward_redirection: ForwardRedirection,
        description: str,
    ):
        self.hidden_states = hidden_states
        self.temperature = temperature
        self.model = model
        self.accelerator = accelerator
        self.forward_redirection = forward_redirection
        self.description = description

    @torch.no_grad()
    def score(self, student: Model, inputs: dict[str, Any]) -> StateScores:
        self.model.eval()
        teacher = self.accelerator.unwrap_model(self.model)
        states = self.forward_redirection(self.model, teacher, self.hidden_states, teacher, inputs)
        return StateScores(states, LMHead.from_model(teacher), self.temperature)


def copy_of_base(student: PreTrainedModel | PeftModel, accelerator: Accelerator) -> nn.Module:
    """
    A frozen copy of the student's initial weights, without its adapter, prepared for evaluation.

    Args:
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student before training.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
    """
    teacher = copy.deepcopy(student)
    if isinstance(teacher, PeftModel):
        teacher = teacher.unload()
    teacher.requires_grad_(False)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its engine also casts the teacher to bfloat16
        return prepare_deepspeed(teacher, accelerator)
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    return shard(teacher, accelerator) if accelerator.is_fsdp2 else teacher


def warn_about_copy(student: PeftModel, trained: list[str]) -> None:
    """
    Warn that base weights train with the adapter, so that the teacher must be a copy of the base.

    Args:
        student ([`~peft.PeftModel`]):
            The student.
        trained (`list[str]`):
            Names of the trained base weights.
    """
    warnings.warn(
        f"{len(trained)} weight(s) of the base train with the adapter, among them '{trained[0]}'. Disabling the "
        "adapter would not restore their initial values, so the teacher is a frozen copy of the base, which needs "
        f"another {student.get_memory_footprint() / 2**30:.2f} GiB. Freeze the base (`bias='none'`) to avoid the copy."
    )


def shard(teacher: nn.Module, accelerator: Accelerator) -> nn.Module:
    """
    Shard a teacher with FSDP2, like the student. TRL leaves it unsharded, on the device where it was loaded.

    Args:
        teacher (`nn.Module`):
            The teacher.
        accelerator ([`~accelerate.Accelerator`]):
            The trainer's accelerator.
    """
    state = accelerator.state
    plugin = state.fsdp_plugin
    # `fsdp2_prepare_model` stores the layer classes of the first model that it shards in the plugin
    state.fsdp_plugin = copy.copy(plugin)
    teacher = fsdp2_prepare_model(accelerator, teacher.requires_grad_(False))
    state.fsdp_plugin = plugin
    return teacher
