"""
vLLM plugin: serves and rolls out vision-language models with cue recovery.

vLLM finds [`register`] by the entry point `vllm.general_plugins`; nothing here is imported without vLLM. An adapter is
named in vLLM's `hf_overrides`:

```bash
vllm serve Qwen/Qwen3-VL-2B-Instruct --hf-overrides '{"cue_recovery": "me/Qwen3-VL-2B-ViCuR"}'
```

Rollouts begin with a new module, by its options in the adapter's place; its weights come from training.
"""

SUPPORTED_ARCHITECTURES = ("Qwen3VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")


def register() -> None:
    """
    Replace the supported architectures in vLLM's registry by subclasses, which behave as before where no adapter is
    named, and check every engine that is started with one.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine_config import CueRecoveryEngineConfig

    for architecture in SUPPORTED_ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{__name__}.model:CueRecovery{architecture}")
    # The other architectures too, which would leave the module out without a word
    for architecture in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP.setdefault(architecture, CueRecoveryEngineConfig)
