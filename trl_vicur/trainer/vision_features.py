"""
Features of the vision tower, computed once for a sample and lent to every pass that sees the same pixels.

A pass asks its backbone's `get_image_features`, be it a forward call or `generate`; while features are recorded or
lent, that method is another one.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from itertools import accumulate, chain, pairwise

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.utils import ModelOutput


def get_backbone(model: nn.Module) -> nn.Module:
    """The part of a transformers model, or of a PEFT model around one, that turns tokens and pixels into states."""
    return (model.base_model.model if is_peft_model(model) else model).base_model


def is_vision_frozen(model: nn.Module) -> bool:
    """Whether nothing in front of the decoder (vision tower, merger) trains or belongs to an adapter."""
    backbone = get_backbone(model)
    in_decoder = set(backbone.get_decoder().modules())
    outside = [module for module in backbone.modules() if module not in in_decoder]
    return not any(
        isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        or any(p.requires_grad for p in module.parameters(recurse=False))
        for module in outside
    )


@contextmanager
def record_image_features(
    model: nn.Module, autocast: Callable[[], AbstractContextManager]
) -> Iterator[list[ModelOutput]]:
    """
    While active, note what the vision tower computes. It computes it without gradient.

    Args:
        model (`nn.Module`):
            The vision-language model.
        autocast (`Callable`):
            Makes the context of mixed precision: `generate` encodes images outside of the forward call, which has it.

    Yields:
        `list[ModelOutput]`: Filled with the features of each call, as the model's `get_image_features` returns them.
    """
    outputs = []

    def record(encode: Callable[..., ModelOutput], *args, **kwargs) -> ModelOutput:
        with torch.no_grad(), autocast():
            outputs.append(encode(*args, **kwargs))
        return outputs[-1]

    with _image_features_by(record, model):
        yield outputs


def lend_image_features(model: nn.Module, samples: list[ModelOutput]) -> AbstractContextManager[None]:
    """
    While active, the model gets these features in place of those of the pixels that it is given.

    Args:
        model (`nn.Module`):
            The vision-language model.
        samples (`list[ModelOutput]`):
            The features of each sample of the batch, from [`split_by_sample`].
    """
    features = {"pooler_output": tuple(chain.from_iterable(sample.pooler_output for sample in samples))}
    if "deepstack_features" in samples[0]:
        levels = zip(*(sample.deepstack_features for sample in samples), strict=True)
        features["deepstack_features"] = [tuple(chain.from_iterable(level)) for level in levels]
    joined = type(samples[0])(**features)
    return _image_features_by(lambda encode, *args, **kwargs: joined, model)


def split_by_sample(output: ModelOutput, num_images: list[int]) -> list[ModelOutput] | None:
    """
    Cut a batch's image features into those of each sample, so that they can be shuffled and split with the batch.

    Args:
        output (`ModelOutput`):
            What the model's `get_image_features` returned.
        num_images (`list[int]`):
            Number of images of each sample.

    Returns:
        `list[ModelOutput]` or `None`: The features that a forward call reads, for each sample; `None` for a model that
            does not return one tensor per image.
    """

    def is_by_image(value) -> bool:
        return isinstance(value, tuple | list) and len(value) == sum(num_images)

    levels = output.get("deepstack_features")
    if not is_by_image(output.get("pooler_output")) or not all(map(is_by_image, levels or [])):
        return None
    samples = []
    for start, end in pairwise([0, *accumulate(num_images)]):
        features = {"pooler_output": tuple(output.pooler_output[start:end])}
        if levels is not None:
            features["deepstack_features"] = [tuple(level[start:end]) for level in levels]
        samples.append(type(output)(**features))
    return samples


@contextmanager
def _image_features_by(function: Callable[..., ModelOutput], model: nn.Module) -> Iterator[None]:
    """While active, `function` answers for the backbone's `get_image_features`, which is its first argument."""
    backbone = get_backbone(model)
    encode = backbone.get_image_features

    @wraps(encode)  # `generate` reads the signature
    def get_image_features(*args, **kwargs) -> ModelOutput:
        return function(encode, *args, **kwargs)

    backbone.get_image_features = get_image_features
    try:
        yield
    finally:
        del backbone.get_image_features
