"""Qwen3-VL and Qwen2.5-VL of vLLM with cue recovery in prefill."""

import math
import re
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from peft.utils import load_peft_weights
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from ..cue_recovery import CueRecoveryConfig, SinkCrossAttention
from ..cue_recovery.model import carrying_layers
from .sinks import find_sinks


_MODULE = ".cue_recovery.sink_attention."


class CueRecoveryMixin:
    """
    A vision-language model of vLLM that updates each prompt's sink token in prefill (ViCuR, Eq. 3-5), in a model whose
    config names an adapter as `cue_recovery`, or has the options of a new module there; every other model stays as it
    is.

    Recovery modules stand at the same decoder layers as in [`CueRecoveryModel`] and are the same
    [`SinkCrossAttention`], whole on every tensor-parallel rank. LoRA of the adapter is merged while weights are
    loaded; an adapter with `train_base=True` replaces the backbone's weights. A new module changes nothing, until
    training sends weights.

    Every prefill with an image checks that all modules ran in it: vLLM runs no Python of a model while it replays a
    CUDA graph, and a later release may call the model in another way.

    Raises:
        `ValueError`: If the engine would prefill a prompt in pieces, or replay prefill as a CUDA graph.
        `RuntimeError`: If a module did not run in a prefill with an image.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model"):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._adapter = getattr(vllm_config.model_config.hf_config, "cue_recovery", None)
        if self._adapter is None:
            return
        if (
            vllm_config.scheduler_config.enable_chunked_prefill
            or vllm_config.cache_config.enable_prefix_caching
            or vllm_config.compilation_config.cudagraph_mode.mixed_mode() != CUDAGraphMode.NONE
        ):
            raise ValueError(
                "Cue recovery needs prompts that are prefilled whole and outside of CUDA graphs. Start vLLM with "
                "`--no-enable-prefix-caching --no-enable-chunked-prefill -cc.cudagraph_mode=FULL_DECODE_ONLY`."
            )
        if isinstance(self._adapter, str):
            self.recovery_config = CueRecoveryConfig.from_pretrained(self._adapter)
            self.secondary_weights = [DefaultModelLoader.Source(self._adapter, revision=None, fall_back_to_pt=False)]
        else:
            self.recovery_config = CueRecoveryConfig(**self._adapter)
        # Of the step that is being prepared: token ids, and which of them are visual
        self._prefill: tuple[torch.Tensor, torch.Tensor] | None = None
        self.recovery_modules: dict[str, SinkCrossAttention] = {}

        text_config = vllm_config.model_config.hf_config.get_text_config()
        layers = self.language_model.model.layers
        for index in carrying_layers(text_config, self.recovery_config.layer_interval):
            layer = layers[index]
            layer.cue_recovery = nn.Module()
            layer.cue_recovery.sink_attention = SinkCrossAttention(
                text_config.hidden_size,
                self.recovery_config.num_heads or text_config.num_attention_heads,
                text_config.rms_norm_eps,
                self.recovery_config.bottleneck_size,
            )
            name = f"layers.{index}.cue_recovery"
            self.recovery_modules[name] = layer.cue_recovery.sink_attention
            layer.register_forward_pre_hook(partial(_update_sinks_before_layer, name))
        vllm_config.compilation_config.static_forward_context.update(self.recovery_modules)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        if self._adapter is not None:
            if self._prefill is not None:
                raise RuntimeError(
                    "Cue recovery: vLLM answered a prompt with an image without a call of the model's forward, as in "
                    "the replay of a CUDA graph. Start it with `--enforce-eager`."
                )
            # Empty in a step that only decodes
            self._prefill = (input_ids, is_multimodal) if multimodal_embeddings else None
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        if self._adapter is None or self._prefill is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        prefill, self._prefill = self._prefill, None
        context = get_forward_context()
        batch = find_sinks(*prefill, positions, context.attn_metadata, self.recovery_config)
        context.additional_kwargs["cue_recovery"] = batch
        output = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        if batch is not None and (silent := sorted(self.recovery_modules.keys() - batch.updated_by)):
            raise RuntimeError(
                f"Cue recovery: {len(silent)} of {len(self.recovery_modules)} modules did not run in a prefill with "
                f"an image, among them {silent[0]!r}. Start vLLM with `--enforce-eager`."
            )
        return output

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """
        Load a checkpoint and the adapter behind it, or some weights that training has changed (merged, and the
        module's under their names in the adapter).

        Returns:
            `set[str]`: Names of the weights that need no other value; vLLM misses what is not among them.

        Raises:
            `ValueError`: If the adapter's LoRA belongs to weights that are not among them.
        """
        if self._adapter is None:
            return super().load_weights(weights)
        lora = self._lora_updates()
        merged, module_weights = set(), {}

        def backbone_weights() -> Iterator[tuple[str, torch.Tensor]]:
            names = ((_without_peft(name), weight) for name, weight in weights)
            for name, weight in self.hf_to_vllm_mapper.apply(names):
                if _MODULE in name:
                    module_weights[name] = weight
                elif ".lora_" not in name:
                    if name in lora:
                        merged.add(name)
                        weight = weight + lora[name]().to(weight)
                    yield name, weight

        loaded = super().load_weights(backbone_weights())
        if missing := lora.keys() - merged:
            raise ValueError(
                f"The cue recovery adapter {self._adapter!r} has LoRA for {sorted(missing)[0]} and "
                f"{len(missing) - 1} other weight(s) that are not among those to be loaded. Serve the model that it "
                "was trained on; an engine that takes weights from training needs an adapter without LoRA."
            )
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, weight in module_weights.items():
                parameter = parameters[name]
                # While weights are exchanged in a running engine, vLLM puts loaders of its own there
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
        if not isinstance(self._adapter, str):  # a new module is complete as it is
            return loaded | {name for name in parameters if _MODULE in name}
        return loaded | module_weights.keys()

    def _lora_updates(self) -> dict:
        """For each weight with LoRA, by its name in vLLM, what computes the update."""
        config = self.recovery_config
        if config.r == 0:
            return {}
        scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        factors = load_peft_weights(self._adapter, device="cpu")

        def update(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            product = b.float() @ a.float()
            return (product.T if config.fan_in_fan_out else product) * scaling

        updates = {
            _without_peft(name).replace(".lora_A.", "."): partial(
                update, a, factors[name.replace(".lora_A.", ".lora_B.")]
            )
            for name, a in factors.items()
            if ".lora_A." in name
        }
        return self.hf_to_vllm_mapper.apply_dict(updates)


class CueRecoveryQwen3VLForConditionalGeneration(CueRecoveryMixin, Qwen3VLForConditionalGeneration):
    """Qwen3-VL (dense) with cue recovery."""


class CueRecoveryQwen2_5_VLForConditionalGeneration(CueRecoveryMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with cue recovery."""


def _without_peft(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    # In training, the adapter's name stands in those of its weights
    return re.sub(r"(\.sink_attention)\.[^.]+(\.[^.]+\.weight)$", r"\1\2", name)


def _update_sinks_before_layer(name: str, layer: nn.Module, args: tuple) -> None:
    _, hidden_states, residual = args
    update_sinks(hidden_states, residual, name)


@torch.library.custom_op("trl_vicur::update_sinks", mutates_args=("hidden_states",))
def update_sinks(hidden_states: torch.Tensor, residual: torch.Tensor, name: str) -> None:
    """
    Add the module's update to the sinks of this step's prompts; does nothing in steps that only decode.

    An operator, because a compiled model must not look inside: what it does differs from step to step.

    Args:
        hidden_states (`torch.Tensor` of shape `(tokens, hidden)`):
            What the decoder layer gets; changed in place.
        residual (`torch.Tensor` of shape `(tokens, hidden)`):
            What vLLM adds to it.
        name (`str`):
            Name of the module in the forward context.
    """
    context = get_forward_context()
    batch = context.additional_kwargs.get("cue_recovery")
    if batch is None:
        return
    sinks = hidden_states[batch.sinks] + residual[batch.sinks]
    visual = hidden_states[batch.visual] + residual[batch.visual]
    update = context.no_compile_layers[name](sinks, visual, batch.visual_mask)
    hidden_states[batch.sinks] += update.to(hidden_states.dtype)
    batch.updated_by.add(name)


@update_sinks.register_fake
def _(hidden_states: torch.Tensor, residual: torch.Tensor, name: str) -> None:
    pass
