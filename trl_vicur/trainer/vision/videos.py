"""Videos of a batch, which TRL passes on to the processor in a prompt, but not from there to the model."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch


# What a model takes of videos beside the tokens
VIDEO_KEYS = ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts")


def add_videos(prompt: list[dict[str, Any]], videos: Sequence, num_images: int) -> list[dict[str, Any]]:
    """
    Put a row's videos into its prompt, as TRL's `prepare_multimodal_messages` does with images.

    Args:
        prompt (`list[dict]`):
            Messages; either all contents are strings, and the videos go before the text of the first user turn, or
            there is a block `{"type": "video"}` for each video.
        videos (sequence):
            The videos.
        num_images (`int`):
            How many images the row has. They go before the videos where all contents are strings.

    Returns:
        `list[dict]`: New messages; the given ones are not modified.

    Raises:
        `ValueError`: If there are not as many blocks as videos.
    """
    first_user = next((i for i, message in enumerate(prompt) if message["role"] == "user"), None)
    if videos and first_user is not None and not any(isinstance(message.get("content"), list) for message in prompt):
        visuals = [{"type": "image"}] * num_images + [{"type": "video"}] * len(videos)
        content = [*visuals, {"type": "text", "text": prompt[first_user]["content"]}]
        prompt = [*prompt[:first_user], {**prompt[first_user], "content": content}, *prompt[first_user + 1 :]]

    num_blocks = 0
    filled = []
    for message in prompt:
        if isinstance(message.get("content"), list):
            content = []
            for block in message["content"]:
                if block["type"] == "video":
                    if num_blocks < len(videos):
                        block = {**block, "video": videos[num_blocks]}
                    num_blocks += 1
                content.append(block)
            message = {**message, "content": content}
        filled.append(message)
    if num_blocks != len(videos):
        raise ValueError(
            f"Number of videos provided ({len(videos)}) does not match number of video placeholders ({num_blocks})."
        )
    return filled


def split_videos(fields: dict[str, Any], num_videos: list[int]) -> dict[str, list[torch.Tensor]]:
    """
    Cut what a model takes of a batch's videos into that of each sample, to be shuffled and split with the batch.

    Args:
        fields (`dict`):
            What the processor returned.
        num_videos (`list[int]`):
            Number of videos of each sample.

    Returns:
        `dict[str, list[torch.Tensor]]`: For each of [`VIDEO_KEYS`] that there is, a tensor for each sample.
    """
    fields = {key: torch.as_tensor(fields[key]) for key in VIDEO_KEYS if key in fields}
    num_patches = fields["video_grid_thw"].prod(dim=-1).tolist()
    bounds = pairwise(accumulate(num_videos, initial=0))
    patches_by_sample = [sum(num_patches[start:end]) for start, end in bounds]
    return {
        key: list(value.split(patches_by_sample if key == "pixel_values_videos" else num_videos))
        for key, value in fields.items()
    }
