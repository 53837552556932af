"""Serving with the vLLM plugin: vLLM's answers equal those of transformers to each prompt alone."""

import json
import os
import re
import shutil

import pytest
import requests
import torch
from engines import (
    HEAD_DIM,
    MROPE,
    NEW_TOKENS,
    assert_equals_transformers,
    assert_server_equals_transformers,
    engine,
    generate,
    make_checkpoint,
    runner,
    server,
)
from tiny_models import make_image, make_processor, make_qwen2_5_processor, make_qwen2_5_vl, make_qwen3_vl, user
from vllm import ModelRegistry
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import utils
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from trl_vicur.vllm import engine_config, model
from trl_vicur.vllm.model import CueRecoveryMixin
from trl_vicur.vllm.sinks import find_sinks


ARCHITECTURE = "Qwen3VLForConditionalGeneration"
# Longer than a block of the KV cache, so that prompts share blocks before their images
SYSTEM = {"role": "system", "content": [{"type": "text", "text": "You look closely at pictures. " * 10}]}


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory):
    model = make_qwen3_vl(hidden_size=64, head_dim=HEAD_DIM, rope_parameters={**MROPE, "mrope_interleaved": True})
    processor = make_processor()
    # vLLM normalizes videos like images. Released processors use the same values for both; ours uses CLIP's for images
    images, videos = processor.image_processor, processor.video_processor
    images.image_mean, images.image_std = videos.image_mean, videos.image_std
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_vl"), model, processor, r=4)


