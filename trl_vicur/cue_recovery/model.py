import os
import re
import warnings
from collections.abc import Callable
from functools import cached_property, reduce
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..hub.merged_card import complete_merged_card
from .config import CueRecoveryConfig
from .layer import CueRecoveryContext, CueRecoveryLayer
from .positions import PACKING_ARGUMENTS, find_token, first_real_token, packed_rows


# Layers in which a token sees a limited number of the tokens before it, as transformers names them
WINDOWED_LAYER_TYPES = ("sliding_attention", "chunked_attention", "conv")
# Where a merged model's `save_pretrained` puts the module
MERGED_SUBFOLDER = "cue_recovery"


class CueRecoveryModel(LoraModel):
    """
    Attaches cue recovery (ViCuR, arXiv 2606.05718, Sec. 3.2), and LoRA where `r > 0`, to a vision-language model.

    Each call of the model's backbone finds the sink and the visual tokens once, from `input_ids`, and hands them to
    the decoder layers as a keyword argument of that call; nothing is left on a module.

    Args:
        model ([`~transformers.PreTrainedModel`]):
            The vision-language model to be adapted.
        config (`dict[str, CueRecoveryConfig]`):
            The configuration of the adapter by its name, as [`~peft.PeftModel`] passes it.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            The name of the adapter.

    Raises:
        `ValueError`: If the model has no visual tokens among those of its decoder, if its family does not hand
            keyword arguments on to its decoder layers (at the first call where its signatures do not say so), if
            `layer_interval` is larger than the model, if the sink token has not been resolved, if the adapter was made
            for a model of another size, or if an adapter with `train_base=True` would share the model with another one
            or has quantized weights to train; if transformers attaches it by itself, without PEFT's model around; and,
            when weights are loaded, if some are missing, or NaN or infinite.

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
    # Both kinds of layers of this method, the recovery layer and LoRA's
    tuner_layer_cls = BaseTunerLayer

    def __init__(
        self, model: PreTrainedModel, config: dict[str, CueRecoveryConfig], *args: Any, **kwargs: Any
    ) -> None:
        if not isinstance(config, dict):
            # From `inject_adapter_in_model`, with which transformers loads adapters by itself
            raise ValueError(
                "Cue recovery is attached with `peft.get_peft_model` and loaded with "
                "`PeftModel.from_pretrained(base_model, ...)`. `load_adapter`, `add_adapter` and `from_pretrained` of "
                "transformers do not know the names of its weights, and would leave the module untrained."
            )
        super().__init__(model, config, *args, **kwargs)
        # The backbone, not the head model: trainers with fused losses call it directly
        self._context_hooks = [
            model.base_model.register_forward_pre_hook(self._add_context, with_kwargs=True),
            model.base_model.register_forward_hook(self._check_context, with_kwargs=True),
        ]
        self.register_load_state_dict_pre_hook(check_weights)

    # --- Where the layers go ---

    def _prepare_adapter_config(self, peft_config: CueRecoveryConfig, model_config: dict) -> CueRecoveryConfig:
        text_config = self.model.config.get_text_config()
        if not self._visual_token_ids:
            raise ValueError(
                f"Cue recovery needs a model with visual tokens, but the config of {type(self.model).__name__} has "
                "neither `image_token_id` nor `video_token_id`. Use a vision-language model."
            )
        if self.model.config.is_encoder_decoder or "cross_attention_layers" in text_config.to_dict():
            raise ValueError(
                f"Cue recovery reads the image among the decoder's hidden states, but {type(self.model).__name__} "
                "keeps it outside (encoder-decoder, or cross-attention to the image). Use a model whose image tokens "
                "stand in the prompt, such as Qwen3-VL."
            )
        decoder = self.model.get_decoder()
        if not isinstance(getattr(decoder, "layers", None), nn.ModuleList) or not all(
            any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature(module.forward).parameters.values())
            for module in (self.model.base_model, decoder)
        ):
            raise ValueError(
                f"Cue recovery needs a decoder with `layers` that get the keyword arguments of the backbone's call, "
                f"but the {type(decoder).__name__} of {type(self.model).__name__} is none. This model family is not "
                "supported."
            )
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
            # All linear layers of the text decoder
            path = next(name for name, module in self.model.named_modules() if module is self._decoder_layers())
            linear_names = {
                name.rpartition(".")[2]
                for name, module in self._decoder_layers().named_modules()
                if isinstance(module, nn.Linear) and "cue_recovery" not in name
            }
            peft_config.target_modules = rf"{re.escape(path)}\.\d+\..*\.({'|'.join(sorted(linear_names))})"
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config = self.peft_config[adapter_name]
        targets = [model.get_submodule(name) for name in self.targeted_module_names]
        # PEFT itself sees that nothing is found, but it has found the recovery module
        has_lora = self.targeted_parameter_names or not all(self._carries_recovery(config, each) for each in targets)
        if config.r > 0 and not has_lora:
            raise ValueError(
                f"`target_modules` are {config.target_modules!r}, but {type(self.model).__name__} has no such module "
                f"for LoRA of rank {config.r}. Name some of its linear layers, leave `target_modules` out for all of "
                "the text decoder's, or set `r=0`."
            )

    def _check_new_adapter_config(self, config: CueRecoveryConfig) -> None:
        super()._check_new_adapter_config(config)
        train_base = [name for name, other in self.peft_config.items() if other.train_base]
        if train_base and len(self.peft_config) > 1:
            raise ValueError(
                f"Adapter '{train_base[0]}' has `train_base=True`: it replaces the backbone's own weights, so it must "
                f"be the model's only adapter, but the model would have {list(self.peft_config)}."
            )

    def _check_target_module_exists(self, peft_config: CueRecoveryConfig, key: str) -> bool:
        if self._carries_recovery(peft_config, self.model.get_submodule(key)):
            return True
        return peft_config.r > 0 and super()._check_target_module_exists(peft_config, key)

    def _carries_recovery(self, peft_config: CueRecoveryConfig, module: nn.Module) -> bool:
        layers = self._decoder_layers()
        indices = carrying_layers(self.model.config.get_text_config(), peft_config.layer_interval)
        return any(module is layers[index] for index in indices)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if not self._carries_recovery(peft_config, target):
            super()._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key, **kwargs)
            return
        # `PeftModel.from_pretrained` removes accelerate's hooks, and offloads only LoRA's weights to disk
        device_map = getattr(self.model, "hf_device_map", {})
        is_offloaded = "disk" in device_map.values() and next(target.parameters()).is_meta
        if is_offloaded and not any(hasattr(module, "_hf_hook") for module in target.modules()):
            raise ValueError(
                f"{current_key} is offloaded to disk, and PEFT cannot load a recovery module there. Load the adapter "
                "onto a model without disk offload and call `accelerate.disk_offload` on the result, or pass a "
                "`device_map` that keeps the layers with modules in memory."
            )
        text_config = self.model.config.get_text_config()
        if not _has_recovery_layer(target):
            target.cue_recovery = CueRecoveryLayer(target)
            target.cue_recovery.set_adapter(self.active_adapters)
        target.cue_recovery.update_layer(
            adapter_name,
            peft_config,
            hidden_size=text_config.hidden_size,
            num_heads=peft_config.num_heads or text_config.num_attention_heads,
            eps=_norm_eps(text_config),
        )

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        config = self.peft_config[self.active_adapters[0]]
        if config.train_base and not config.inference_mode:
            for parameter in model.parameters():
                parameter.requires_grad_(True)

    def _decoder_layers(self) -> nn.ModuleList:
        return self.model.get_decoder().layers

    def _recovery_layers(self) -> list[CueRecoveryLayer]:
        return [layer.cue_recovery for layer in self._decoder_layers() if _has_recovery_layer(layer)]

    @cached_property
    def _visual_token_ids(self) -> list[int]:
        return visual_token_ids(self.model.config)

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

        # Compared one by one: a tensor of the ids would have to be copied to the device, which waits for it
        visual_mask = reduce(torch.logical_or, [input_ids == token_id for token_id in self._visual_token_ids])
        # Backbones call it `cache` since transformers 5.24, and still accept the old name
        cache = named.get("cache", named.get("past_key_values"))
        if cache is not None and int(cache.get_seq_length()) > 0:
            if visual_mask.any():
                raise ValueError(
                    "The KV cache already holds a part of this prompt. Cue recovery needs the sink token and the "
                    "images in one forward call: prefill the whole prompt at once (no `prefill_chunk_size`, no cache "
                    "that is continued with an image)."
                )
            return None  # several decoded tokens at once, as in assisted generation, or a new turn
        self._refuse_packed_rows(input_ids, visual_mask, named)
        sinks = {name: self._find_sinks(name, input_ids, named.get("attention_mask")) for name in adapters}
        always_found = {name for name in adapters if self.peft_config[name].sink_token == "first"}
        missing = {
            name: read_later(visual_mask.any(dim=1) & (positions < 0))
            for name, positions in sinks.items()
            if name not in always_found
        }
        for name, positions in sinks.items():
            positions = positions if name in always_found else positions.clamp(min=0)
            visual_mask = visual_mask.scatter_(1, positions.unsqueeze(1), False)
        context = CueRecoveryContext(visual_mask, sinks, missing, always_found)
        return args, {**kwargs, "cue_recovery_context": context}

    def _find_sinks(self, adapter_name: str, input_ids: torch.Tensor, attention_mask: Any) -> torch.Tensor:
        """Index of each sample's sink, `(batch,)`; `-1` if it has none."""
        config = self.peft_config[adapter_name]
        if config.sink_token == "first":
            return first_real_token(input_ids, attention_mask)
        return find_token(input_ids, config.sink_token_ids[0], attention_mask)

    def _refuse_packed_rows(
        self, input_ids: torch.Tensor, visual_mask: torch.Tensor, arguments: dict[str, Any]
    ) -> None:
        mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
        uses_flash_attention = "flash" in str(self.model.get_decoder().config._attn_implementation)
        if any(arguments.get(name) is not None for name in PACKING_ARGUMENTS):
            is_packed = visual_mask.any(dim=1)
        else:
            is_packed = packed_rows(input_ids, mask, position_ids, uses_flash_attention)
        if is_packed is None:
            return  # the common case, which does not wait for the device
        if rows := torch.nonzero(is_packed & visual_mask.any(dim=1)).flatten().tolist():
            raise ValueError(
                f"Row(s) {rows} of the batch hold several samples, and images: positions restart within the row, its "
                f"attention mask separates parts of it, or the call has one of {', '.join(PACKING_ARGUMENTS)}. Cue "
                "recovery expects one sample per row and would mix their images. Pad the samples instead of packing "
                "them (no `packing`, no `padding_free`, no continuous batching)."
            )

    def _check_context(self, backbone: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """Forward hook of the backbone: check that layers got the context and that rows with images have a sink."""
        context = kwargs.get("cue_recovery_context")
        if context is None:
            return
        if not context.has_arrived:
            raise ValueError(
                f"{type(backbone).__name__} does not hand its keyword arguments on to its decoder layers, by which "
                "cue recovery tells them where the sink and the visual tokens are. This model family is not supported."
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

    # --- Merging, unloading, saving ---

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(merge=merge, **kwargs)
        if merge:
            model.save_pretrained = self._save_merged
            model._upload_modified_files = self._upload_merged
            warnings.warn(
                "The LoRA weights were merged. The recovery module is attention over the image and cannot be merged "
                "into weights, so it stays in the returned model, which gives the same outputs as the adapter. Its "
                f"`save_pretrained` writes the module as an adapter into the subfolder '{MERGED_SUBFOLDER}'; "
                f"`PeftModel.from_pretrained(base_model, folder, subfolder='{MERGED_SUBFOLDER}')` loads it. "
                "`unload()` in place of `merge_and_unload()` removes it.",
                stacklevel=3,
            )
        else:
            for layer in self._recovery_layers():
                layer.detach()
            for hook in self._context_hooks:
                hook.remove()
        return model

    def _save_merged(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """
        `save_pretrained` of a merged model: the backbone as transformers saves it, and in a subfolder the module as
        an adapter of it.
        """
        if push_to_hub:
            raise ValueError(
                "`save_pretrained(push_to_hub=True)` would upload the model without its recovery module. Use "
                "`model.push_to_hub(repo_id)`."
            )
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        backbone = {name: tensor for name, tensor in state_dict.items() if ".cue_recovery." not in name}
        type(self.model).save_pretrained(self.model, save_directory, is_main_process, backbone, **kwargs)
        if not is_main_process:
            return
        for adapter_name in self.active_adapters:
            config = self.peft_config[adapter_name]
            own = {name: getattr(config, name) for name in CueRecoveryConfig.__annotations__}
            config = CueRecoveryConfig(**{**own, "r": 0, "train_base": False}, inference_mode=True)
            key = f".cue_recovery.sink_attention.{adapter_name}."
            weights = {
                f"base_model.model.{self._remove_adapter_name_from_key(name, adapter_name)}": tensor.contiguous()
                for name, tensor in state_dict.items()
                if key in name
            }
            # As PEFT saves adapters by other names
            folder = Path(save_directory, MERGED_SUBFOLDER, "" if adapter_name == "default" else adapter_name)
            config.save_pretrained(folder)
            save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def _upload_merged(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """The last step of a merged model's `push_to_hub`, which has put an empty form in the card's place."""
        complete_merged_card(Path(working_dir, "README.md"), repo_id, self.model.name_or_path, MERGED_SUBFOLDER)
        return type(self.model)._upload_modified_files(self.model, working_dir, repo_id, *args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Recovery modules cannot be averaged: attention is not linear in its weights.")

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        if not config.train_base:
            return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # The whole backbone, but tied weights under one of their names
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        duplicates = set(names) - {name for name, _ in model.named_parameters()}
        return {name: tensor for name, tensor in state_dict.items() if name not in duplicates}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        if ".sink_attention." in key:
            return key.replace(f".sink_attention.{adapter_name}.", ".sink_attention.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT would leave what is missing as it was made, without a word
        names = {name for name, _ in model.named_parameters()}
        kinds = r"\.(sink_attention|lora_\w+)\."
        is_own = re.compile(rf"{kinds}{re.escape(adapter_name)}(\.|$)").search
        missing = sorted(name for name in names - state_dict.keys() if config.train_base or is_own(name))
        unknown = sorted(name for name in state_dict.keys() - names if re.search(kinds, name))
        for found, what in ((missing, "lacks"), (unknown, "has, against its config,")):
            if found:
                raise ValueError(
                    f"The adapter '{adapter_name}' {what} {len(found)} weight(s), among them '{found[0]}'. Its "
                    f"adapter_config.json (`r={config.r}`, `layer_interval={config.layer_interval}`, "
                    f"`train_base={config.train_base}`) and its weights do not belong together, or a part of them is "
                    "lost: save or download it again."
                )
        return state_dict


def check_weights(model: CueRecoveryModel, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: refuse weights that are not finite, from a training that diverged."""
    for name, tensor in state_dict.items():
        if isinstance(tensor, DTensor):  # each process looks at its own shard, since not all come by here together
            tensor = tensor.to_local()
        if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{count} of the {tensor.numel()} values to be loaded for '{name.removeprefix(prefix)}' are NaN or "
                "infinite. The training that saved them had diverged: load an earlier checkpoint, and train with a "
                "lower learning rate."
            )


def visual_token_ids(config: PreTrainedConfig) -> list[int]:
    """Token ids that stand for pieces of images and videos in a model's input; empty for a text model."""
    # Some families have them under another name, which only the attribute resolves (LLaVA's `image_token_index`)
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return [token_id for token_id in ids if token_id is not None]


def last_reading_layer(text_config: PreTrainedConfig) -> int:
    """
    Index of the last decoder layer through which a token far behind the sink can read the sink's hidden state. A
    module that stands behind it could not be heard, and would hardly learn.

    It is the last layer of all, but for layers that look back over a window only (Gemma, LFM2) or use keys and values
    of earlier layers (Gemma 4). Where all layers do, the window is what there is.
    """
    settings = text_config.to_dict()
    with_own_keys = text_config.num_hidden_layers - (settings.get("num_kv_shared_layers") or 0)
    layer_types = (settings.get("layer_types") or [])[:with_own_keys]
    reading = [i for i, layer_type in enumerate(layer_types) if layer_type not in WINDOWED_LAYER_TYPES]
    return reading[-1] if reading else with_own_keys - 1


def carrying_layers(text_config: PreTrainedConfig, layer_interval: int) -> range:
    """
    Indices of the decoder layers whose inputs modules update: the output of layer l after DeepStack is the input of
    layer l + 1.
    """
    return range(1, last_reading_layer(text_config) + 1, layer_interval)


def _norm_eps(text_config: PreTrainedConfig) -> float:
    """Epsilon of the text model's norms, by the name that its family has for it."""
    settings = text_config.to_dict()
    return next(settings[name] for name in ("rms_norm_eps", "norm_eps", "layer_norm_eps") if name in settings)


def _has_recovery_layer(decoder_layer: nn.Module) -> bool:
    return any(name == "cue_recovery" for name, _ in decoder_layer.named_children())


def read_later(mask: torch.Tensor) -> Callable[[], torch.Tensor]:
    """
    Return a function that returns the mask on the CPU. On a GPU the copy starts now and the function waits for this
    copy alone; a copy that starts later would also wait for all work queued in between.
    """
    if not mask.is_cuda:
        return lambda: mask
    copy = mask.to("cpu", non_blocking=True)  # into pinned memory
    is_copied = torch.cuda.current_stream(mask.device).record_event()

    def read() -> torch.Tensor:
        is_copied.synchronize()
        return copy

    return read
