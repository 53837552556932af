"""Tiny models with recovery modules, a batch of prompts for them, and their logits."""

import torch
from peft import get_peft_model
from tiny_models import encode, make_image, user

from trl_vicur import CueRecoveryConfig
from trl_vicur.cue_recovery import CueRecoveryLayer


# Without a system prompt, the last one ends the user's turn, so it has seen the question
SINKS = ["first", "<|im_start|>", "<|im_end|>"]


def attach(model, processor, sink_token="first", layer_interval=1, **config):
    config = CueRecoveryConfig(sink_token=sink_token, layer_interval=layer_interval, **config)
    return get_peft_model(model, config.resolve_sink_token(processor)).eval()


def conversations():
    """Prompts of different lengths: one image, two images, none."""
    return [
        user("What is this?", make_image(0)),
        user("Which of the two is larger, and why?", make_image(1), make_image(2, (32, 64))),
        user("Hello."),
    ]


def batch(processor):
    return encode(processor, conversations())


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def recovery_layers(model):
    return [module for module in model.modules() if isinstance(module, CueRecoveryLayer)]