@pytest.fixture(scope="module")
def llm(qwen3_vl):
    """An engine started with every option that would separate the sink from its image."""
    wishes = {"enable_prefix_caching": True, "enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    with engine(qwen3_vl, qwen3_vl.adapter, **wishes) as llm:
        yield llm


def test_mixed_batch_of_texts_and_images(llm, qwen3_vl):
    conversations = [
        user("What is this?", make_image(0)),
        user("Hello."),
        user("Compare.", make_image(1), make_image(2, (128, 96))),
        user("And this?", make_image(3, (96, 64))),
        user("Bye."),
    ]
    assert_equals_transformers(generate(llm, qwen3_vl, conversations), qwen3_vl, conversations)


def test_batch_of_a_video_an_image_and_a_text(llm, qwen3_vl):
    video = {"type": "video", "video": [make_image(seed) for seed in range(4)]}
    conversations = [
        [{"role": "user", "content": [video, {"type": "text", "text": "What happens?"}]}],
        user("What is this?", make_image(4)),
        user("Hello."),
    ]
    assert_equals_transformers(generate(llm, qwen3_vl, conversations), qwen3_vl, conversations)


def test_same_text_with_another_image_is_answered_from_that_image(llm, qwen3_vl):
    """Prefix caching would fail here: everything before the images is the same."""
    conversations = [[SYSTEM, *user("What is this?", make_image(seed))] for seed in range(3)]
    in_one_batch = generate(llm, qwen3_vl, conversations)
    assert_equals_transformers(in_one_batch, qwen3_vl, conversations)
    for conversation in conversations[::-1]:
        assert_equals_transformers(generate(llm, qwen3_vl, [conversation]), qwen3_vl, [conversation])
    completions = {tuple(output.outputs[0].token_ids) for output in in_one_batch}
    assert len(completions) == 3


def test_sink_after_the_question_in_preempted_requests(tmp_path):
    """Qwen2.5-VL with a sink at the end of the question, and a KV cache too small for all requests at once."""
    model = make_qwen2_5_vl(hidden_size=4 * HEAD_DIM, rope_parameters=MROPE)
    options = {"sink_token": "<|im_end|>", "bottleneck_size": 32}
    checkpoint = make_checkpoint(tmp_path, model, make_qwen2_5_processor(), **options)
    # Prompts of two blocks that grow into a third; two of them leave room for one more block (and one is unused)
    conversations = [user("x" * (32 + seed), make_image(seed, (56, 56))) for seed in range(4)]
    blocks = {"block_size": 32, "num_gpu_blocks_override": 6, "max_model_len": 128}
    with engine(checkpoint, checkpoint.adapter, disable_log_stats=False, **blocks) as llm:
        outputs = generate(llm, checkpoint, conversations)
        preemptions = next(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")
    assert all(
        32 < len(output.prompt_token_ids) <= 64 < len(output.prompt_token_ids) + NEW_TOKENS for output in outputs
    )
    assert preemptions > 0
    assert_equals_transformers(outputs, checkpoint, conversations)


def test_asynchronous_scheduling(qwen3_vl, monkeypatch):
    """vLLM's default on GPUs: the next step is scheduled while this one runs. vLLM disables it on CPUs."""
    check = CpuPlatform.check_and_update_config

    def check_and_leave_on(vllm_config):
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(check_and_leave_on))
    conversations = [user("What is this?", make_image(0)), user("Hello."), user("Compare.", make_image(1))]
    with engine(qwen3_vl, qwen3_vl.adapter, max_num_seqs=2) as llm:
        assert isinstance(llm.llm_engine.engine_core.engine_core.scheduler, AsyncScheduler)
        assert_equals_transformers(generate(llm, qwen3_vl, conversations), qwen3_vl, conversations)


def test_model_runner_is_the_requested_one(llm):
    """.ci/vllm runs all tests with both runners."""
    package = "vllm.v1.worker.cpu." if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1" else "vllm.v1.worker.cpu_"
    assert type(runner(llm)).__module__ == f"{package}model_runner"


def test_vllm_is_unchanged_without_an_adapter(qwen3_vl):
    conversations = [user("What is this?", make_image(0)), user("Hello.")]
    with engine(qwen3_vl, None) as llm:
        outputs = generate(llm, qwen3_vl, conversations)
        assert llm.llm_engine.vllm_config.cache_config.enable_prefix_caching
    with qwen3_vl.model.disable_adapter():
        assert_equals_transformers(outputs, qwen3_vl, conversations)


def _without_its_images(self, input_ids, multimodal_embeddings=None, **kwargs):
    return super(CueRecoveryMixin, self).embed_input_ids(input_ids, multimodal_embeddings, **kwargs)


def _also_in_decode_steps(self, *args, **kwargs):
    if self._prefill is None:
        module = next(iter(self.recovery_modules.values()))
        sink = torch.ones(1, module.q_proj.in_features)
        module(sink, sink[None], torch.ones(1, 1, dtype=torch.bool))
    return FORWARD(self, *args, **kwargs)


FORWARD = CueRecoveryMixin.forward


@pytest.mark.parametrize(
    ("target", "name", "replacement", "message"),
    [
        (CueRecoveryMixin, "embed_input_ids", _without_its_images, "should run once in the prefill of a prompt"),
        (
            CueRecoveryMixin,
            "forward",
            _also_in_decode_steps,
            r"\['layers.1.cue_recovery'\] ran in a decode step",
        ),
        (model, "_update_sinks_before_layer", lambda name, *_: None, "modules did not run in a prefill with an image"),
    ],
    ids=["images do not arrive", "also in decode steps", "hooks do not run"],
)
def test_invariant_14_engine_that_does_not_run_the_module_does_not_start(
    qwen3_vl, monkeypatch, target, name, replacement, message
):
    """Serving must match training."""
    monkeypatch.setattr(target, name, replacement)
    with pytest.raises(RuntimeError, match=message), engine(qwen3_vl, qwen3_vl.adapter):
        pass


def test_invariant_14_engine_whose_model_was_replaced_does_not_start(qwen3_vl, monkeypatch):
    """Another plugin may register the architecture later."""
    monkeypatch.setattr(ModelRegistry, "models", dict(ModelRegistry.models))
    monkeypatch.setattr(utils, "_MODEL_ARCH_BY_HASH", {})  # vLLM's cache of resolved architectures
    ModelRegistry.register_model(ARCHITECTURE, f"vllm.model_executor.models.qwen3_vl:{ARCHITECTURE}")
    with pytest.raises(RuntimeError, match="qwen3_vl.Qwen3VLForConditionalGeneration, which has no recovery module"):
        with engine(qwen3_vl, qwen3_vl.adapter):
            pass


def test_server_with_an_adapter_that_holds_the_backbone(tmp_path):
    """Like `vllm serve`, through the chat API, with `train_base=True` and trained weights."""
    model = make_qwen3_vl(hidden_size=64, head_dim=HEAD_DIM, rope_parameters={**MROPE, "mrope_interleaved": True})
    checkpoint = make_checkpoint(tmp_path, model, make_processor(), train_base=True)
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter.mul_(1.1)
    checkpoint.model.save_pretrained(checkpoint.adapter)

    overrides = json.dumps({"cue_recovery": str(checkpoint.adapter)})
    with server(checkpoint.base, "--hf-overrides", overrides, "--max-model-len", "2048") as address:
        conversations = [user("What is this?", make_image(0)), user("What is this?", make_image(1))]
        assert_server_equals_transformers(address, checkpoint, conversations)


@pytest.mark.parametrize("option", ["--data-parallel-size", "--tensor-parallel-size"])
def test_server_with_two_workers(qwen3_vl, option):
    conversations = [user("What is this?", make_image(0)), user("Hello.")]
    overrides = json.dumps({"cue_recovery": str(qwen3_vl.adapter)})
    arguments = ("--hf-overrides", overrides, "--max-model-len", "2048", option, "2")
    with server(qwen3_vl.base, *arguments, VLLM_CPU_OMP_THREADS_BIND="nobind") as address:
        for rank in ("0", "1") if option == "--data-parallel-size" else ("0",):
            assert_server_equals_transformers(address, qwen3_vl, conversations, **{"X-data-parallel-rank": rank})


def test_server_with_ngram_speculation(qwen3_vl):
    """Several tokens per decode step; the module does nothing in them."""
    conversations = [user("aaaaaaaa", make_image(0)), user("Hello."), user("ababababab", make_image(1))]
    overrides = json.dumps({"cue_recovery": str(qwen3_vl.adapter)})
    ngrams = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    arguments = ("--hf-overrides", overrides, "--max-model-len", "2048", "--speculative-config", json.dumps(ngrams))
    with server(qwen3_vl.base, *arguments) as address:
        assert_server_equals_transformers(address, qwen3_vl, conversations)
        metrics = requests.get(f"{address}/metrics").text
    assert float(re.search(r"^vllm:spec_decode_num_drafts_total\{.*\} (.*)$", metrics, re.MULTILINE)[1]) > 0


@pytest.fixture
def start(qwen3_vl, tmp_path):
    """Creates vLLM's configuration of an engine with an adapter without starting it."""

    def start(adapter_config: dict | None = None, **options):
        adapter = tmp_path / "adapter"
        shutil.copytree(qwen3_vl.adapter, adapter)
        config = json.loads((qwen3_vl.adapter / "adapter_config.json").read_text()) | (adapter_config or {})
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        overrides = {"cue_recovery": str(adapter)} | options.pop("hf_overrides", {})
        arguments = EngineArgs(
            **{"model": str(qwen3_vl.base), "max_model_len": 2048, "hf_overrides": overrides} | options
        )
        return arguments.create_engine_config()

    return start


def test_options_that_separate_sink_and_image_are_disabled(start, monkeypatch):
    warnings = []
    monkeypatch.setattr(engine_config.logger, "warning", lambda message, *args: warnings.append(message % args))
    config = start(enable_prefix_caching=True, enable_chunked_prefill=True, max_num_batched_tokens=64)
    assert not config.cache_config.enable_prefix_caching
    assert not config.scheduler_config.enable_chunked_prefill
    assert config.scheduler_config.max_num_batched_tokens == 2048
    assert "prefix caching and chunked prefill are turned off" in warnings[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_dbo": True}, "`enable_dbo` is True"),
        ({"ubatch_size": 2}, "`ubatch_size` is 2"),
        ({"limit_mm_per_prompt": {"image": 0}}, "`limit_mm_per_prompt` allows no image"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "`kv_transfer_config` is set",
        ),
        (
            {"speculative_config": {"method": "ngram_gpu", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "`speculative_config` has the method 'ngram_gpu'",
        ),
    ],
)
def test_engine_options_that_skip_the_module_or_are_untested_are_refused(start, options, message):
    with pytest.raises(ValueError, match=message):
        start(**options)


@pytest.mark.parametrize(
    ("adapter_config", "message"),
    [
        ({"hidden_size": 2048}, "was made for a model with `hidden_size` 2048, but .* has `hidden_size` 64"),
        ({"num_hidden_layers": 28}, "was made for a model with `num_hidden_layers` 28"),
        ({"peft_type": "LORA"}, "is an adapter of type .*LORA, not a cue recovery adapter"),
        ({"use_dora": True, "r": 4}, "was trained with use_dora=True, which vLLM cannot serve .* Merge it with PEFT"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(start, adapter_config, message):
    with pytest.raises(ValueError, match=message):
        start(adapter_config)


def test_adapter_of_another_base_model_is_refused(start):
    config = start({"base_model_name_or_path": "Qwen/Qwen3-VL-2B-Instruct"})
    config.model_config.model = "Qwen/Qwen3-VL-2B-Thinking"  # does not exist here; its config would be the same
    with pytest.raises(ValueError, match="was trained on 'Qwen/Qwen3-VL-2B-Instruct', but .*Thinking' is served"):
        engine_config.CueRecoveryEngineConfig.verify_and_update_config(config)


def test_steps_in_micro_batches_are_refused():
    with pytest.raises(RuntimeError, match="one micro-batch, but vLLM split a step into 2"):
        find_sinks(None, None, None, [{}, {}], None)


def test_unsupported_architecture_is_refused(start):
    with pytest.raises(ValueError, match="cannot be served with Qwen2VLForConditionalGeneration"):
        start(hf_overrides={"architectures": ["Qwen2VLForConditionalGeneration"]})


def test_pipeline_parallelism_is_refused(start):
    with pytest.raises(ValueError, match="`pipeline_parallel_size` is 2"):
        start(pipeline_parallel_size=2, distributed_executor_backend="mp")
