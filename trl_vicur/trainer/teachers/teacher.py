"""The interface of a teacher."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from .scores import TeacherScores


Model = PreTrainedModel | PeftModel
# Runs a model over a batch's completions, each after the teacher's prompt: `(batch, completion, hidden)`
HiddenStates = Callable[[Model, dict[str, Any]], torch.Tensor]


class Teacher(ABC):
    """
    Scores the student's completions, each after the teacher's own prompt.

    Attributes:
        description (`str`):
            The teacher's name in a model card.
    """

    description: str

    @abstractmethod
    def score(self, student: Model, inputs: dict[str, Any]) -> TeacherScores:
        """
        Score the completions of a micro-batch.

        Args:
            student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
                The unwrapped student. The call runs inside its wrapper's forward.
            inputs (`dict`):
                The micro-batch, with the tensors that `prepare` returned.
        """

    def prepare(self, conversations: Sequence[list[dict[str, Any]]], batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        Prepare a batch of rollouts, before it is shuffled and split into micro-batches.

        Args:
            conversations (sequence of `list[dict]`):
                The teacher's prompts, with images inside their content blocks.
            batch (`dict`):
                The rollouts, with the token ids of the teacher's prompts.

        Returns:
            `dict[str, torch.Tensor]`: Tensors to add to the batch, one row per sample.
        """
        return {}

    def shares_vision_features(self, is_vision_frozen: bool) -> bool:
        """
        Whether the teacher can reuse features that the student's vision tower computed in the rollout.

        Args:
            is_vision_frozen (`bool`):
                Whether all of the student before its decoder is frozen.
        """
        return False

    def save(self, directory: str) -> None:  # noqa: B027
        """Save the teacher's state in a checkpoint. Most teachers have none."""

    def load(self, directory: str) -> None:  # noqa: B027
        """
        Read the state that `save` wrote.

        Raises:
            `ValueError`: If the checkpoint does not have it, or has that of another model.
        """
