import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


EMA_TEACHER_FILE = "ema_teacher.safetensors"


class EMATeacherCallback(TrainerCallback):
    """
    Keeps an exponential moving average of the student's trainable weights and lends it to teacher passes.

        teacher ← (1 − update_rate) · teacher + update_rate · student,    every `sync_steps` optimizer steps

    Frozen weights are shared with the student, so that an adapter's teacher costs only another adapter.

    Args:
        model (`nn.Module`):
            The student.
        update_rate (`float`):
            Weight of the student in each update.
        sync_steps (`int`):
            Optimizer steps between updates.
    """

    def __init__(self, model: nn.Module, update_rate: float, sync_steps: int):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.update_rate = update_rate
        self.sync_steps = sync_steps

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # The model moves to its device after the trainer was built
        self.average = {name: average.to(self.parameters[name]) for name, average in self.average.items()}

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step % self.sync_steps == 0:
            for name, average in self.average.items():
                average.lerp_(self.parameters[name].detach(), self.update_rate)

    @contextmanager
    def teacher_weights(self) -> Iterator[None]:
        """While active, the model has the teacher's weights. For passes without gradient."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        # Exchanges the storages, so that graphs of the student's pass find its own weights again
        for name, parameter in self.parameters.items():
            parameter.data, self.average[name] = self.average[name], parameter.data

    def save(self, directory: str) -> None:
        """Write the average beside a checkpoint."""
        save_file(
            {name: average.contiguous() for name, average in self.average.items()},
            os.path.join(directory, EMA_TEACHER_FILE),
        )

    def load(self, directory: str) -> None:
        """
        Read the average that [`EMATeacherCallback.save`] wrote.

        Raises:
            `ValueError`: If the checkpoint has no average, or one of another model.
        """
        path = os.path.join(directory, EMA_TEACHER_FILE)
        if not os.path.isfile(path):
            raise ValueError(
                f"The checkpoint {directory!r} has no {EMA_TEACHER_FILE}: it was not made with "
                "`teacher_model_kind='ema'` and cannot be resumed with it."
            )
        loaded = load_file(path)
        if loaded.keys() != self.average.keys():
            raise ValueError(f"{path!r} holds the weights of another model or adapter than the one that is trained.")
        for name, average in self.average.items():
            average.copy_(loaded[name])
