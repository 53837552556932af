"""Model inputs of a batch's videos. TRL#5373: TRL passes videos to the processor, but not on to the model."""

from itertools import accumulate, pairwise
from typing import Any

import torch


# Model inputs of videos besides the token ids
VIDEO_KEYS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


def split_videos(fields: dict[str, Any], num_videos: list[int]) -> dict[str, list[torch.Tensor]]:
    """
    Split the model inputs of a batch's videos by sample, so that they can be shuffled and split with the batch.

    Args:
        fields (`dict`):
            The processor's outputs.
        num_videos (`list[int]`):
            Number of videos of each sample.

    Returns:
        `dict[str, list[torch.Tensor]]`: For each of [`VIDEO_KEYS`] in `fields`, one tensor per sample.
    """
    fields = {key: torch.as_tensor(fields[key]) for key in VIDEO_KEYS if key in fields}
    num_patches = fields["video_grid_thw"].prod(dim=-1).tolist()
    bounds = pairwise(accumulate(num_videos, initial=0))
    patches_by_sample = [sum(num_patches[start:end]) for start, end in bounds]
    return {
        key: list(value.split(patches_by_sample if key == "pixel_values_videos" else num_videos))
        for key, value in fields.items()
    }
