"""Processes a batch's images and videos once for the rollout, the loss and the teacher's prompt."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np
import torch
from transformers import BaseImageProcessor, BaseVideoProcessor, BatchFeature


@contextmanager
def images_processed_once(image_processor: BaseImageProcessor | BaseVideoProcessor) -> Iterator[None]:
    """
    While active, the image processor returns its earlier output for the same images and arguments.

    Args:
        image_processor ([`~transformers.BaseImageProcessor`] or [`~transformers.BaseVideoProcessor`]):
            The processor's `image_processor`, or its `video_processor`.
    """
    processor: Any = image_processor  # an instance attribute hides the method, which annotations do not allow
    preprocess = processor.preprocess
    calls = []

    @wraps(preprocess)
    def preprocess_once(images: Any, return_tensors: str | None = None, **kwargs: Any) -> BatchFeature:
        for earlier_images, earlier_tensors, earlier_kwargs, output in calls:
            # If all outputs are tensors, `return_tensors="pt"` makes no difference
            is_same_type = return_tensors == earlier_tensors or (
                {return_tensors, earlier_tensors} == {None, "pt"}
                and all(isinstance(value, torch.Tensor) for value in output.values())
            )
            if is_same_type and kwargs == earlier_kwargs and _are_same(images, earlier_images):
                break
        else:
            output = preprocess(images, return_tensors=return_tensors, **kwargs)
            calls.append((images, return_tensors, kwargs, output))
        return BatchFeature({**output})  # a copy, because processors remove entries

    processor.preprocess = preprocess_once
    try:
        yield
    finally:
        del processor.preprocess


def _are_same(images: Any, others: Any) -> bool:
    """Whether two inputs are equal: images, arrays of frames, or nested lists of either."""
    if isinstance(images, np.ndarray) or isinstance(others, np.ndarray):
        return np.array_equal(images, others)
    if isinstance(images, list) and isinstance(others, list):
        return len(images) == len(others) and all(map(_are_same, images, others))
    return bool(images == others)
