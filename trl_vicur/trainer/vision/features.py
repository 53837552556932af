"""
Features of the vision tower, computed once for a sample and reused by every pass over the same pixels.

Forward calls and `generate` get features from the backbone's `get_image_features` and `get_video_features`. These
methods are replaced while features are recorded or lent.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from itertools import chain
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput


def get_backbone(model: nn.Module) -> PreTrainedModel:
    """The part of a transformers model, or of a PEFT model around one, that turns tokens and pixels into states."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(base, PreTrainedModel)
    backbone = base.base_model
    assert isinstance(backbone, PreTrainedModel)
    return backbone


def is_vision_frozen(model: nn.Module) -> bool:
    """Whether nothing before the decoder (vision tower, merger) trains or belongs to an adapter."""
    backbone = get_backbone(model)
    in_decoder = set(backbone.get_decoder().modules())
    outside = [module for module in backbone.modules() if module not in in_decoder]
    return not any(
        isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        or any(p.requires_grad for p in module.parameters(recurse=False))
        for module in outside
    )


@contextmanager
def record_features(model: nn.Module) -> Iterator[dict[str, list[ModelOutput]]]:
    """
    While active, record the output of the vision tower, which runs without gradient.

    Args:
        model (`nn.Module`):
            The vision-language model.

    Yields:
        `dict[str, list[ModelOutput]]`: Filled with the features of each call for an `"image"` or a `"video"`, as the
            model's `get_image_features` and `get_video_features` return them.
    """
    outputs = {"image": [], "video": []}

    def record(kind: str, encode: Callable[..., ModelOutput], *args, **kwargs) -> ModelOutput:
        with torch.no_grad():
            output = encode(*args, **kwargs)
        if kind == "video" and outputs["image"] and outputs["image"][-1] is output:
            outputs["image"].pop()  # Qwen3-VL's `get_video_features` calls `get_image_features`
        outputs[kind].append(output)
        return output

    with _features_by(record, model):
        yield outputs


def lend_features(model: nn.Module, samples: dict[str, list[dict]]) -> AbstractContextManager[None]:
    """
    While active, the model gets these features instead of encoding its pixels.

    Args:
        model (`nn.Module`):
            The vision-language model.
        samples (`dict[str, list[dict]]`):
            For `"image"` and `"video"`, the features of each sample of the batch, from [`split_by_sample`].
    """
    joined = {kind: _join_samples(of_kind) for kind, of_kind in samples.items()}
    return _features_by(lambda kind, encode, *args, **kwargs: joined[kind], model)


def _join_samples(samples: list[dict]) -> ModelOutput:
    """Inverse of [`split_by_sample`]."""
    features: dict[str, Any] = {"pooler_output": _join([sample["pooler_output"] for sample in samples])}
    if "deepstack_features" in samples[0]:
        levels = zip(*(sample["deepstack_features"] for sample in samples), strict=True)
        features["deepstack_features"] = [_join(level) for level in levels]
    return ModelOutput(**features)


def split_by_sample(output: ModelOutput, num_tokens: list[int]) -> list[dict] | None:
    """
    Cut a batch's features into those of each sample, so that they can be shuffled and split with the batch.

    Models return features by image (Qwen-VL), by sample (Idefics), by tile (InternVL), or as one tensor (Gemma 3), but
    always one feature per visual token, in the order of the prompts. So we split them by the number of tokens.

    Args:
        output (`ModelOutput`):
            Return value of the model's `get_image_features` or `get_video_features`.
        num_tokens (`list[int]`):
            Number of image tokens, or of video tokens, in each sample.

    Returns:
        `list[dict]` or `None`: For each sample, the features that a forward call reads; `None` if the model does not
            return one feature per visual token. The types are plain, so that a checkpoint can hold them.
    """
    levels = output.get("deepstack_features")
    parts = [_cut(value, num_tokens) for value in (output.get("pooler_output"), *(levels or []))]
    if None in parts:
        return None
    samples = []
    for pooler_output, *deepstack_features in zip(*parts, strict=True):
        features = {"pooler_output": pooler_output}
        if levels is not None:
            features["deepstack_features"] = deepstack_features
        samples.append(features)
    return samples


def _cut(features: torch.Tensor | Sequence[torch.Tensor] | None, num_tokens: list[int]) -> list | None:
    """Features of each sample, `(tokens, hidden)`, in a tuple if the model returned a sequence of tensors."""
    if features is None:
        return None
    is_tensor = isinstance(features, torch.Tensor)
    flat = torch.cat([part.flatten(0, -2) for part in ([features] if is_tensor else features)])
    if len(flat) != sum(num_tokens):
        return None
    parts = flat.split(num_tokens)
    return list(parts) if is_tensor else [(part,) for part in parts]


def _join(parts: Sequence) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Inverse of [`_cut`]."""
    return torch.cat(list(parts)) if isinstance(parts[0], torch.Tensor) else tuple(chain.from_iterable(parts))


@contextmanager
def _features_by(function: Callable[..., ModelOutput], model: nn.Module) -> Iterator[None]:
    """
    While active, `function` replaces the backbone's `get_image_features` and `get_video_features`. Its first arguments
    are the kind, `"image"` or `"video"`, and the replaced method.
    """
    backbone = get_backbone(model)
    methods = {kind: f"get_{kind}_features" for kind in ("image", "video")}
    methods = {kind: name for kind, name in methods.items() if hasattr(backbone, name)}
    for kind, name in methods.items():
        encode = getattr(backbone, name)
        # `generate` reads the signature, so keep it with `wraps`
        setattr(backbone, name, wraps(encode)(partial(function, kind, encode)))
    try:
        yield
    finally:
        for name in methods.values():
            delattr(backbone, name)
