"""Rollouts with TRL's vLLM: its engine gets the module, and nothing of earlier weights remains in it."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import pairwise
from tempfile import TemporaryDirectory
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration

from ..cue_recovery import CueRecoveryConfig
from ..cue_recovery.model import visual_token_ids


@contextmanager
def engine_with_module(get_model: Callable[[], PeftModel]) -> Iterator[None]:
    """
    While active, the engine that TRL starts has the model's recovery module.

    TRL names a model to vLLM and has no way to name an adapter beside it. LoRA comes with the first synchronization of
    the weights, merged, as it does for every PEFT model; and so do all later states of the module.

    Args:
        get_model (`Callable[[], PeftModel]`):
            Gives the model, which may be made while this is active.
    """
    make_llm = vllm_generation.LLM
    with TemporaryDirectory() as adapter:

        def make_llm_with_module(*args: Any, **kwargs: Any) -> Any:
            _save_module(get_model(), adapter)
            return make_llm(*args, hf_overrides={"cue_recovery": adapter}, **kwargs)

        vllm_generation.LLM = make_llm_with_module
        try:
            yield
        finally:
            vllm_generation.LLM = make_llm


def _save_module(model: PeftModel, directory: str) -> None:
    config = model.peft_config[model.active_adapter]
    lora_options = {field.name for field in fields(LoraConfig)}
    own = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in lora_options}
    CueRecoveryConfig(**own).save_pretrained(directory)
    weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter)
    weights = {name: weight for name, weight in weights.items() if ".sink_attention." in name}
    save_file(weights, os.path.join(directory, SAFETENSORS_WEIGHTS_NAME))


class StudentGeneration:
    """
    TRL's generation with vLLM, and what rollouts of a student that sees need besides: vLLM reads the very prompts that
    are trained on, no image token is sampled, image features of earlier weights are forgotten with these weights, and
    the sampled tokens' log-probabilities are kept.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's generation.
    """

    def __init__(self, generation: VLLMGeneration):
        self._generation = generation
        generation.logprobs = 0  # that of the sampled token alone
        # A sampled image token would mismatch the image features; TRL suppresses it in transformers' rollouts only
        bias = dict.fromkeys(visual_token_ids(generation.model.config), -100.0)
        generation.generation_kwargs = {"logit_bias": bias} | generation.generation_kwargs
        self.sampled_logprobs: list[list[float]] = []
        """Of the last call: per completion those of its tokens, as vLLM sampled them; NaN where it does not know."""

    def sync_weights(self) -> None:
        self._generation.sync_weights()
        if self.mode == "colocate":
            # TRL resets the prefix cache only; a vision tower that trains would go on seeing as before
            self.llm.llm_engine.reset_encoder_cache()

    def generate(self, prompts: list[list[int]], images: list[list | None] | None, **kwargs: Any) -> tuple:
        """
        As TRL's.

        Raises:
            `RuntimeError`: If vLLM makes other tokens of an image than the trainer's processor does.
        """
        unexpanded = prompts
        if self.mode == "colocate" and images is not None:
            # vLLM puts all of an image's tokens in the place of the first that it finds, and would leave the others
            image_token_id = self.model.config.image_token_id
            unexpanded = [
                [token for before, token in pairwise([None, *ids]) if not before == token == image_token_id]
                for ids in prompts
            ]
        output = self._generation.generate(unexpanded, images, **kwargs)
        for ids, read_ids in zip(prompts, output[0], strict=True):
            if ids != read_ids:
                raise RuntimeError(
                    f"vLLM read {len(read_ids)} tokens where the trainer's processor makes {len(ids)} of a prompt. "
                    f"vLLM loads the processor of {self.model.name_or_path!r}: save the one that you train with there "
                    "(its image sizes matter most), or set `use_vllm=False`."
                )
        self.sampled_logprobs = [
            [math.nan if token[0] is None else token[0] for token in completion] for completion in output[2]
        ]
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)
