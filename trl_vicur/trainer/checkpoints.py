"""
Detects incomplete checkpoints: a run may be killed, or its disk may fill, at any moment.

Trainer writes `trainer_state.json` last, and only then deletes older checkpoints, so that file seals a checkpoint.
Just before it we write a list of all other files, which reveals checkpoints that were damaged or half deleted later.
"""

import json
import logging
import math
import os
import zipfile
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from torch import nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..cue_recovery import CueRecoveryConfig
from .vicur_config import ViCuRConfig


logger = logging.getLogger(__name__)

FILE_LIST_NAME = "checkpoint_files.json"
# File with the options that decide which rows a step trains on
BATCHES_NAME = "batches.json"
# Rollouts of each rank, in a checkpoint that was saved between two steps on the same rollouts
ROLLOUTS_NAME = "rollouts_{}.pt"
# Options that set how a step's rows are split into micro-batches, the order of rows, and the contents of rollouts
BATCH_SHAPE = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")
ROW_ORDER = ("len(train_dataset)", "shuffle_dataset", "seed")
ROLLOUT_CONTENTS = ("distillation_mode", "privilege", "bool(teacher_model_server_url)")
# Files that a resumed run does not read (the first is not pushed to the Hub, the second may be edited), and the list
# itself
NOT_LISTED = (TRAINING_ARGS_NAME, "README.md", FILE_LIST_NAME)


class CheckpointError(ValueError):
    """There is no checkpoint to resume from, or it is incomplete, or it does not match the model or the options."""


def write_file_list(directory: str | os.PathLike) -> None:
    """
    Record names and sizes of a checkpoint's files. Call it when all but `trainer_state.json` are written.

    Args:
        directory (`str` or `os.PathLike`):
            The checkpoint.

    Raises:
        `OSError`: If a file written by `torch.save` is truncated.
    """
    files = [path for path in Path(directory).rglob("*") if path.is_file() and path.name not in NOT_LISTED]
    for path in files:
        # Older releases of torch (2.8) raise nothing if the disk fills while the last bytes are flushed
        if path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            raise OSError(f"{path} is truncated after {path.stat().st_size:,} bytes. Free space on its disk.")
    sizes = {path.relative_to(directory).as_posix(): path.stat().st_size for path in sorted(files)}
    Path(directory, FILE_LIST_NAME).write_text(json.dumps(sizes, indent=2), encoding="utf-8")


def forget_best_checkpoint(directory: str | os.PathLike) -> None:
    """
    Remove the local path of the best checkpoint from a checkpoint that is about to be pushed. The best checkpoint's
    step stays, so a resumed run can still find it.

    Args:
        directory (`str` or `os.PathLike`):
            The checkpoint.
    """
    path = Path(directory, TRAINER_STATE_NAME)
    state = TrainerState.load_from_json(str(path))
    if state.best_model_checkpoint is not None:
        state.best_model_checkpoint = None
        # Replace atomically: this file seals the checkpoint
        state.save_to_json(str(path.with_suffix(".new")))
        path.with_suffix(".new").replace(path)


