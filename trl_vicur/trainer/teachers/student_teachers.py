"""Teachers that run the student model itself, with other weights or the same ones. They need no copy of the model."""

import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..lm_head import LMHead
from .scores import StateScores
from .teacher import HiddenStates, Model, Teacher


EMA_TEACHER_FILE = "ema_teacher.safetensors"


class StudentTeacher(Teacher):
    """
    The student as its own teacher.

    Args:
        hidden_states (`Callable`):
            Runs a model over completions, see `HiddenStates`.
        temperature (`float`):
            Temperature of the scores.
    """

    def __init__(self, hidden_states: HiddenStates, temperature: float):
        self.hidden_states = hidden_states
        self.temperature = temperature

    @abstractmethod
    def weights(self, student: Model) -> AbstractContextManager[None]:
        """While active, the student has the teacher's weights. Only for passes without gradient."""

    @contextmanager
    def acting(self, student: Model) -> Iterator[None]:
        """While active, the student acts as the teacher: it has the teacher's weights and is in evaluation mode."""
        was_training = student.training
        with self.weights(student):
            student.eval()
            try:
                yield
            finally:
                student.train(was_training)

    @torch.no_grad()
    def score(self, student: Model, inputs: dict[str, Any]) -> StateScores:
        with self.acting(student):
            states = self.hidden_states(student, inputs)
            # The detached head keeps the teacher's weights after the student's are restored
            return StateScores(states, LMHead.from_model(student).detach(), self.temperature)

    def shares_vision_features(self, is_vision_frozen: bool) -> bool:
        return is_vision_frozen


class AdapterOffTeacher(StudentTeacher):
    """The student with its adapter disabled: the frozen initial student, if only the adapter trains."""

    description = "the initial student"

    def weights(self, student: Model) -> AbstractContextManager[None]:
        assert isinstance(student, PeftModel)
        return student.disable_adapter()


class LiveTeacher(StudentTeacher):
    """
    The student with its current weights.

    Args:
        hidden_states (`Callable`):
            Runs a model over completions, see `HiddenStates`.
        temperature (`float`):
            Temperature of the scores.
        num_iterations (`int`):
            Optimizer steps on each generation batch.
    """

    description = "the student itself"

    def __init__(self, hidden_states: HiddenStates, temperature: float, num_iterations: int):
        super().__init__(hidden_states, temperature)
        self.num_iterations = num_iterations

    def weights(self, student: Model) -> AbstractContextManager[None]:
        return nullcontext()

    def shares_vision_features(self, is_vision_frozen: bool) -> bool:
        # Weights that train change only at the next optimizer step
        return is_vision_frozen or self.num_iterations == 1


class EMATeacher(StudentTeacher, TrainerCallback):
    """
    The student with an exponential moving average of its trainable weights.

        teacher ← (1 − update_rate) · teacher + update_rate · student,    every `sync_steps` optimizer steps

    Frozen weights are shared with the student, so with an adapter the teacher only costs a second adapter.

    Args:
        hidden_states (`Callable`):
            Runs a model over completions, see `HiddenStates`.
        temperature (`float`):
            Temperature of the scores.
        student ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student.
        update_rate (`float`):
            Weight of the student in each update.
        sync_steps (`int`):
            Optimizer steps between updates.
    """

    description = "a moving average of the student"

    def __init__(
        self, hidden_states: HiddenStates, temperature: float, student: Model, update_rate: float, sync_steps: int
    ):
        super().__init__(hidden_states, temperature)
        self.parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.update_rate = update_rate
        self.sync_steps = sync_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Trainer moves the model to its device after this teacher was built
        self.average = {name: average.to(self.parameters[name]) for name, average in self.average.items()}

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.sync_steps == 0:
            for name, average in self.average.items():
                average.lerp_(self.parameters[name].detach(), self.update_rate)

    @contextmanager
    def weights(self, student: Model) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        # Swap the storages, not the values: the autograd graph of the student's pass still needs the student's weights
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def save(self, directory: str) -> None:
        save_file(
            {name: average.contiguous() for name, average in self.average.items()},
            os.path.join(directory, EMA_TEACHER_FILE),
        )

    def load(self, directory: str) -> None:
        path = os.path.join(directory, EMA_TEACHER_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"The checkpoint {directory!r} has no {EMA_TEACHER_FILE}: it was not saved with "
                "`teacher_model_kind='ema'` and cannot be resumed with it."
            )
        loaded = load_file(path)
        if loaded.keys() != self.average.keys():
            raise ValueError(f"{path!r} holds weights of a different model or adapter than this run trains.")
        for name, average in self.average.items():
            average.copy_(loaded[name])
