"""vLLM's Qwen3-VL and Qwen2.5-VL with cue recovery in prefill."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

from ..cue_recovery import CueRecoveryConfig, SinkCrossAttention
from ..cue_recovery.positions import carrying_layers
from .engine_config import MERGE_FIRST
from .sinks import find_sinks


PEFT_PREFIX = "base_model.model."
_MODULE = ".cue_recovery.sink_attention."

# A mixin for either model; type checkers need one of them as its base
_Base = Qwen3VLForConditionalGeneration if TYPE_CHECKING else object


class CueRecoveryMixin(_Base):
    """
    Mixin for vLLM's vision-language models that updates each prompt's sink token in prefill (ViCuR, Eq. 3-5) if their
    config has `cue_recovery`: the name of an adapter, or the options of a new module. Otherwise it changes nothing.

    The recovery modules are at the same decoder layers as in [`CueRecoveryModel`] and are the same
    [`SinkCrossAttention`], replicated on every tensor-parallel rank. The adapter's LoRA is merged while weights are
    loaded; an adapter with `train_base=True` replaces the backbone's weights. A new module changes nothing until
    training sends weights.

    Every prefill with an image checks that all modules ran: vLLM runs none of the model's Python code while it replays
    a CUDA graph, and later releases may call the model differently.

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
            config = CueRecoveryConfig.from_pretrained(self._adapter)
            assert isinstance(config, CueRecoveryConfig)  # see `CueRecoveryEngineConfig`
            self._recovery_config = config
            self.secondary_weights = [DefaultModelLoader.Source(self._adapter, revision=None, fall_back_to_pt=False)]
        else:
            self._recovery_config = CueRecoveryConfig(**self._adapter)
        # Token ids of the step being prepared, and a mask of the visual ones
        self._prefill: tuple[torch.Tensor, torch.Tensor] | None = None
        self.recovery_modules: dict[str, SinkCrossAttention] = {}

        text_config = vllm_config.model_config.hf_config.get_text_config()
        layers = self.language_model.model.layers
        for index in carrying_layers(text_config, self._recovery_config.layer_interval):
            layer = layers[index]
            layer.cue_recovery = nn.Module()
            layer.cue_recovery.sink_attention = SinkCrossAttention(
                text_config.hidden_size,
                self._recovery_config.num_heads or text_config.num_attention_heads,
                text_config.rms_norm_eps,
                self._recovery_config.bottleneck_size,
            )
            name = f"layers.{index}.cue_recovery"
            self.recovery_modules[name] = layer.cue_recovery.sink_attention
            layer.register_forward_pre_hook(partial(_update_sinks_before_layer, name))
        vllm_config.compilation_config.static_forward_context.update(self.recovery_modules)

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        if self._adapter is not None:
            if self._prefill is not None:
                raise RuntimeError(
                    "Cue recovery: vLLM answered a prompt with an image without calling the model's forward, perhaps "
                    "because it replayed a CUDA graph. Start vLLM with `--enforce-eager`."
                )
            if multimodal_embeddings:  # none in a step that only decodes
                assert is_multimodal is not None  # vLLM passes both
                self._prefill = input_ids, is_multimodal
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        if self._adapter is None or self._prefill is None:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        prefill, self._prefill = self._prefill, None
        context = get_forward_context()
        batch = find_sinks(*prefill, positions, context.attn_metadata, self._recovery_config)
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
        Load a checkpoint followed by the adapter; or, during training, updated weights: the backbone's, with LoRA
        merged, and the module's, under the names they have in the adapter.

        Every tensor of the adapter must be used: as a weight of a module, as a LoRA factor that is merged, or as a
        backbone weight that replaces the checkpoint's.

        Returns:
            `set[str]`: Names of the weights that are loaded; vLLM reports all others as missing.

        Raises:
            `ValueError`: If a tensor of the adapter cannot be served as it was trained, or if one is missing.
        """
        if self._adapter is None:
            return super().load_weights(weights)
        read = _ReadWeights(set(), set(), set(), {})
        lora = self._lora_updates()
        loaded = super().load_weights(self._backbone_weights(weights, lora, read))
        if missing := lora.keys() - read.merged:
            raise ValueError(
                f"The cue recovery adapter {self._adapter!r} has LoRA for {sorted(missing)[0]} and "
                f"{len(missing) - 1} other weight(s) that are not among those to be loaded. Serve the model that it "
                "was trained on; an engine that receives weights from training needs an adapter without LoRA."
            )
        if isinstance(self._adapter, str) and self._recovery_config.train_base:
            tied = {"language_model.lm_head.weight"} if self.config.tie_word_embeddings else set()
            if kept := sorted(read.from_base - read.from_adapter - tied):
                raise ValueError(
                    f"The cue recovery adapter {self._adapter!r} has `train_base=True`, but lacks {len(kept)} "
                    f"weight(s) of the backbone, among them {kept[0]!r}. Save or download it again."
                )
        return loaded | self._load_modules(read.of_modules)

    def _backbone_weights(
        self,
        weights: Iterable[tuple[str, torch.Tensor]],
        lora: dict[str, Callable[[], torch.Tensor]],
        read: "_ReadWeights",
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the backbone's weights, LoRA merged, under their names in vLLM; record in `read` what was read."""
        for source_name, source in weights:
            is_adapters = isinstance(self._adapter, str) and source_name.startswith(PEFT_PREFIX)
            if ".lora_" in source_name:
                if is_adapters and self._recovery_config.r == 0:
                    raise self._cannot_serve(source_name, "the adapter's config has `r=0`")
                continue  # `_lora_updates` has read it, or training has merged it
            for name, weight in self.hf_to_vllm_mapper.apply([(_without_peft(source_name), source)]):
                if _MODULE in name:
                    read.of_modules[name] = weight
                    continue
                if is_adapters and name not in read.from_base:
                    raise self._cannot_serve(source_name, "the served checkpoint has no such weight")
                (read.from_adapter if is_adapters else read.from_base).add(name)
                if name in lora:
                    read.merged.add(name)
                    weight = self._merge(name, weight, lora[name]())
                yield name, weight

    def _load_modules(self, weights: dict[str, torch.Tensor]) -> set[str]:
        parameters = {name: parameter for name, parameter in self.named_parameters() if _MODULE in name}
        if isinstance(self._adapter, str) and (odd := sorted(parameters.keys() ^ weights.keys())):
            raise ValueError(
                f"The cue recovery adapter {self._adapter!r} does not match its config "
                f"(`layer_interval={self._recovery_config.layer_interval}`): {len(odd)} weight(s) of its modules are "
                f"missing or unexpected, among them {odd[0]!r}. Save or download it again."
            )
        with torch.no_grad():
            for name, weight in weights.items():
                parameter = parameters[name]
                # vLLM sets `weight_loader` while it replaces the weights of a running engine
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, weight)
        return set(parameters)  # a new module keeps its initial weights until training sends new ones

    def _lora_updates(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Map each weight with LoRA, by its name in vLLM, to a function that computes the update that PEFT adds."""
        config = self._recovery_config
        if config.r == 0:
            return {}
        assert self._adapter is not None  # a new module has no LoRA
        factors = load_peft_weights(self._adapter, device="cpu")
        updates = {}
        for name, a in factors.items():
            is_embedding = name.endswith(".lora_embedding_A")
            if is_embedding or (name.endswith(".lora_A.weight") and a.ndim == 2):
                module = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]
                b = factors[name.replace("_A", "_B") if is_embedding else name.replace(".lora_A.", ".lora_B.")]
                updates[f"{module}.weight"] = partial(_lora_update, a, b, self._scaling(module, len(a)), is_embedding)
            elif ".lora_" in name and not name.endswith((".lora_B.weight", ".lora_embedding_B")):
                raise self._cannot_serve(name, "only LoRA on linear layers and embeddings can be merged")
        return self.hf_to_vllm_mapper.apply_dict(updates)

    def _scaling(self, module: str, rank: int) -> float:
        config = self._recovery_config
        patterns = config.alpha_pattern or {}
        alpha = patterns.get(get_pattern_key(list(patterns), module), config.lora_alpha)
        return alpha / (math.sqrt(rank) if config.use_rslora else rank)

    def _merge(self, name: str, weight: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16) or weight.shape != update.shape:
            raise ValueError(
                f"The cue recovery adapter {self._adapter!r} has a LoRA update of shape {tuple(update.shape)} for "
                f"{name}, which is {tuple(weight.shape)} of {weight.dtype} in the served checkpoint. Serve the model "
                "it was trained on, from an unquantized checkpoint; `--quantization` may quantize it on loading."
            )
        return weight + update.to(weight)

    def _cannot_serve(self, name: str, why: str) -> ValueError:
        return ValueError(
            f"The cue recovery adapter {self._adapter!r} has {name!r}, which vLLM cannot serve as it was trained: "
            f"{why}. {MERGE_FIRST}"
        )


class _ReadWeights(NamedTuple):
    """
    Names in vLLM of the tensors read so far, and the weights of recovery modules.

    Args:
        from_base (`set[str]`), from_adapter (`set[str]`):
            Backbone weights from the checkpoint, and those that the adapter replaces.
        merged (`set[str]`):
            Backbone weights into which LoRA was merged.
        of_modules (`dict[str, torch.Tensor]`):
            Weights of recovery modules.
    """

    from_base: set[str]
    from_adapter: set[str]
    merged: set[str]
    of_modules: dict[str, torch.Tensor]


class CueRecoveryQwen3VLForConditionalGeneration(CueRecoveryMixin, Qwen3VLForConditionalGeneration):
    """Qwen3-VL (dense) with cue recovery."""


class CueRecoveryQwen2_5_VLForConditionalGeneration(CueRecoveryMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL with cue recovery."""


def _lora_update(a: torch.Tensor, b: torch.Tensor, scaling: float, is_embedding: bool) -> torch.Tensor:
    product = b.float() @ a.float()
    return (product.T if is_embedding else product) * scaling


def _without_peft(name: str) -> str:
    name = name.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")
    # Weights sent by training have the adapter's name within their own
    return re.sub(r"(\.sink_attention)\.[^.]+(\.[^.]+\.weight)$", r"\1\2", name)


def _update_sinks_before_layer(name: str, layer: nn.Module, args: tuple) -> None:
    _, hidden_states, residual = args
    update_sinks(hidden_states, residual, name)


@torch.library.custom_op("trl_vicur::update_sinks", mutates_args=("hidden_states",))
def update_sinks(hidden_states: torch.Tensor, residual: torch.Tensor, name: str) -> None:
    """
    Add the module's update to the sinks of this step's prompts; does nothing in steps that only decode.

    This is a custom operator, so that `torch.compile` does not trace it: its work depends on the step.

    Args:
        hidden_states (`torch.Tensor` of shape `(tokens, hidden)`):
            Input of the decoder layer; changed in place.
        residual (`torch.Tensor` of shape `(tokens, hidden)`):
            Residual stream, which vLLM keeps separate and adds later.
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
