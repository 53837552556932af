"""Map visual tokens to the parts of images and video frames that they cover."""

import math
from typing import NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedConfig, ProcessorMixin


class AttendedPicture(NamedTuple):
    """
    A picture and the sink's attention to each part of it.

    Args:
        name (`str`):
            Its label, e.g. `"image 1"` or `"video 1, frames 3–4"` (in two lines).
        picture (`PIL.Image.Image`):
            The original image, or the first of the frames as the model sees it.
        attention (`torch.Tensor` of shape `(layers, rows, columns)`):
            The sink's attention to each visual token. The tokens tile the whole picture evenly.
    """

    name: str
    picture: Image.Image
    attention: torch.Tensor


def attended_pictures(
    attention: torch.Tensor,
    inputs: dict[str, torch.Tensor],
    images: list[Image.Image],
    config: PreTrainedConfig,
    processing_class: ProcessorMixin,
) -> list[AttendedPicture]:
    """
    Split the attention over a prompt by image, and by group of video frames that share their tokens.

    Args:
        attention (`torch.Tensor` of shape `(layers, seq)`):
            The attention to split.
        inputs (`dict[str, torch.Tensor]`):
            The processor's outputs for one prompt.
        images (`list[PIL.Image.Image]`):
            The prompt's images.
        config ([`~transformers.PreTrainedConfig`]):
            The model's config, with the ids of its visual tokens.
        processing_class ([`~transformers.ProcessorMixin`]):
            The processor, with the patch sizes of its videos.

    Returns:
        `list[AttendedPicture]`: First the images, then the videos frame by frame; empty if the prompt has none.

    Raises:
        `ValueError`: If the processor does not report the grid of the visual tokens.
    """
    pictures = []
    for kind in ("image", "video"):
        # Some models have only one of the two ids; LLaVA's config maps the name to another attribute
        token_id = getattr(config, f"{kind}_token_id", None)
        positions = [i for i, input_id in enumerate(inputs["input_ids"][0].tolist()) if input_id == token_id]
        if not positions:
            continue
        of_kind = attention[:, positions]
        grids = split_into_grids(of_kind, inputs.get(f"{kind}_grid_thw"), config.model_type)
        if kind == "image":
            for number, (image, grid) in enumerate(zip(images, grids, strict=True), start=1):
                pictures.append(AttendedPicture(f"image {number}", image, grid[:, 0]))
            continue
        frames = video_frames(inputs["pixel_values_videos"], inputs["video_grid_thw"], processing_class)
        size = processing_class.video_processor.temporal_patch_size
        for number, (frames_of_video, grid) in enumerate(zip(frames, grids, strict=True), start=1):
            for time, frame in enumerate(frames_of_video):
                name = f"video {number}\nframes {time * size + 1}–{(time + 1) * size}"
                pictures.append(AttendedPicture(name, frame, grid[:, time]))
    return pictures


def split_into_grids(attention: torch.Tensor, grid_thw: torch.Tensor | None, model_type: str) -> list[torch.Tensor]:
    """
    Arrange the attention to all images (or all videos) of a prompt in two dimensions.

    Each visual token covers a square of merged patches, in reading order: frames, rows, columns. The side of the
    square is computed from the numbers of tokens and patches.

    Args:
        attention (`torch.Tensor` of shape `(layers, tokens)`):
            Attention to the image tokens, or to the video tokens.
        grid_thw (`torch.Tensor` of shape `(images, 3)`, *optional*):
            For each image, the numbers of frames (or of groups of frames that share their patches), of patch rows and
            of patch columns.
        model_type (`str`):
            The model type to name in errors.

    Returns:
        `list[torch.Tensor]`: For each image, the attention of shape `(layers, frames, rows, columns)`.

    Raises:
        `ValueError`: If there is no grid, or the tokens do not fill it.
    """
    if grid_thw is None:
        raise unknown_grid(model_type, "its processor does not report their grid (no `image_grid_thw`)")
    num_tokens = attention.shape[1]
    num_patches = int(grid_thw.prod(dim=1).sum())
    merge_size = math.isqrt(num_patches // num_tokens)
    if merge_size**2 * num_tokens != num_patches or (grid_thw[:, 1:] % merge_size).any():
        problem = f"there are {num_tokens} of them for the {num_patches} patches of the grids {grid_thw.tolist()}"
        raise unknown_grid(model_type, problem)
    shapes = [(frames, rows // merge_size, columns // merge_size) for frames, rows, columns in grid_thw.tolist()]
    parts = attention.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]


def unknown_grid(model_type: str, problem: str) -> ValueError:
    return ValueError(
        f"The visual tokens of a model of type {model_type!r} cannot be mapped onto its images: {problem}. Heat maps "
        "need tokens that are squares of merged patches, as in the Qwen-VL and GLM-V families."
    )


def video_frames(
    pixel_values: torch.Tensor, grid_thw: torch.Tensor, processing_class: ProcessorMixin
) -> list[list[Image.Image]]:
    """
    The first of each group of frames that share their patches, reassembled from the patches, because the processor
    does not report which frames it sampled.

    Args:
        pixel_values (`torch.Tensor` of shape `(patches, channels * frames * height * width)`):
            The videos' normalized patches, `pixel_values_videos`.
        grid_thw (`torch.Tensor` of shape `(videos, 3)`):
            For each video, the numbers of frame groups, of patch rows and of patch columns.
        processing_class ([`~transformers.ProcessorMixin`]):
            The processor that made the patches.

    Returns:
        `list[list[PIL.Image.Image]]`: The frames of each video.
    """
    options = processing_class.video_processor
    merge, patch = options.merge_size, options.patch_size
    videos = []
    for patches, (times, rows, columns) in zip(
        pixel_values.float().cpu().split(grid_thw.prod(dim=1).tolist()), grid_thw.tolist(), strict=True
    ):
        # The patches of one token are adjacent; take the first frame of each
        patches = patches.view(
            times, rows // merge, columns // merge, merge, merge, -1, options.temporal_patch_size, patch, patch
        )[:, :, :, :, :, :, 0]
        pixels = patches.permute(0, 1, 3, 6, 2, 4, 7, 5).reshape(times, rows * patch, columns * patch, -1)
        pixels = pixels * torch.tensor(options.image_std) + torch.tensor(options.image_mean)
        pixels = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
        videos.append([Image.fromarray(frame) for frame in pixels.numpy()])
    return videos
