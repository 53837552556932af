"""Startup check: each worker runs a small prompt with an image, and the engine starts only if the module ran."""

from collections import Counter
from functools import partial

from PIL import Image
from torch import nn
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput
from vllm.v1.request import Request
from vllm.v1.worker.worker_base import WorkerBase

from .model import CueRecoveryMixin


REQUEST_ID = "cue_recovery_startup_proof"


def prove_module_runs(worker: WorkerBase, vllm_config: VllmConfig) -> None:
    """
    Run a prefill with an image and one decode step in the worker's model runner, and count the modules' calls.

    Raises:
        `RuntimeError`: Unless every module runs once in the prefill and not at all in the decode step.
    """
    model = worker.get_model()
    if not isinstance(model, CueRecoveryMixin):
        raise RuntimeError(
            f"The engine has `cue_recovery` in its `hf_overrides`, but runs {type(model).__module__}."
            f"{type(model).__name__}, which has no recovery module. Another vLLM plugin or `--model-impl` has "
            "replaced the model: remove it, or serve with transformers."
        )
    modules = model.recovery_modules
    calls: Counter[str] = Counter()

    def count(name: str, module: nn.Module, args: tuple) -> None:
        calls[name] += 1

    hooks = [module.register_forward_pre_hook(partial(count, name)) for name, module in modules.items()]
    prefill, decode, cleanup = _steps(worker, vllm_config, model._recovery_config.sink_token_ids)
    _run(worker, prefill)
    in_prefill = Counter(calls)
    calls.clear()
    _run(worker, decode)
    worker.execute_model(cleanup)
    for hook in hooks:
        hook.remove()
    runner = type(worker.model_runner)
    engine = f"this engine ({runner.__module__}.{runner.__name__}, {vllm_config.compilation_config.cudagraph_mode})"
    if silent := [name for name in modules if in_prefill[name] != 1]:
        raise RuntimeError(
            f"Cue recovery does not work in {engine}: all {len(modules)} modules should run once in the prefill of a "
            f"prompt with an image, but {silent} did not (calls: {dict(in_prefill)}). Start vLLM with "
            "`--enforce-eager` or `VLLM_USE_V2_MODEL_RUNNER=0`, or serve with transformers."
        )
    if calls:
        raise RuntimeError(
            f"Cue recovery does not work in {engine}: {sorted(calls)} ran in a decode step, where no module may run. "
            "Start vLLM with `--enforce-eager` or `VLLM_USE_V2_MODEL_RUNNER=0`, or serve with transformers."
        )


def _run(worker: WorkerBase, step: SchedulerOutput) -> None:
    if worker.execute_model(step) is None:
        worker.sample_tokens(None)


def _steps(
    worker: WorkerBase, vllm_config: VllmConfig, sink_ids: list[int] | None
) -> tuple[SchedulerOutput, SchedulerOutput, SchedulerOutput]:
    """Prefill, one decode step and cleanup of one request, as vLLM's scheduler would output them."""
    prompt_ids, feature = _prompt_with_image(vllm_config, sink_ids)
    length = len(prompt_ids)
    groups = worker.model_runner.kv_cache_config.kv_cache_groups
    # Block 0 is vLLM's null block. Each group gets its own blocks, with room for the decoded token
    block_ids, begin = [], 1
    for group in groups:
        count = -(-(length + 1) // group.kv_cache_spec.block_size)
        block_ids.append([*range(begin, begin + count)])
        begin += count
    speculative = vllm_config.speculative_config

    def step(num_tokens: int) -> SchedulerOutput:
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = {REQUEST_ID: num_tokens}
        output.total_num_scheduled_tokens = num_tokens
        output.num_common_prefix_blocks = [0] * len(groups)
        output.num_spec_tokens_to_schedule = speculative.num_speculative_tokens if speculative else 0
        return output

    prefill = step(length)
    params = SamplingParams(temperature=0, max_tokens=2)
    request = Request(REQUEST_ID, prompt_ids, params, None, mm_features=[feature])
    prefill.scheduled_new_reqs = [
        NewRequestData.from_request(request, block_ids=tuple(block_ids), prefill_token_ids=prompt_ids)
    ]
    prefill.scheduled_encoder_inputs = {REQUEST_ID: [0]}

    decode = step(1)
    decode.scheduled_cached_reqs = CachedRequestData.make_empty()
    decode.scheduled_cached_reqs.req_ids = [REQUEST_ID]
    decode.scheduled_cached_reqs.new_block_ids = [None]
    decode.scheduled_cached_reqs.num_computed_tokens = [length]
    decode.scheduled_cached_reqs.num_output_tokens = [1]

    cleanup = SchedulerOutput.make_empty()
    cleanup.finished_req_ids = {REQUEST_ID}
    cleanup.free_encoder_mm_hashes = [feature.identifier]
    return prefill, decode, cleanup


def _prompt_with_image(vllm_config: VllmConfig, sink_ids: list[int] | None) -> tuple[list[int], MultiModalFeatureSpec]:
    """Token ids of a prompt with the sink and a small image, and the image, processed by vLLM."""
    model_config = vllm_config.model_config
    config = model_config.hf_config
    image_ids = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
    processor = MULTIMODAL_REGISTRY.create_processor(model_config)
    items = processor.info.parse_mm_data({"image": [Image.new("RGB", (64, 64))]})
    inputs = processor([*(sink_ids or [0]), *image_ids], items)
    feature = MultiModalFeatureSpec(
        data=inputs["mm_kwargs"]["image"][0],
        modality="image",
        identifier=REQUEST_ID,
        mm_position=inputs["mm_placeholders"]["image"][0],
    )
    return inputs["prompt_token_ids"], feature
