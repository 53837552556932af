"""Rollouts with vLLM through TRL: adds the recovery module to the engine, and clears caches after weights change."""

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
    While active, a vLLM engine that TRL starts gets a recovery module with the model's options.

    TRL's `VLLMGeneration` passes the engine the name of a model and has no option for engine arguments such as
    `hf_overrides`. Remove this function once it has one. Each weight synchronization sends the module's weights, and
    the base weights with LoRA merged.

    Args:
        get_model (`Callable[[], PeftModel]`):
            Returns the student. It is called when the engine starts.
    """
    make_llm = vllm_generation.LLM  # pyright: ignore[reportPrivateImportUsage]

    def make_llm_with_module(*args: Any, **kwargs: Any) -> Any:
        config = get_model().active_peft_config
        assert isinstance(config, CueRecoveryConfig)  # else the caller needs no module in the engine
        return make_llm(*args, hf_overrides={"cue_recovery": config.module_options()}, **kwargs)

    vllm_generation.LLM = make_llm_with_module  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    finally:
        vllm_generation.LLM = make_llm  # pyright: ignore[reportPrivateImportUsage]


class StudentGeneration:
    """
    TRL's generation with vLLM, extended for a vision-language student: vLLM reads exactly the prompts that are trained
    on, samples no image tokens, and drops image features of earlier weights. The log-probabilities of the sampled
    tokens are kept.

    Args:
        generation ([`~trl.generation.vllm_generation.VLLMGeneration`]):
            TRL's generation.
        recovery_config ([`CueRecoveryConfig`], *optional*):
            Config of the student's recovery module, if it has one.

    Raises:
        `ValueError`: If the server rolls out without the student's module or with another one, or if it does not
            report the log-probabilities that it samples with.
    """

    def __init__(self, generation: VLLMGeneration, recovery_config: CueRecoveryConfig | None = None):
        self._generation = generation
        if generation.mode == "server" and generation.accelerator.is_main_process:
            _check_server(generation.vllm_client, recovery_config)
        generation.logprobs = 0  # of the sampled token only
        # TRL#3847: the model would expect image features for a sampled image token. TRL suppresses these tokens only
        # in rollouts with transformers
        bias = dict.fromkeys(visual_token_ids(generation.model.config), -100.0)
        generation.generation_kwargs = {"logit_bias": bias} | generation.generation_kwargs
        self.sampled_logprobs: list[list[float]] = []
        """Log-probabilities of the last call's tokens, by completion, as vLLM sampled them; NaN where not reported."""

    def sync_weights(self) -> None:
        self._generation.sync_weights()
        # TRL#7198: TRL resets the prefix cache only, so images would keep the features of the vision tower's earlier
        # weights. Remove once a release of TRL with TRL#7200 is required
        if self.mode == "colocate":
            self.llm.llm_engine.reset_encoder_cache()
        elif self.accelerator.is_main_process:
            client = self.vllm_client
            client.session.post(f"{client.base_url}/reset_encoder_cache").raise_for_status()

    def generate(self, prompts: list[list[int]], images: list[list | None] | None, **kwargs: Any) -> tuple:
        """
        Generate as TRL's `VLLMGeneration.generate` does.

        Raises:
            `RuntimeError`: If vLLM expands an image to other tokens than the trainer's processor.
        """
        unexpanded = prompts
        if self.mode == "colocate" and images is not None:
            # TRL#6294: vLLM replaces an image's first token by all of the image's tokens and would keep the others.
            # Remove once TRL's `DistillationTrainer` passes unexpanded prompts (TRL#6718 does for GRPO and RLOO)
            image_token_id = self.model.config.image_token_id
            unexpanded = [
                ids[:1] + [token for before, token in pairwise(ids) if not before == token == image_token_id]
                for ids in prompts
            ]
        output = self._generation.generate(unexpanded, images, **kwargs)
        for ids, read_ids in zip(prompts, output[0], strict=True):
            if ids != read_ids:
                raise RuntimeError(
                    f"vLLM turned a prompt into {len(read_ids)} tokens, but the trainer's processor into {len(ids)}. "
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
            f"The vLLM server at {client.base_url} reports {mode!r}, which are not the log-probabilities that it "
            "samples with. Start it with `--logprobs-mode processed_logprobs`."
        )
    student = None if config is None else config.module_options()
    served = model_config["hf_overrides"].get("cue_recovery")
    if served != student:
        options = {name: value for name, value in (student or {}).items() if value is not None}
        fix = f"with `--hf-overrides '{json.dumps({'cue_recovery': options})}'`" if options else "without"
        raise ValueError(
            f"The vLLM server at {client.base_url} has the recovery module {served!r}, but the student's is "
            f"{student!r}. Start it {fix}; the weights come from training."
        )
