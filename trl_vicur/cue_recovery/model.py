from functools import reduce
from inspect import signature
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from .config import CueRecoveryConfig
from .families import decoder_layers, linear_layers_of_decoder, norm_eps, refuse_unsupported_family
from .layer import CueRecoveryContext, CueRecoveryLayer
from .positions import (
    carrying_layers,
    find_sinks,
    last_reading_layer,
    read_later,
    refuse_packed_rows,
    visual_token_ids,
)
from .saving import SavedCueRecovery, check_weights, refuse_disk_offload


class CueRecoveryModel(SavedCueRecovery):
    """
    Attaches cue recovery (ViCuR, arXiv 2606.05718, Sec. 3.2), and LoRA where `r > 0`, to a vision-language model.

    Each call of the model's backbone finds the sink and the visual tokens once, from `input_ids`, and passes them to
    the decoder layers as a keyword argument of that call; nothing is left on a module.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The vision-language model to be adapted.
        config (`dict[str, CueRecoveryConfig]`):
            The configuration of the adapter by its name, as [`~peft.PeftModel`] passes it.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The name of the adapter.

    Raises:
        `ValueError`: If the decoder's input has no visual tokens; if the model family does not pass keyword arguments
            on to its decoder layers (detected at the first call if the signatures do not show it); if `layer_interval`
            is larger than the number of layers; if the sink token has not been resolved; if the adapter was made for a
            model of a different size; if an adapter with `train_base=True` would share the model with another one or
            train quantized weights; if transformers attaches the adapter without a [`~peft.PeftModel`]; and, when
            weights are loaded, if some are missing, NaN or infinite.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from transformers import AutoModelForImageTextToText
    >>> from trl_vicur import CueRecoveryConfig

    >>> model = AutoModelForImageTextToText.from_pretrained("Qwen/Qwen3-VL-2B-Instruct")
    >>> model = get_peft_model(model, CueRecoveryConfig())
    >>> model.print_trainable_parameters()
    ```
    """

    prefix: str = "cue_recovery_"
    # This method has two kinds of layers: recovery layers and LoRA layers
    tuner_layer_cls = BaseTunerLayer

    def __init__(self, model: PreTrainedModel, config: dict[str, PeftConfig], *args: Any, **kwargs: Any):
        if not isinstance(config, dict):
            # transformers' own adapter loading calls PEFT's `inject_adapter_in_model`, which passes no dict
            raise ValueError(
                "Cue recovery is attached with `peft.get_peft_model` and loaded with "
                "`PeftModel.from_pretrained(base_model, ...)`. `load_adapter`, `add_adapter` and `from_pretrained` of "
                "transformers do not know the names of its weights, and would leave the module at its initial values."
            )
        super().__init__(model, config, *args, **kwargs)
        self._visual_token_ids = visual_token_ids(model.config)
        # The backbone, not the head model: trainers with fused losses call it directly
        self._context_hooks = [
            model.base_model.register_forward_pre_hook(self._add_context, with_kwargs=True),
            model.base_model.register_forward_hook(self._check_context, with_kwargs=True),
        ]
        self.register_load_state_dict_pre_hook(check_weights)

    # --- Where the layers go ---

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> CueRecoveryConfig:
        assert isinstance(peft_config, CueRecoveryConfig)  # by `register_peft_method`
        refuse_unsupported_family(self.model)
        text_config = self.model.config.get_text_config()
        peft_config.check_size(text_config, type(self.model).__name__)
        peft_config.hidden_size = text_config.hidden_size
        peft_config.num_hidden_layers = text_config.num_hidden_layers
        if peft_config.layer_interval > text_config.num_hidden_layers or last_reading_layer(text_config) == 0:
            raise ValueError(
                f"`layer_interval` is {peft_config.layer_interval}, but the model has only "
                f"{text_config.num_hidden_layers} decoder layer(s), the last of which cannot carry a module. Choose "
                "an interval between 1 and the number of layers."
            )
        if peft_config.train_base and not all(parameter.is_floating_point() for parameter in self.model.parameters()):
            raise ValueError(
                "`train_base=True` trains the backbone's own weights, but quantized weights cannot be trained. Leave "
                "it out (`r=16` adds LoRA), or load the model without quantization."
            )
        if peft_config.sink_token != "first" and peft_config.sink_token_ids is None:
            raise ValueError(
                f"`sink_token={peft_config.sink_token!r}` has not been looked up in the tokenizer. Call "
                "`config.resolve_sink_token(processor)` before attaching the adapter."
            )
        if peft_config.r > 0 and peft_config.target_modules is None:
            peft_config.target_modules = linear_layers_of_decoder(self.model)
        return peft_config

    def _check_new_adapter_config(self, config: LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        train_base = [name for name, other in self.peft_config.items() if other.train_base]
        if train_base and len(self.peft_config) > 1:
            raise ValueError(
                f"Adapter '{train_base[0]}' has `train_base=True`: it replaces the backbone's own weights, so it must "
                f"be the model's only adapter, but the model would have {list(self.peft_config)}."
            )

    # A static method in PEFT, but PEFT calls it on the tuner instance
    def _check_target_module_exists(self, peft_config, key):  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._carries_recovery(peft_config, self.model.get_submodule(key)):
            return True
        return peft_config.r > 0 and super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if not self._carries_recovery(lora_config, target):
            super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
            return
        refuse_disk_offload(self.model, target, current_key)
        text_config = self.model.config.get_text_config()
        layer = next((child for child in target.children() if isinstance(child, CueRecoveryLayer)), None)
        if layer is None:
            layer = target.cue_recovery = CueRecoveryLayer(target)
            layer.set_adapter(self.active_adapters)
        num_heads = lora_config.num_heads or text_config.num_attention_heads
        layer.update_layer(adapter_name, lora_config, text_config.hidden_size, num_heads, norm_eps(text_config))

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        targets = [model.get_submodule(name) for name in self.targeted_module_names]
        # PEFT raises an error if it finds no target, but here decoder layers with a module count as targets, too
        has_lora = self.targeted_parameter_names or not all(self._carries_recovery(config, each) for each in targets)
        if config.r > 0 and not has_lora:
            raise ValueError(
                f"`target_modules` are {config.target_modules!r}, but {type(self.model).__name__} has no such module "
                f"for LoRA of rank {config.r}. Name some of its linear layers, leave `target_modules` out for all of "
                "the text decoder's, or set `r=0`."
            )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        config = self.peft_config[self.active_adapters[0]]
        if config.train_base and not config.inference_mode:
            model.requires_grad_(True)

    def _carries_recovery(self, peft_config: CueRecoveryConfig, module: nn.Module) -> bool:
        indices = carrying_layers(self.model.config.get_text_config(), peft_config.layer_interval)
        layers = decoder_layers(self.model)
        return any(module is layers[index] for index in indices)

    def _recovery_layers(self) -> list[CueRecoveryLayer]:
        children = (child for layer in decoder_layers(self.model) for child in layer.children())
        return [child for child in children if isinstance(child, CueRecoveryLayer)]

    # --- What a forward call sees ---

    def _add_context(self, backbone: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pre-forward hook of the backbone: find the sink and the visual tokens of this call."""
        named = kwargs
        if args:
            named = {**dict(zip(signature(backbone.forward).parameters, args, strict=False)), **kwargs}
        input_ids = named.get("input_ids")
        length = (input_ids if input_ids is not None else named["inputs_embeds"]).shape[1]
        if length == 1:
            return None  # a decode step
        layers = self._recovery_layers()
        adapters = [name for name in self.active_adapters if any(name in layer.sink_attention for layer in layers)]
        if not adapters or layers[0].disable_adapters:
            return None
        if input_ids is None:
            raise ValueError(
                "Cue recovery finds the sink and the visual tokens in `input_ids`; pass them to the model."
            )

        # Compare the ids one by one: `isin` would need them as a tensor, and copying it to the device synchronizes
        visual_mask = reduce(torch.logical_or, [input_ids == token_id for token_id in self._visual_token_ids])
        # transformers 5.24 renamed `past_key_values` to `cache` in backbones, and still accepts the old name
        cache = named.get("cache", named.get("past_key_values"))
        if cache is not None and int(cache.get_seq_length()) > 0:
            if visual_mask.any():
                raise ValueError(
                    "The KV cache already holds a part of this prompt. Cue recovery needs the sink token and the "
                    "images in one forward call: prefill the whole prompt at once (no `prefill_chunk_size`, and no "
                    "new image after a cached prefix)."
                )
            return None  # several decoded tokens at once, as in assisted generation, or a new turn
        uses_flash_attention = "flash" in str(self.model.get_decoder().config._attn_implementation)
        refuse_packed_rows(input_ids, visual_mask, named, uses_flash_attention)
        ids = {name: self.peft_config[name].sink_token_id for name in adapters}
        sinks = {name: find_sinks(input_ids, ids[name], named.get("attention_mask")) for name in adapters}
        may_be_missing = [name for name in adapters if ids[name] is not None]
        missing = {name: read_later(visual_mask.any(dim=1) & (sinks[name] < 0)) for name in may_be_missing}
        for name, positions in sinks.items():
            positions = positions.clamp(min=0) if name in missing else positions
            visual_mask = visual_mask.scatter_(1, positions.unsqueeze(1), False)
        context = CueRecoveryContext(visual_mask, sinks, missing, always_found=sinks.keys() - missing.keys())
        return args, {**kwargs, "cue_recovery_context": context}

    def _check_context(self, backbone: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Forward hook of the backbone: check that layers got the context and that rows with images have a sink."""
        context = kwargs.get("cue_recovery_context")
        if context is None:
            return
        if not context.has_arrived:
            raise ValueError(
                f"{type(backbone).__name__} does not pass its keyword arguments on to its decoder layers, so cue "
                "recovery cannot give them the positions of the sink and the visual tokens. This model family is not "
                "supported."
            )
        for name, read_missing in context.missing_sinks.items():
            if rows := torch.nonzero(read_missing()).flatten().tolist():
                raise ValueError(
                    f"Row(s) {rows} of the batch have an image, but not the sink token "
                    f"{self.peft_config[name].sink_token!r} of the adapter '{name}', so its recovery module would do "
                    "nothing there. Render prompts with the processor and the chat template that the adapter was "
                    "trained with. For a new adapter, choose a token that every prompt has, or `sink_token='first'`."
                )

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any):
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                "Cue recovery does not support a different adapter per sample (`adapter_names`)."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)
