"""How an adapter is saved, loaded, merged and unloaded."""

import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..hub.merged_card import complete_merged_card
from .config import CueRecoveryConfig
from .layer import CueRecoveryLayer


# Where a merged model's `save_pretrained` puts the module
MERGED_SUBFOLDER = "cue_recovery"


class SavedCueRecovery(LoraModel):
    """Base class of [`CueRecoveryModel`] that saves, loads, merges and unloads adapters."""

    model: PreTrainedModel
    peft_config: dict[str, CueRecoveryConfig]
    _context_hooks: list[RemovableHandle]

    # --- State dicts. PEFT 0.21 (PEFT#3490) calls these three class methods of a tuner ---

    @classmethod
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        if not config.train_base:
            return super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # The whole backbone, but each tied weight under only one of its names
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        duplicates = set(names) - {name for name, _ in model.named_parameters()}
        return {name: tensor for name, tensor in state_dict.items() if name not in duplicates}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT expects the adapter's name in the last two parts of a key; ours is before the projection's name
        if ".sink_attention." in key:
            return key.replace(f".sink_attention.{adapter_name}.", ".sink_attention.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        # PEFT#2118 only warns about missing weights, and leaves them at their initial values
        names = {name for name, _ in model.named_parameters()}
        kinds = r"\.(sink_attention|lora_\w+)\."
        is_own = re.compile(rf"{kinds}{re.escape(adapter_name)}(\.|$)").search
        missing = sorted(name for name in names - state_dict.keys() if config.train_base or is_own(name))
        unknown = sorted(name for name in state_dict.keys() - names if re.search(kinds, name))
        for found, what in ((missing, "lacks"), (unknown, "unexpectedly has")):
            if found:
                raise ValueError(
                    f"The adapter '{adapter_name}' {what} {len(found)} weight(s), among them '{found[0]}'. Its "
                    f"adapter_config.json (`r={config.r}`, `layer_interval={config.layer_interval}`, "
                    f"`train_base={config.train_base}`) and its weights do not match, or weights were lost. Save or "
                    "download it again."
                )
        return state_dict

    # --- Merging ---

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("Recovery modules cannot be averaged: attention is not linear in its weights.")

    # PEFT's method returns the model, although its annotation says `None`
    def _unload_and_optionally_merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        super()._unload_and_optionally_merge(merge, *args, **kwargs)
        if merge:
            # Set on the instance, because the class belongs to transformers
            self.model.save_pretrained = self._save_merged
            self.model._upload_modified_files = self._upload_merged
            warnings.warn(
                "The LoRA weights were merged. The recovery module is attention over the image and cannot be merged "
                "into weights, so it stays in the returned model, which gives the same outputs as the adapter. Its "
                f"`save_pretrained` writes the module as an adapter into the subfolder '{MERGED_SUBFOLDER}'; "
                f"`PeftModel.from_pretrained(base_model, folder, subfolder='{MERGED_SUBFOLDER}')` loads it. "
                "`unload()` in place of `merge_and_unload()` removes it.",
                stacklevel=3,
            )
        else:
            for module in list(self.model.modules()):
                if isinstance(module, CueRecoveryLayer):
                    module.detach()
            for hook in self._context_hooks:
                hook.remove()
        return self.model

    def _save_merged(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """
        `save_pretrained` of a merged model: save the backbone as transformers does, and the module in a subfolder, as
        an adapter of that backbone.
        """
        if push_to_hub:
            raise ValueError(
                "`save_pretrained(push_to_hub=True)` would upload the model without its recovery module. Use "
                "`model.push_to_hub(repo_id)`."
            )
        state_dict = self.model.state_dict() if state_dict is None else state_dict
        backbone = {name: tensor for name, tensor in state_dict.items() if ".cue_recovery." not in name}
        type(self.model).save_pretrained(self.model, save_directory, is_main_process, backbone, False, *args, **kwargs)
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
            # Like PEFT, save an adapter with another name in its own folder
            folder = Path(save_directory, MERGED_SUBFOLDER, "" if adapter_name == "default" else adapter_name)
            config.save_pretrained(str(folder))
            save_file(weights, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def _upload_merged(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Last step of a merged model's `push_to_hub`: complete the card that transformers wrote, then upload."""
        complete_merged_card(Path(working_dir, "README.md"), repo_id, self.model.name_or_path, MERGED_SUBFOLDER)
        return type(self.model)._upload_modified_files(self.model, working_dir, repo_id, *args, **kwargs)


def check_weights(model: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: refuse NaN and infinite weights, which a diverged run leaves behind."""
    for name, tensor in state_dict.items():
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()  # not all ranks get here, so none may wait for another rank's shard
        if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) and not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise ValueError(
                f"{count} of the {tensor.numel()} values to be loaded for '{name.removeprefix(prefix)}' are NaN or "
                "infinite. The run that saved them had diverged: load an earlier checkpoint, and train with a "
                "lower learning rate."
            )


def refuse_disk_offload(model: PreTrainedModel, decoder_layer: nn.Module, name: str) -> None:
    """Refuse a decoder layer that is offloaded to disk: PEFT can write only LoRA weights there (PEFT#1431)."""
    # `PeftModel.load_adapter` has removed accelerate's hooks by now, and expects the weights on disk
    is_on_disk = "disk" in getattr(model, "hf_device_map", {}).values() and next(decoder_layer.parameters()).is_meta
    if is_on_disk and not any(hasattr(module, "_hf_hook") for module in decoder_layer.modules()):
        raise ValueError(
            f"{name} is offloaded to disk, and PEFT cannot load a recovery module there. Load the adapter onto a "
            "model without disk offload and call `accelerate.disk_offload` on the result, or pass a `device_map` that "
            "keeps the layers with modules in memory."
        )
