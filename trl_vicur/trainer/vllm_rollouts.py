"""Rollouts with TRL's vLLM: its engine gets the module, and nothing of earlier weights remains in it."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from peft import PeftModel
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from ..cue_recovery import CueRecoveryConfig
from ..cue_recovery.positions import visual_token_ids


@contextmanager
def engine_with_module(get_model: Callable[[], PeftModel]) -> Iterator[None]:
    """
    While active, the engine that TRL starts has a recovery module like the model's.

    TRL names a model to vLLM and has no way to name a module beside it. The module's weights come with each
    synchronization, as do those of LoRA, merged.

    Args:
        get_model (`Callable[[], PeftModel]`):
            Gives the model, which may be made while this is active.
    """
    make_llm = vllm_generation.LLM

    def make_llm_with_module(*args: Any, **kwargs: Any) -> Any:
        model = get_model()
        module = model.peft_config[model.active_adapter].module_options()
        return make_llm(*args, hf_overrides={"cue_recovery": module}, **kwargs)

    vllm_generation.LLM = make_llm_with_module
    try:
        yield
    finally:
        vllm_generation.LLM = make_llm


class StudentGeneration:
    """
    TRL's generation with vLLM, and what rollouts of a student that sees need besides: vLLM reads the very prompts that
    are trained on, no image token is sampled, image features of earlier weights are forgotten with these weights, and
    the sampled tokens' log-probabilities are kept.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's generation.
        recovery_config ([`CueRecoveryConfig`], *optional*):
            That of the student, if it has a module.

    Raises:
        `ValueError`: If the server rolls out without the student's module, or with another one, or if it does not tell
            the probabilities that it samples with.
    """

    def __init__(self, generation: VLLMGeneration, recovery_config: CueRecoveryConfig | None = None):
        self._generation = generation
        if generation.mode == "server" and generation.accelerator.is_main_process:
            _check_server(generation.vllm_client, recovery_config)
        generation.logprobs = 0  # that of the sampled token alone
        # A sampled image token would mismatch the image features; TRL suppresses it in transformers' rollouts only
        bias = dict.fromkeys(visual_token_ids(generation.model.config), -100.0)
        generation.generation_kwargs = {"logit_bias": bias} | generation.generation_kwargs
        self.sampled_logprobs: list[list[float]] = []
        """Of the last call: per completion those of its tokens, as vLLM sampled them; NaN where it does not know."""

    def sync_weights(self) -> None:
        self._generation.sync_weights()
        # TRL resets the prefix cache only; a vision tower that trains would go on seeing as before
        if self.mode == "colocate":
            self.llm.llm_engine.reset_encoder_cache()
        elif self.accelerator.is_main_process:
            client = self.vllm_client
            client.session.post(f"{client.base_url}/reset_encoder_cache").raise_for_status()

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


def _check_server(client: VLLMClient, config: CueRecoveryConfig | None) -> None:
    model_config = client.get_server_info()["model_config"]
    mode = model_config["logprobs_mode"]
    if mode != "processed_logprobs":
        raise ValueError(
            f"The vLLM server at {client.base_url} tells {mode!r}, which are not of what it samples. Start it with "
            "`--logprobs-mode processed_logprobs`."
        )
    student = None if config is None else config.module_options()
    served = model_config["hf_overrides"].get("cue_recovery")
    if served != student:
        options = {} if config is None else {name: value for name, value in student.items() if value is not None}
        mend = f"with `--hf-overrides '{json.dumps({'cue_recovery': options})}'`" if options else "without"
        raise ValueError(
            f"The vLLM server at {client.base_url} has the recovery module {served!r}, but the student's is "
            f"{student!r}. Start it {mend}; weights come from training."
        )
