"""Training with rollouts by colocated vLLM: the module's weights go there before each rollout."""

from functools import partial

import pytest
from datasets import Dataset
from engines import HEAD_DIM, MROPE, assert_equals_transformers, generate, make_checkpoint
from tiny_models import make_image, make_processor, make_qwen3_vl, make_rows, user
from trl.generation import vllm_generation
from vllm import _custom_ops

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer


@pytest.mark.parametrize(
    "adapter, learning_rate, enforce_eager, generation_kwargs, bound",
    [
        # Image tokens, which are not to be sampled, have between 0.2 and 0.6 % of the probability here
        ({"r": 4}, 0.02, False, None, 0.01),
        ({"train_base": True}, 0.001, True, {"logit_bias": {}}, 1e-5),
    ],
    ids=["lora", "train_base"],
)
def test_engine_follows_training(
    tmp_path, monkeypatch, adapter, learning_rate, enforce_eager, generation_kwargs, bound
):
    # vLLM would choose bfloat16, and oneDNN's copies of the weights do not follow those that are loaded later
    options = {"dtype": "float32", "enforce_eager": enforce_eager}
    monkeypatch.setattr(vllm_generation, "LLM", partial(vllm_generation.LLM, **options))
    monkeypatch.setattr(_custom_ops, "_supports_onednn", False)
    model = make_qwen3_vl(hidden_size=64, head_dim=HEAD_DIM, rope_parameters={**MROPE, "mrope_interleaved": True})
    checkpoint = make_checkpoint(tmp_path, model, make_processor(), embedding_scale=5)
    rows = [
        *make_rows(2),
        {"prompt": [{"role": "user", "content": "Compare."}], "images": [make_image(2), make_image(3)], "cue": "two"},
        {"prompt": [{"role": "user", "content": "Hello."}], "images": [], "cue": "no picture"},
    ]
    trainer = ViCuRTrainer(
        model=str(checkpoint.base),
        args=ViCuRConfig(
            output_dir=str(tmp_path / "output"),
            per_device_train_batch_size=4,
            max_steps=3,
            learning_rate=learning_rate,
            max_completion_length=8,
            generation_kwargs=generation_kwargs,
            use_vllm=True,
            vllm_max_model_length=512,
            logging_steps=1,
            report_to="none",
            bf16=False,
            use_cpu=True,
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=CueRecoveryConfig(layer_interval=1, **adapter),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    # Any other weights, prompts or image features would be off by far more
    assert [log["sampling/sampling_logp_difference/mean"] < bound for log in logs] == 3 * [True]
    assert all(abs(log["sampling/importance_sampling_ratio/mean"] - 1) < bound for log in logs)
    assert logs[-1]["cue_recovery/layers.1/update_ratio"] > 0

    # What is served after the last step
    llm, conversations = trainer.vllm_generation.llm, [user("What is this?", make_image(7)), user("Bye.")]
    before = generate(llm, checkpoint, conversations)
    trainer.vllm_generation.sync_weights()
    after = generate(llm, checkpoint, conversations)
    trainer.model.eval()
    assert_equals_transformers(after, checkpoint._replace(model=trainer.model), conversations)
    first_logprobs = [next(iter(outputs[0].outputs[0].logprobs[0].values())).logprob for outputs in (before, after)]
    assert abs(first_logprobs[0] - first_logprobs[1]) > 1e-3
