"""Requirements on a model family, and lookups of parts that families name differently."""

import re
from inspect import signature

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .positions import visual_token_ids


def refuse_unsupported_family(model: PreTrainedModel) -> None:
    """
    Refuse a model whose decoder layers do not process the image's hidden states, or cannot receive positions.

    Raises:
        `ValueError`: If the model has no visual tokens, keeps the image outside the decoder, or does not pass keyword
            arguments on to its decoder layers.
    """
    family = type(model).__name__
    if not visual_token_ids(model.config):
        raise ValueError(
            f"Cue recovery needs a model with visual tokens, but the config of {family} has neither `image_token_id` "
            "nor `video_token_id`. Use a vision-language model."
        )
    if model.config.is_encoder_decoder or "cross_attention_layers" in model.config.get_text_config().to_dict():
        raise ValueError(
            f"Cue recovery reads the image among the decoder's hidden states, but {family} keeps it outside "
            "(encoder-decoder, or cross-attention to the image). Use a model that has image tokens in its prompt, "
            "such as Qwen3-VL."
        )
    decoder = model.get_decoder()
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not all(
        any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature(module.forward).parameters.values())
        for module in (model.base_model, decoder)
    ):
        raise ValueError(
            f"Cue recovery needs a decoder whose `layers` receive the keyword arguments of the backbone's call, but "
            f"{type(decoder).__name__} of {family} has no such layers. This model family is not supported."
        )


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    layers = model.get_decoder().layers
    assert isinstance(layers, nn.ModuleList)  # see `refuse_unsupported_family`
    return layers


def linear_layers_of_decoder(model: PreTrainedModel) -> str:
    """Regular expression for `target_modules` that matches all linear layers of the text decoder."""
    layers = decoder_layers(model)
    path = next(name for name, module in model.named_modules() if module is layers)
    linear_names = {
        name.rpartition(".")[2]
        for name, module in layers.named_modules()
        if isinstance(module, nn.Linear) and "cue_recovery" not in name
    }
    return rf"{re.escape(path)}\.\d+\..*\.({'|'.join(sorted(linear_names))})"


def norm_eps(text_config: PreTrainedConfig) -> float:
    """Epsilon of the text model's norms, whatever the family calls it."""
    settings = text_config.to_dict()
    return next(settings[name] for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps") if name in settings)
