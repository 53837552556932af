"""Sends histograms and alerts, which are not scalars, to TensorBoard, wandb and trackio."""

import torch
from transformers import TrainerCallback
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback, WandbCallback


NUM_BINS = 64


def log_histogram(callbacks: list[TrainerCallback], name: str, values: torch.Tensor, step: int) -> None:
    """
    Log a histogram to every tracker that the trainer reports to, in the tracker's own format.

    Args:
        callbacks (`list[TrainerCallback]`):
            The trainer's callbacks, after they have logged scalars.
        name (`str`):
            Name of the metric, e.g. `"train/advantage/histogram"`.
        values (`torch.Tensor`):
            The values to count.
        step (`int`):
            Optimizer steps so far.
    """
    array = values.float().cpu().numpy()
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            assert callback.tb_writer is not None  # the callback creates it when training begins
            # torch's annotation allows only the names of NumPy's estimators
            callback.tb_writer.add_histogram(name, array, step, bins=NUM_BINS)  # pyright: ignore[reportArgumentType]
            callback.tb_writer.flush()
        elif isinstance(callback, WandbCallback):
            import wandb

            # wandb's annotation lacks arrays
            histogram = wandb.Histogram(array, num_bins=NUM_BINS)  # pyright: ignore[reportArgumentType]
            wandb.log({name: histogram, "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            import trackio

            histogram = trackio.Histogram(array, num_bins=NUM_BINS)
            trackio.log({name: histogram, "train/global_step": step}, step=step)


def alert(callbacks: list[TrainerCallback], title: str, text: str, step: int) -> None:
    """
    Send an alert to every tracker that the trainer reports to: as text in TensorBoard, as an alert in the others.

    Args:
        callbacks (`list[TrainerCallback]`):
            The trainer's callbacks, after they have logged scalars.
        title (`str`):
            What happened.
        text (`str`):
            The figures, and what to try.
        step (`int`):
            Optimizer steps so far.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            assert callback.tb_writer is not None
            callback.tb_writer.add_text(title, text, step)
            callback.tb_writer.flush()
        elif isinstance(callback, WandbCallback):
            import wandb

            assert wandb.run is not None
            wandb.run.alert(title, text, level="WARN")
        elif isinstance(callback, TrackioCallback):
            import trackio

            trackio.alert(title, text)
