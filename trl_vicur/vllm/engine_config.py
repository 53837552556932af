"""Configuration of an engine with cue recovery: one engine must prefill each prompt and its images in one piece."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoProcessor, PreTrainedConfig
from vllm.config import CUDAGraphMode, ModelConfig, VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig


if TYPE_CHECKING:
    from ..cue_recovery import CueRecoveryConfig

SUPPORTED_ARCHITECTURES = ("Qwen3VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
# LoRA options that can be served: they affect only training, or weights that can be merged
SERVED_LORA_OPTIONS = (
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "eva_config"),
    *("bias", "modules_to_save"),  # their weights are in the adapter's file and replace the base model's
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config"),
)
# PiSSA, OLoRA, CorDA, LoftQ and others also change the base weights, which are not in the adapter's file
INITS_THAT_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")
MERGE_FIRST = (
    "Merge it with PEFT: `model.merge_and_unload().save_pretrained('merged')` on the trained model; then serve "
    "'merged' with the adapter 'merged/cue_recovery'."
)

logger = init_logger(f"vllm.{__name__}")


class CueRecoveryEngineConfig(VerifyAndUpdateConfig):
    """
    Checks and adjusts vLLM's configuration if `cue_recovery` in `hf_overrides` is the name of an adapter, or holds the
    options of a new module whose weights come from training.

    The sink's hidden state depends on the image after it, and so do the keys and values of every token. Prefix
    caching would share them between prompts with different images, and chunked prefill would compute the sink before
    its image, so both are turned off. CUDA graphs replay only decode steps, in which the module does nothing.

    Raises:
        `ValueError`: If the architecture is not supported, if the adapter cannot be served or was trained on a
            different model, if an option of a new module is unknown or invalid, or if an engine option splits a
            prompt's hidden states or has not been tested with the module.
    """

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        model_config = vllm_config.model_config
        adapter = getattr(model_config.hf_config, "cue_recovery", None)
        if adapter is None:
            return
        if model_config.architecture not in SUPPORTED_ARCHITECTURES:
            raise ValueError(
                f"The cue recovery adapter {adapter!r} cannot be served with {model_config.architecture}: vLLM would "
                f"ignore the module. Supported are {', '.join(SUPPORTED_ARCHITECTURES)}; serve other models with "
                "transformers."
            )
        _check_engine_options(vllm_config)
        if isinstance(adapter, str):
            config = _load_adapter_config(adapter, model_config)
        else:
            config = _make_module_config(adapter, model_config)
            # A trainer reads from here (`/server_info`) which module the server has
            model_config.hf_config.cue_recovery = model_config.hf_overrides["cue_recovery"] = config.module_options()
        # vLLM's cache of compiled models is keyed by this config, and the layers with modules are compiled differently
        model_config.hf_config.cue_recovery_layer_interval = config.layer_interval

        scheduler, cache = vllm_config.scheduler_config, vllm_config.cache_config
        if cache.enable_prefix_caching or scheduler.enable_chunked_prefill:
            logger.warning(
                "Cue recovery: prefix caching and chunked prefill are turned off, because the sink's hidden state "
                "depends on the images after it. Prompts are prefilled whole; a step has up to %d tokens.",
                max(scheduler.max_num_batched_tokens, model_config.max_model_len),
            )
        cache.enable_prefix_caching = False
        scheduler.enable_chunked_prefill = False
        scheduler.long_prefill_token_threshold = 0
        scheduler.max_num_batched_tokens = max(scheduler.max_num_batched_tokens, model_config.max_model_len)
        scheduler.max_num_scheduled_tokens = None
        # vLLM#9871: without room for an image, the scheduler splits the prompt before it. The cache may hold images of
        # this step, of the step in flight (asynchronous scheduling), and of a prompt that is waiting for KV blocks
        scheduler.max_num_encoder_input_tokens = scheduler.max_num_batched_tokens
        scheduler.encoder_cache_size = 3 * scheduler.max_num_batched_tokens
        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mode != CUDAGraphMode.NONE:
            compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY


def _check_engine_options(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for name in ("pipeline_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name) > 1:
            raise ValueError(
                f"`{name}` is {getattr(parallel, name)}, but cue recovery needs all hidden states of a prompt in one "
                "process. Use `tensor_parallel_size` or `data_parallel_size`."
            )
    if parallel.use_ubatching:
        name = "enable_dbo" if parallel.enable_dbo else "ubatch_size"
        raise ValueError(
            f"`{name}` is {getattr(parallel, name)}, but cue recovery needs every prompt in one micro-batch. Leave it "
            "out."
        )
    for name in ("kv_transfer_config", "ec_transfer_config"):
        if getattr(vllm_config, name) is not None:
            raise ValueError(
                f"`{name}` is set, but with cue recovery the engine that answers a prompt must also encode its images "
                "and prefill all of it. Leave it out."
            )
    if vllm_config.model_config.multimodal_config.get_limit_per_prompt("image") == 0:
        raise ValueError(
            "`limit_mm_per_prompt` allows no image, but cue recovery reads images. Allow one, or serve without the "
            "adapter."
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        raise ValueError(
            f"`speculative_config` has the method {speculative.method!r}, which is not tested with cue recovery. Use "
            "'ngram', or leave it out."
        )


def _load_adapter_config(adapter: str, model_config: ModelConfig) -> "CueRecoveryConfig":
    # Imported here, so that an engine without an adapter does not import PEFT
    from ..cue_recovery import CueRecoveryConfig

    config = CueRecoveryConfig.from_pretrained(adapter)
    if not isinstance(config, CueRecoveryConfig):  # PEFT returns a config of the type named in the file
        raise ValueError(
            f"{adapter!r} is an adapter of type {config.peft_type}, not a cue recovery adapter. Serve it with "
            "`--enable-lora`, or name an adapter trained by trl-vicur."
        )
    config.check_size(model_config.hf_config.get_text_config(), model_config.model)
    base = config.base_model_name_or_path
    are_ids = base and not Path(base).is_absolute() and not Path(model_config.model).is_dir()
    if are_ids and base != model_config.model:
        raise ValueError(
            f"The cue recovery adapter {adapter!r} was trained on {base!r}, but {model_config.model!r} is served. "
            f"Serve {base!r}."
        )
    _check_adapter_options(config, adapter)
    _check_tied_embeddings(config, adapter, model_config.hf_config)
    return config


def _check_adapter_options(config: "CueRecoveryConfig", adapter: str) -> None:
    from peft import LoraConfig

    default = type(config)()
    unserved = [
        f"{name}={getattr(config, name)!r}"
        for name in LoraConfig.__annotations__
        if name not in SERVED_LORA_OPTIONS and getattr(config, name) != getattr(default, name)
    ]
    if config.init_lora_weights not in INITS_THAT_KEEP_THE_BASE:
        unserved.append(f"init_lora_weights={config.init_lora_weights!r}")
    if unserved:
        raise ValueError(
            f"The cue recovery adapter {adapter!r} was trained with {', '.join(unserved)}, which vLLM cannot serve "
            f"as it was trained. {MERGE_FIRST}"
        )


def _check_tied_embeddings(config: "CueRecoveryConfig", adapter: str, model_config: PreTrainedConfig) -> None:
    """Refuse an adapter that changes the embeddings or the head if vLLM ties the two: PEFT changes only one."""
    if not model_config.tie_word_embeddings or (config.train_base and config.r == 0):
        return
    from peft.utils import load_peft_weights

    for name in load_peft_weights(adapter, device="cpu"):
        is_own = ".embed_tokens." in name or ".lm_head." in name
        if is_own and (".lora_" in name or not config.train_base):
            raise ValueError(
                f"The cue recovery adapter {adapter!r} has {name!r}, which vLLM cannot serve as it was trained: "
                "embeddings and head are one weight in the served model (`tie_word_embeddings`), but the adapter "
                "changes only one of the two. Train with other `target_modules`, or serve with transformers."
            )


def _make_module_config(options: dict[str, Any], model_config: ModelConfig) -> "CueRecoveryConfig":
    from ..cue_recovery import CueRecoveryConfig
    from ..cue_recovery.config import MODULE_OPTIONS

    if not isinstance(options, dict) or not options.keys() <= set(MODULE_OPTIONS):
        raise ValueError(
            "`cue_recovery` in `hf_overrides` must be an adapter (a folder or an id on the Hub), or the options of a "
            f"new module ({', '.join(MODULE_OPTIONS)}); got {options!r}."
        )
    config = CueRecoveryConfig(**options)
    if config.sink_token != "first" and config.sink_token_ids is None:
        processor = AutoProcessor.from_pretrained(
            model_config.tokenizer,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
        config.resolve_sink_token(processor)
    return config
