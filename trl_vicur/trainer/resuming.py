"""Resumes a run to the weights that it would have reached uninterrupted, even if it was killed during a save."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import IterableDataset
from peft import PeftModel
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.utils import RepeatSampler

from .checkpoints import (
    BATCHES_NAME,
    FILE_LIST_NAME,
    ROLLOUTS_NAME,
    CheckpointError,
    active_adapter,
    batch_settings,
    check_adapter,
    check_batches,
    check_checkpoint,
    get_last_checkpoint,
    write_file_list,
)
from .trl_trainer import TRLTrainer


class ResumingMixin(TRLTrainer):
    """Seals checkpoints, finds the newest complete one, and restores rollouts, row order and teacher state."""

    _train_sampler: RepeatSampler

    @property
    def _is_within_rollouts(self) -> bool:
        """Whether the next micro-batch reuses the current rollouts."""
        return self._step % (self.args.gradient_accumulation_steps * self.args.num_iterations) != 0

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`] does.

        A run that was killed at any moment continues with `resume_from_checkpoint=True` from the newest complete
        checkpoint, to the same weights as if it had not been killed (on the same machine; bit for bit on a CPU).

        Raises:
            `CheckpointError` (a `ValueError`): If the checkpoint is incomplete, or was saved with another model or
                other options.
        """
        if resume_from_checkpoint is True:
            assert self.args.output_dir is not None  # the configuration fills in a default
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir!r} holds no complete checkpoint. Leave "
                    "it out to start a new run."
                )
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        if resume_from_checkpoint:
            check_batches(resume_from_checkpoint, self.args, self.train_dataset)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        run_dir = self._get_output_dir(trial=trial)
        directory = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            # These seal the checkpoint, so they are written last. Those of an earlier run must not seal this one early
            for name in (TRAINER_STATE_NAME, FILE_LIST_NAME):
                (directory / name).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            error.add_note(
                f"{directory} could not be saved; its disk has {shutil.disk_usage(run_dir).free:,} bytes left. The "
                f"newest complete checkpoint is {get_last_checkpoint(run_dir)}; `train(resume_from_checkpoint=True)` "
                "continues from it."
            )
            raise

    def _save_rng_state(self, output_dir):
        # Trainer calls this just before it writes `trainer_state.json`, which seals the checkpoint
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            self.teacher.save(output_dir)
        if self._is_within_rollouts:
            torch.save(self._buffered_inputs, self._rollouts_path(output_dir))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            settings = batch_settings(self.args, self.train_dataset)
            Path(output_dir, BATCHES_NAME).write_text(json.dumps(settings, indent=2), encoding="utf-8")
            write_file_list(output_dir)

    def _rollouts_path(self, checkpoint: str) -> str:
        """File with this rank's generation batch, in checkpoints saved between two steps on the same rollouts."""
        return os.path.join(checkpoint, ROLLOUTS_NAME.format(self.args.process_index))

    def _load_best_model(self):
        name = active_adapter(self.model)
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if is_whole and isinstance(self.model, PeftModel) and name not in (None, "default"):
            # PEFT saves an adapter that is not named "default" in a subfolder, where Trainer does not look
            assert self.state.best_model_checkpoint is not None  # Trainer calls this only if there is one
            self.model.load_adapter(os.path.join(self.state.best_model_checkpoint, name), name)
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_adapter(resume_from_checkpoint, self.model)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except ValueError as error:  # weights are missing or not finite
            raise CheckpointError(str(error)) from error
        self.teacher.load(resume_from_checkpoint)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        epochs_trained, steps_trained_in_current_epoch = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        self._find_best_checkpoint(trial)
        self._restore_rollouts(resume_from_checkpoint)
        if isinstance(self.train_dataset, IterableDataset):
            # Trainer assumes epochs of `max_steps` steps, but the stream may have restarted earlier, and the
            # checkpoint's `max_steps` may differ. If `epoch` is exactly 1, the run did all its steps within one pass
            # over the stream
            epoch = self.state.epoch or 0.0
            epochs_trained = max(0, math.ceil(epoch) - 1)
            if resume_from_checkpoint is not None and not self.args.ignore_data_skip:
                saved_state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
                steps = round((epoch - epochs_trained) * saved_state.max_steps)
                steps_trained_in_current_epoch = steps * self.args.gradient_accumulation_steps
        elif self._train_sampler.shuffle:
            for _ in range(epochs_trained):  # TRL's sampler always starts with the order of the first epoch
                torch.randperm(self._train_sampler.num_samples, generator=self._train_sampler.generator)
        if self.state.global_step >= max_steps:  # the run was finished, but Trainer would do another step
            epochs_trained = num_train_epochs
        return epochs_trained, steps_trained_in_current_epoch

    def _find_best_checkpoint(self, trial: Any) -> None:
        # The path was removed before a push, or the folder has moved since (which transformers 5.16 does not notice)
        best = self.state.best_model_checkpoint
        if self.state.best_global_step and not (best and Path(best).is_dir()):
            moved = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(moved) if moved.is_dir() else None

    def _restore_rollouts(self, checkpoint: str | None) -> None:
        # TRL restarts its step count at zero, with no rollouts in the buffer
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        self._buffered_inputs = None
        if checkpoint is not None and self._is_within_rollouts:
            # Load on the CPU first: `torch.load` may not know the rank's own device ("cpu:0")
            rollouts: list[dict[str, Any]] = torch.load(
                self._rollouts_path(checkpoint), map_location="cpu", weights_only=True
            )
            self._buffered_inputs = [
                {name: send_to_device(value, self.args.device) for name, value in batch.items()} for batch in rollouts
            ]
