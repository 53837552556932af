"""Finds out how ranks shard the weights, and refuses what cannot be trained that way."""

import os
from typing import Literal

from accelerate import ParallelismConfig
from accelerate.utils import parse_flag_from_env
from peft import PeftConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..vicur_config import ViCuRConfig


# "DeepSpeed" is ZeRO-1 or ZeRO-2, which keep complete weights in buffers of their own
Sharding = Literal["FSDP1", "FSDP2", "DeepSpeed", "ZeRO-3"] | str


def find_sharding(args: ViCuRConfig) -> Sharding | None:
    """
    Read from the training options, or from the environment that `accelerate launch` has set, how weights are sharded.

    Args:
        args ([`ViCuRConfig`]):
            Training configuration.

    Returns:
        `str` or `None`: `None` if each rank holds all weights.
    """
    if is_deepspeed_zero3_enabled():
        return "ZeRO-3"
    if args.deepspeed_plugin is not None:
        return "DeepSpeed"
    if args.fsdp_plugin_args is not None:
        return f"FSDP{args.fsdp_plugin_args['fsdp_version']}"
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return f"FSDP{os.environ.get('FSDP_VERSION', '1')}"
    return None


def check_sharding(sharding: Sharding | None, args: ViCuRConfig, peft_configs: list[PeftConfig | None]) -> None:
    """
    Check that weights with this sharding can be trained.

    Args:
        sharding (`str`, *optional*):
            Result of [`find_sharding`].
        args ([`ViCuRConfig`]):
            Training configuration.
        peft_configs (`list[PeftConfig | None]`):
            Configs of the adapters that train; `None` for the model's own weights.

    Raises:
        `ValueError`: If the sharding, or an option together with it, is not supported.
    """
    parallelism = args.parallelism_config
    if parallelism is None and parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG"):
        parallelism = ParallelismConfig()  # reads the sizes that `accelerate launch` has set
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        sizes = ", ".join(f"{name}={getattr(parallelism, name)}" for name in ("tp_size", "cp_size", "sp_size"))
        raise ValueError(
            f"Only data parallelism is supported, but the `parallelism_config` has {sizes}: losses and recovery "
            "modules read whole sequences and weights. Set these sizes to 1, and shard with FSDP2."
        )
    if sharding == "ZeRO-3":
        raise ValueError(
            "DeepSpeed's ZeRO-3 is not supported: the losses and the teacher's copy would read shards of weights. "
            "Use FSDP2 (examples/accelerate_configs/fsdp2.yaml), or ZeRO-2 if the models fit on each GPU."
        )
    if sharding is not None and sharding.startswith("FSDP") and sharding != "FSDP2":
        raise ValueError(
            f"{sharding} is not supported: ViCuRTrainer needs FSDP2. Set `fsdp_version: 2` in accelerate's config."
        )
    if sharding is not None and args.teacher_model_kind == "ema":
        raise ValueError(
            "`teacher_model_kind='ema'` swaps the student's weights, which FSDP and DeepSpeed keep in buffers of "
            "their own. Train with DDP, or choose `teacher_model_kind='base'` or `'live'`."
        )
    if sharding == "FSDP2" and any(getattr(config, "trainable_token_indices", None) for config in peft_configs):
        raise ValueError(
            "`trainable_token_indices` cannot be trained with FSDP2, which does not find the embedding inside PEFT's "
            "wrapper. Train with DDP or ZeRO-2, or leave the option out."
        )
