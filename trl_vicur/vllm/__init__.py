"""
vLLM plugin: serves vision-language models with cue recovery, and generates rollouts with them.

vLLM finds [`register`] through the entry point `vllm.general_plugins`; nothing here is imported without vLLM. Name the
adapter in vLLM's `hf_overrides`:

```bash
vllm serve Qwen/Qwen3-VL-2B-Instruct --hf-overrides '{"cue_recovery": "me/Qwen3-VL-2B-ViCuR"}'
```

For rollouts, pass the options of a new module instead of an adapter; training sends its weights.
"""

from typing import Any


def register() -> None:
    """
    Replace the supported architectures in vLLM's registry with subclasses, which change nothing unless `hf_overrides`
    name an adapter. For an engine with an adapter, check its options, and run a prompt with an image at startup to
    check that the module runs.
    """
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .engine_config import SUPPORTED_ARCHITECTURES, CueRecoveryEngineConfig

    for architecture in SUPPORTED_ARCHITECTURES:
        ModelRegistry.register_model(architecture, f"{__name__}.model:CueRecovery{architecture}")
    # Also check the other architectures, which would silently ignore the module
    for architecture in ModelRegistry.get_supported_archs():
        MODELS_CONFIG_MAP.setdefault(architecture, CueRecoveryEngineConfig)
    _prove_at_startup()


def _prove_at_startup() -> None:
    """
    Make every worker of this process check at the end of its startup that the module runs.

    All executors (one process, several, Ray) call their workers through vLLM's wrapper, which loads this plugin before
    it creates the worker. Warm-up is the last step of startup: by then the KV cache is allocated, the model is
    compiled, and its CUDA graphs are captured.
    """
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    def compile_or_warm_up_model(wrapper: WorkerWrapperBase) -> Any:
        times = wrapper.worker.compile_or_warm_up_model()
        if getattr(wrapper.vllm_config.model_config.hf_config, "cue_recovery", None) is not None:
            from .startup_proof import prove_module_runs

            prove_module_runs(wrapper.worker, wrapper.vllm_config)
        return times

    # The wrapper has no such method of its own: its `__getattr__` forwards the call to its worker
    WorkerWrapperBase.compile_or_warm_up_model = compile_or_warm_up_model
