"""Training with rollouts by vLLM, which receives the module's weights before each rollout."""

from functools import partial
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from engines import (
    HEAD_DIM,
    MROPE,
    assert_equals_transformers,
    assert_server_equals_transformers,
    generate,
    make_checkpoint,
    server,
)
from packaging.version import Version
from safetensors.torch import save_file
from tiny_models import make_image, make_processor, make_qwen3_vl, make_rows, user
from trl.generation import vllm_client, vllm_generation
from vllm import __version__ as vllm_version
from vllm import _custom_ops

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer


@pytest.fixture
def checkpoint(tmp_path):
    model = make_qwen3_vl(hidden_size=64, head_dim=HEAD_DIM, rope_parameters={**MROPE, "mrope_interleaved": True})
    return make_checkpoint(tmp_path, model, make_processor(), embedding_scale=5)


def make_trainer(checkpoint, output_dir: Path, adapter: dict, **options) -> ViCuRTrainer:
    rows = [
        *make_rows(2),
        {"prompt": [{"role": "user", "content": "Compare."}], "images": [make_image(2), make_image(3)], "cue": "two"},
        {"prompt": [{"role": "user", "content": "Hello."}], "images": [], "cue": "no picture"},
    ]
    args = ViCuRConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=4,
        max_steps=3,
        max_completion_length=8,
        use_vllm=True,
        logging_steps=1,
        report_to="none",
        bf16=False,
        use_cpu=True,
        **options,
    )
    return ViCuRTrainer(
        model=str(checkpoint.base),
        args=args,
        train_dataset=Dataset.from_list(rows),
        peft_config=CueRecoveryConfig(layer_interval=1, **adapter),
    )


def assert_samples_with_trained_weights(trainer: ViCuRTrainer) -> None:
    """In each step, vLLM's probabilities of the sampled tokens equal the trainer's."""
    logs = [log for log in trainer.state.log_history if "loss" in log]
    # vLLM must not sample image tokens, which have 0.2 to 0.6 % of the probability here. Wrong weights, prompts or
    # image features would differ by far more
    assert [log["sampling/sampling_logp_difference/mean"] < 0.01 for log in logs] == 3 * [True]
    assert all(abs(log["sampling/importance_sampling_ratio/mean"] - 1) < 0.01 for log in logs)
    assert logs[-1]["cue_recovery/layers.1/update_ratio"] > 0


@pytest.mark.parametrize(
    "adapter, learning_rate, enforce_eager",
    [({"r": 4}, 0.02, False), ({"train_base": True}, 0.001, True)],
    ids=["lora", "train_base"],
)
def test_colocated_engine_gets_the_trained_weights(
    checkpoint, tmp_path, monkeypatch, adapter, learning_rate, enforce_eager
):
    # vLLM would choose bfloat16, and oneDNN's copies of the weights do not follow those that are loaded later
    options = {"dtype": "float32", "enforce_eager": enforce_eager}
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, **options))
    monkeypatch.setattr(_custom_ops, "_supports_onednn", False)
    options = dict(learning_rate=learning_rate, vllm_max_model_length=512)
    trainer = make_trainer(checkpoint, tmp_path / "output", adapter, **options)
    trainer.train()
    assert_samples_with_trained_weights(trainer)

    # The served weights after the last step
    llm, conversations = trainer.vllm_generation.llm, [user("What is this?", make_image(7)), user("Bye.")]
    before = generate(llm, checkpoint, conversations)
    trainer.vllm_generation.sync_weights()
    after = generate(llm, checkpoint, conversations)
    trainer.model.eval()
    assert_equals_transformers(after, checkpoint._replace(model=trainer.model), conversations)
    first_logprobs = [next(iter(outputs[0].outputs[0].logprobs[0].values())).logprob for outputs in (before, after)]
    assert abs(first_logprobs[0] - first_logprobs[1]) > 1e-3


@pytest.fixture
def serve(checkpoint, tmp_path, monkeypatch):
    """Starts a server for training; weights are sent in a file, since NCCL needs GPUs."""
    weights_file = tmp_path / "weights.safetensors"

    def send(iterator, **kwargs):
        part = weights_file.with_suffix(".part")
        # Weights are merged only until the iterator ends
        save_file({name: weight.clone(memory_format=torch.contiguous_format) for name, weight in iterator}, part)
        part.rename(weights_file)

    monkeypatch.setattr(vllm_client, "packed_nccl_broadcast_producer", send)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda self, device: None)

    def serve(cue_recovery: str, logprobs_mode: str = "processed_logprobs"):
        return server(
            checkpoint.base,
            *("--hf-overrides", f'{{"cue_recovery": {cue_recovery}}}', "--logprobs-mode", logprobs_mode),
            *("--weight-transfer-config", '{"backend": "file"}', "--enable-scale-out", "--max-model-len", "512"),
            program=(str(Path(__file__).with_name("server_for_training.py")),),
            VLLM_SERVER_DEV_MODE="1",
            WEIGHTS_FILE=str(weights_file),
        )

    return serve


@pytest.mark.skipif(
    Version(vllm_version) >= Version("0.32"),
    reason="TRL 1.16 cannot read this server's log-probabilities",
)
@pytest.mark.parametrize(
    "adapter, learning_rate", [({"r": 4}, 0.02), ({"train_base": True}, 0.001)], ids=["lora", "train_base"]
)
def test_server_gets_the_trained_weights(checkpoint, tmp_path, serve, adapter, learning_rate):
    with serve('{"layer_interval": 1, "sink_token": "<|im_end|>"}') as address:
        adapter = {**adapter, "sink_token": "<|im_end|>"}
        options = dict(learning_rate=learning_rate, vllm_mode="server", vllm_server_base_url=address)
        trainer = make_trainer(checkpoint, tmp_path / "output", adapter, **options)
        trainer.train()
        assert_samples_with_trained_weights(trainer)

        trainer.vllm_generation.sync_weights()
        trainer.model.eval()
        conversations = [user("What is this?", make_image(7)), user("Bye.")]
        assert_server_equals_transformers(address, checkpoint._replace(model=trainer.model), conversations)


@pytest.mark.parametrize(
    "module, logprobs_mode, message",
    [
        (
            '{"layer_interval": 2}',
            "processed_logprobs",
            "with `--hf-overrides .*layer_interval.: 1",
        ),
        ('{"layer_interval": 1}', "raw_logprobs", "with `--logprobs-mode processed_logprobs`"),
    ],
)
def test_server_with_the_wrong_module_or_logprobs_is_refused(
    checkpoint, tmp_path, serve, module, logprobs_mode, message
):
    with serve(module, logprobs_mode) as address, pytest.raises(ValueError, match=message):
        make_trainer(checkpoint, tmp_path / "output", {}, vllm_mode="server", vllm_server_base_url=address)
