"""
vLLM plugin: serves and rolls out vision-language models with cue recovery.

vLLM finds [`register`] by the entry point `vllm.general_plugins`; nothing here is imported without vLLM. An adapter is
named in vLLM's `hf_overrides`:

```bash
vllm serve Qwen/Qwen3-VL-2B-Instruct --hf-overrides '{"cue_recovery": "me/Qwen3-VL-2B-ViCuR"}'
```

Rollouts begin with a new module, by its options in the adapter's place; its weights come from training.
"""

from typing import Any


SUPPORTED_ARCHITECTURES = ("Qwen3VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")


def register() -> None:
    """
    Replace the supported architectures in vLLM's registry by subclasses, which behave as before where no adapter is
    named. For an engine with an adapter, check its options, and run a prompt with an image to check the module.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine_config import CueRecoveryEngineConfig

    for architecture in SUPPORTED_ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{__name__}.model:CueRecovery{architecture}")
    # The other architectures too, which would leave the module out without a word
    for architecture in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP.setdefault(architecture, CueRecoveryEngineConfig)
    _prove_at_startup()


def _prove_at_startup() -> None:
    """
    Make every worker of this process check at the end of its start-up that the module runs.

    All executors (one process, several, Ray) call their workers through vLLM's wrapper, which loads this plugin before
    it creates the worker. Warm-up is the last step of a start-up: after it the KV cache is allocated, the model is
    compiled, and its CUDA graphs are captured.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def compile_or_warm_up_model(wrapper: WorkerWrapperBase) -> Any:
        times = wrapper.worker.compile_or_warm_up_model()
        if getattr(wrapper.vllm_config.model_config.hf_config, "cue_recovery", None) is not None:
            from .startup_proof import prove_module_runs

            prove_module_runs(wrapper.worker, wrapper.vllm_config)
        return times

    # By default the wrapper's `__getattr__` forwards this call to its worker
    WorkerWrapperBase.compile_or_warm_up_model = compile_or_warm_up_model