def check_checkpoint(directory: str | os.PathLike) -> None:
    """
    Check that a checkpoint is complete.

    Args:
        directory (`str` or `os.PathLike`):
            The folder, `checkpoint-N`.

    Raises:
        `CheckpointError`: If it is not. The message names the file and the reason.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"There is no checkpoint {str(directory)!r}.")
    refused = f"The checkpoint {str(directory)!r} cannot be resumed: "
    fix = " Resume from another one; `resume_from_checkpoint=True` picks the newest complete one."
    contents = {}
    for name, meaning in (
        (TRAINER_STATE_NAME, "the run ended while it was being saved"),
        (FILE_LIST_NAME, "it was not saved by ViCuRTrainer, or was saved with `save_only_model=True`"),
        (BATCHES_NAME, "it was saved by an earlier release of trl-vicur"),
    ):
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{refused}it has no {name}; {meaning}.{fix}")
        try:
            contents[name] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{refused}its {name} is truncated or corrupt ({error}).{fix}") from error
    for name, size in contents[FILE_LIST_NAME].items():
        path = directory / name
        if not path.is_file():
            raise CheckpointError(f"{refused}its file {name} is missing.{fix}")
        if path.stat().st_size != size:
            raise CheckpointError(
                f"{refused}its file {name} has {path.stat().st_size} bytes, but was written with {size}.{fix}"
            )


def batch_settings(args: ViCuRConfig, train_dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """
    The settings that decide which rows a step trains on, and how saved rollouts are laid out.

    Args:
        args ([`ViCuRConfig`]):
            Training configuration.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The rows.

    Returns:
        `dict[str, Any]`: The values by name.
    """
    return {
        "num_iterations": args.num_iterations,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "num_processes": args.world_size,
        "len(train_dataset)": None if isinstance(train_dataset, IterableDataset) else len(train_dataset),
        "shuffle_dataset": args.shuffle_dataset,
        "seed": args.seed,
        "distillation_mode": args.distillation_mode,
        "privilege": args.privilege,
        # Whether rollouts hold a server's scores. The address itself may change, and should not be published
        "bool(teacher_model_server_url)": args.teacher_model_server_url is not None,
    }


def check_batches(directory: str | os.PathLike, args: ViCuRConfig, train_dataset: Dataset | IterableDataset) -> None:
    """
    Check that a resumed run continues with the same rows and rollouts as the run that saved the checkpoint.

    Args:
        directory (`str` or `os.PathLike`):
            A complete checkpoint.
        args ([`ViCuRConfig`]):
            Training configuration of the resumed run.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Its rows.

    Raises:
        `CheckpointError`: If a setting that affects them differs.
    """
    saved = json.loads(Path(directory, BATCHES_NAME).read_text(encoding="utf-8"))
    settings = batch_settings(args, train_dataset)
    is_within_rollouts = any(Path(directory).glob(ROLLOUTS_NAME.format("*")))
    names = ["num_iterations"]
    if is_within_rollouts or _rows_per_step(saved) != _rows_per_step(settings):
        names += BATCH_SHAPE
    if is_within_rollouts:
        names += ROLLOUT_CONTENTS
    if not args.ignore_data_skip:
        names += ROW_ORDER
    differing = [name for name in names if saved.get(name) != settings[name]]
    if not differing:
        return
    of_checkpoint, of_run = (
        ", ".join(f"`{name}={each.get(name)!r}`" for name in differing) for each in (saved, settings)
    )
    if is_within_rollouts and not {*differing} <= {*ROW_ORDER}:
        reason = "It was saved between two steps on the same rollouts, whose layout depends on these settings"
    else:
        reason = "The run would repeat or skip rows"
    hint = ", or set `ignore_data_skip=True` to restart the epoch's rows" if {*differing} <= {*ROW_ORDER} else ""
    raise CheckpointError(
        f"The checkpoint {str(directory)!r} was saved with {of_checkpoint}, but this run has {of_run}. {reason}. "
        f"Resume with the checkpoint's settings{hint}, or start a new run from its weights."
    )


def _rows_per_step(settings: dict[str, Any]) -> int:
    return math.prod(settings[name] for name in BATCH_SHAPE)


def get_last_checkpoint(folder: str | os.PathLike) -> str | None:
    """
    The newest complete checkpoint. Incomplete ones are skipped with a warning.

    Args:
        folder (`str` or `os.PathLike`):
            The `output_dir` of a run.

    Returns:
        `str` or `None`: Path of the checkpoint; `None` if there is none.
    """
    steps = [
        (path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-"), path)
        for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    ]
    for _, path in sorted([(int(step), path) for step, path in steps if step.isdecimal()], reverse=True):
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            logger.warning(str(error))
        else:
            return str(path)
    return None


def active_adapter(model: nn.Module) -> str | None:
    """Name of the adapter that is trained; `None` for a model without an adapter."""
    if not isinstance(model, PeftModel):
        return None
    assert isinstance(model.active_adapter, str)  # a list with `PeftMixedModel` only
    return model.active_adapter


def active_adapter_config(model: nn.Module) -> PeftConfig | None:
    """Config of the adapter that is trained; `None` for a model without an adapter."""
    name = active_adapter(model)
    return model.peft_config[name] if isinstance(model, PeftModel) and name is not None else None


def adapter_type(config: PeftConfig) -> str:
    """Name of an adapter's PEFT method."""
    assert isinstance(config.peft_type, PeftType)  # every configuration sets its own
    return config.peft_type.value


def check_adapter(directory: str, model: nn.Module) -> None:
    """
    Check that a checkpoint holds the same kind of adapter, with the same settings, as the model that is trained.

    Args:
        directory (`str`):
            The checkpoint.
        model (`nn.Module`):
            The model that is trained.

    Raises:
        `CheckpointError`: If only one of the two has an adapter, or if the adapters differ in a setting that changes
            what the weights mean.
    """
    refused = f"The checkpoint {directory!r} does not match the model that is trained: "
    fix = " Resume with the settings that it was saved with, or start a new run."
    adapter, saved = active_adapter_config(model), None
    name = active_adapter(model)
    if name is not None and name != "default":  # as PEFT saves it
        directory = os.path.join(directory, name)
    if os.path.isfile(os.path.join(directory, ADAPTER_CONFIG_NAME)):
        saved = PeftConfig.from_pretrained(directory)
    kinds = ["a full model" if config is None else adapter_type(config) for config in (saved, adapter)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(f"{refused}it holds {kinds[0]}, but this run trains {kinds[1]}.{fix}")
    if isinstance(adapter, CueRecoveryConfig):
        for name in (*CueRecoveryConfig.__annotations__, "lora_alpha", "target_modules"):
            if getattr(saved, name) != getattr(adapter, name):
                raise CheckpointError(
                    f"{refused}its adapter has `{name}={getattr(saved, name)!r}`, but the adapter that is trained has "
                    f"`{name}={getattr(adapter, name)!r}`.{fix}"
                )
