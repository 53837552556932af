"""Every tensor of an adapter is served as trained, or the engine refuses it by name."""

import json
from pathlib import Path

import pytest
import torch
from engines import (
    HEAD_DIM,
    MROPE,
    Checkpoint,
    assert_equals_transformers,
    engine,
    generate,
    make_checkpoint,
    runner,
)
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import make_image, make_processor, make_qwen3_vl, user
from vllm import LLM, _custom_ops

from trl_vicur import CueRecoveryConfig
from trl_vicur.vllm import engine_config


CONVERSATIONS = [user("What is this?", make_image(0)), user("Hello.")]
DECODER_LAYER = "base_model.model.model.language_model.layers.1."


def make_model(tie_word_embeddings: bool):
    rope = {**MROPE, "mrope_interleaved": True}
    model = make_qwen3_vl(hidden_size=64, head_dim=HEAD_DIM, rope_parameters=rope)
    if not tie_word_embeddings:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    return model


def train(checkpoint: Checkpoint, adapter: Path, tie_word_embeddings: bool = False, **config) -> Checkpoint:
    """An adapter of the base with every trainable weight changed."""
    model = make_model(tie_word_embeddings)
    model.name_or_path = str(checkpoint.base)
    model = get_peft_model(model, CueRecoveryConfig(layer_interval=1, **config)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(adapter)
    return checkpoint._replace(adapter=adapter, model=model)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make_checkpoint(
        tmp_path_factory.mktemp("untied"), make_model(tie_word_embeddings=False), make_processor(), embedding_scale=1
    )


@pytest.fixture(scope="module")
def llm(untied):
    with pytest.MonkeyPatch.context() as patch:
        # oneDNN keeps copies of the weights that do not follow a later load
        patch.setattr(_custom_ops, "_supports_onednn", False)
        with engine(untied, untied.adapter) as llm:
            yield llm


def load(llm: LLM, base: Path, adapter: Path) -> None:
    """Load base and adapter into the running engine, as at startup."""
    config = CueRecoveryConfig.from_pretrained(adapter)
    engine_config._check_adapter_options(config, str(adapter))
    model = runner(llm).get_model()
    model._adapter, model._recovery_config = str(adapter), config
    files = [base / "model.safetensors", adapter / "adapter_model.safetensors"]
    model.load_weights([item for file in files for item in load_file(file).items()])
    llm.llm_engine.reset_encoder_cache()


@pytest.mark.parametrize(
    "config",
    [
        dict(r=4, target_modules=["q_proj", "down_proj"]),
        dict(r=4, target_modules=r".*visual.*\.(linear_fc1|qkv)", use_rslora=True),
        dict(
            r=4,
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"layers.1.self_attn.q_proj": 2, "v_proj": 8},
            alpha_pattern={r"layers\.[12]\.self_attn\.q_proj": 32},
            use_rslora=True,
        ),
        dict(r=4, target_modules=["embed_tokens", "lm_head", "q_proj"]),
        dict(r=4, target_modules=["q_proj"], init_lora_weights="orthogonal"),
        dict(r=4, target_modules=["q_proj"], bias="all"),
        dict(r=4, target_modules=["qkv"], bias="lora_only"),
        dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "merger"]),
        dict(modules_to_save=["embed_tokens"]),
        dict(train_base=True),
        dict(train_base=True, r=4, target_modules=["q_proj", "embed_tokens"]),
    ],
    ids=lambda config: " ".join(config),
)
def test_adapters_are_served_as_trained(llm, untied, tmp_path, config):
    trained = train(untied, tmp_path / "adapter", **config)
    load(llm, untied.base, trained.adapter)
    assert_equals_transformers(generate(llm, untied, CONVERSATIONS), trained, CONVERSATIONS)


@pytest.mark.parametrize(
    "config",
    [
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights="olora"),
        dict(use_dora=True),
        dict(lora_bias=True, target_modules=["qkv"]),
        dict(trainable_token_indices=[3, 4]),
        dict(target_parameters=["mlp.gate_proj.weight"]),
    ],
    ids=lambda config: next(iter(config)),
)
def test_unsupported_adapter_is_refused_by_name_until_peft_merges_it(llm, untied, tmp_path, config):
    trained = train(untied, tmp_path / "adapter", **{"r": 4, "target_modules": ["q_proj"], **config})
    name = next(iter(config))
    with pytest.raises(ValueError, match=f"was trained with {name}=.* Merge it with PEFT"):
        load(llm, untied.base, trained.adapter)

    merged = trained.model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    load(llm, tmp_path / "merged", tmp_path / "merged" / "cue_recovery")
    assert_equals_transformers(generate(llm, untied, CONVERSATIONS), trained._replace(model=merged), CONVERSATIONS)


def rewrite(adapter: Path, change, **config) -> None:
    """Change an adapter's tensors and its config."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            lambda tensors: tensors.update({f"{DECODER_LAYER}extra": torch.ones(2)}),
            {},
            "extra', which vLLM cannot serve",
        ),
        (
            lambda tensors: tensors.update({f"{DECODER_LAYER}self_attn.q_proj.lora_new": torch.ones(2)}),
            {},
            "lora_new', which vLLM cannot serve",
        ),
        (lambda tensors: None, {"r": 0}, "lora_A.weight', which vLLM cannot serve as it was trained: .* `r=0`"),
        (
            lambda tensors: tensors.pop(f"{DECODER_LAYER}cue_recovery.sink_attention.o_proj.weight"),
            {},
            "among them 'language_model.model.layers.1.cue_recovery.sink_attention.o_proj.weight'",
        ),
        (lambda tensors: None, {"train_base": True}, "lacks .* of the backbone, among them"),
        (
            lambda tensors: tensors.update({f"{DECODER_LAYER}self_attn.q_proj.lora_A.weight": torch.ones(4, 32)}),
            {},
            r"LoRA update of shape \(256, 32\) for language_model.model.layers.1.self_attn.q_proj.weight",
        ),
    ],
    ids=["unknown tensor", "unknown LoRA", "r", "module lacks a weight", "train_base", "shape"],
)
def test_unknown_tensor_is_refused_by_name(llm, untied, tmp_path, change, config, message):
    trained = train(untied, tmp_path / "adapter", r=4, target_modules=["q_proj"])
    rewrite(trained.adapter, change, **config)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load(llm, untied.base, trained.adapter)


@pytest.mark.parametrize(
    "config",
    [
        dict(r=4, target_modules=["embed_tokens"]),
        dict(r=4, target_modules=["lm_head"]),
        dict(modules_to_save=["lm_head"]),
    ],
    ids=["embed_tokens", "lm_head", "modules_to_save"],
)
def test_embeddings_and_head_that_vllm_ties_are_refused(tmp_path, config):
    base = make_checkpoint(tmp_path, make_model(tie_word_embeddings=True), make_processor(), embedding_scale=1)
    trained = train(base, tmp_path / "trained", tie_word_embeddings=True, **config)
    with (
        pytest.raises(ValueError, match="which vLLM cannot serve as it was trained: embeddings and head are one"),
        engine(trained, trained.adapter),
    ):
        pass
