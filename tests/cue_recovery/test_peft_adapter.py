"""The method as an adapter of stock PEFT (invariant 8): saving, loading, several adapters, merging, train_base."""

import json
import re

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_families import make_qwen3_vl_moe
from tiny_models import encode, make_image, make_qwen2_5_vl, make_qwen3_vl, randomize, user
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from trl_vicur import CueRecoveryConfig
from trl_vicur.cue_recovery import CueRecoveryLayer


def attach(model, seed=1, **config):
    return randomize(get_peft_model(model, CueRecoveryConfig(layer_interval=1, **config)).eval(), seed)


@pytest.fixture
def inputs(processor):
    return encode(processor, [user("What is this?", make_image(0)), user("Hello.")])


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


# --- 8. One adapter ---


@pytest.mark.parametrize(
    "config",
    [{}, {"r": 4}, {"train_base": True}, {"r": 4, "lora_alpha": 1, "num_heads": 2}, {"bottleneck_size": 8}],
)
def test_invariant_8_saved_as_one_adapter_and_reloaded_bit_for_bit(tmp_path, inputs, config):
    model = attach(make_qwen3_vl(), **config)
    if config.get("train_base"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CUE_RECOVERY"
    reloaded = PeftModel.from_pretrained(make_qwen3_vl(), tmp_path)
    torch.testing.assert_close(logits(reloaded, inputs), expected, rtol=0, atol=0)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), CueRecoveryConfig)
    assert not any(parameter.requires_grad for parameter in reloaded.parameters())


@pytest.mark.parametrize("target_modules", [None, []], ids=["beside-linear-layers", "alone"])
def test_invariant_8_lora_on_parameters_of_experts(tmp_path, inputs, target_modules):
    """`target_parameters`: the experts' weights are not in linear layers."""
    options = {"target_modules": target_modules, "target_parameters": ["mlp.experts.gate_up_proj"]}
    model = attach(make_qwen3_vl_moe()[0], r=2, **options)
    kinds = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert kinds == {"experts"} | ({"q_proj", "k_proj", "v_proj", "o_proj"} if target_modules is None else set())
    model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(make_qwen3_vl_moe()[0], tmp_path)
    torch.testing.assert_close(logits(reloaded, inputs), logits(model, inputs), rtol=0, atol=0)


def test_invariant_8_file_contains_only_the_adapter(tmp_path):
    attach(make_qwen3_vl(), r=2).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    kinds = {re.sub(r".*\.(cue_recovery\.sink_attention|lora_[AB]).*", r"\1", name) for name in names}
    assert kinds == {"cue_recovery.sink_attention", "lora_A", "lora_B"}
    assert not any("default" in name for name in names)
    # Names of the backbone's layers are unchanged, so that other tools find them
    assert "base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_A.weight" in names


def test_train_base_saves_each_tied_weight_once(tmp_path):
    attach(make_qwen3_vl(), train_base=True).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert sum("embed_tokens" in name or "lm_head" in name for name in names) == 1


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_invariant_8_several_adapters_side_by_side(tmp_path, inputs, low_cpu_mem_usage):
    base = logits(make_qwen3_vl(), inputs)
    expected = {}
    configs = {"one": {"r": 2}, "two": {}, "three": {"r": 4, "num_heads": 2}}
    for seed, (name, config) in enumerate(configs.items()):
        model = attach(make_qwen3_vl(), seed=seed, **config)
        expected[name] = logits(model, inputs)
        model.save_pretrained(tmp_path / name)
    arguments = dict(low_cpu_mem_usage=low_cpu_mem_usage)
    model = PeftModel.from_pretrained(make_qwen3_vl(), tmp_path / "one", adapter_name="one", **arguments)
    model.load_adapter(tmp_path / "two", "two", **arguments)
    model.load_adapter(tmp_path / "three", "three", **arguments)
    for name in ("three", "one", "two", "one"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, inputs), expected[name], rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), base, rtol=0, atol=0)
    model.delete_adapter("one")
    model.set_adapter("three")
    torch.testing.assert_close(logits(model, inputs), expected["three"], rtol=0, atol=0)


def test_add_adapter_trains_the_active_one(inputs):
    model = attach(make_qwen3_vl())
    model.add_adapter("other", CueRecoveryConfig(layer_interval=2, r=2))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".default." in name for name in trainable)
    model.set_adapter("other")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".other." in name for name in trainable)
    assert any("layers.1.self_attn.q_proj.lora_A" in name for name in trainable)


# --- Merging and unloading ---


def test_merge_and_unload_merges_lora_and_keeps_the_module(inputs):
    model = attach(make_qwen3_vl(), r=4)
    expected = logits(model, inputs)
    with pytest.warns(UserWarning, match="cannot be merged into weights, so it stays"):
        merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(logits(merged, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The LoRA weights were merged")
@pytest.mark.parametrize("name", ["default", "other"])
@pytest.mark.parametrize("config", [{"r": 4, "sink_token": "<|im_start|>", "num_heads": 2}, {"train_base": True}])
def test_merged_model_is_saved_whole_and_loads_in_one_line(tmp_path, processor, inputs, config, name):
    """Stock transformers loads the backbone without unexpected weights, and stock PEFT loads the module."""
    config = CueRecoveryConfig(layer_interval=1, **config).resolve_sink_token(processor)
    model = randomize(get_peft_model(make_qwen3_vl(), config, adapter_name=name).eval())
    if config.train_base:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    expected = logits(model, inputs)
    merged = model.merge_and_unload()
    expected_of_merged = logits(merged, inputs)
    merged.save_pretrained(tmp_path)

    base, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    subfolder = "cue_recovery" if name == "default" else f"cue_recovery/{name}"
    reloaded = PeftModel.from_pretrained(base, tmp_path, subfolder=subfolder)
    torch.testing.assert_close(logits(reloaded, inputs), expected_of_merged, rtol=0, atol=0)
    torch.testing.assert_close(logits(reloaded, inputs), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="without its recovery module. Use `model.push_to_hub"):
        merged.save_pretrained(tmp_path, push_to_hub=True)


def test_merge_adapter_keeps_the_outputs(inputs):
    model = attach(make_qwen3_vl(), r=4)
    expected = logits(model, inputs)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("r", [0, 4])
def test_unload_returns_the_base_model(inputs, r):
    model = make_qwen3_vl()
    expected, names = logits(model, inputs), list(model.state_dict())
    unloaded = attach(model, r=r).unload()
    assert list(unloaded.state_dict()) == names
    assert not any(module._forward_pre_hooks for module in unloaded.modules())
    torch.testing.assert_close(logits(unloaded, inputs), expected, rtol=0, atol=0)
    # And it can be adapted again
    torch.testing.assert_close(logits(get_peft_model(unloaded, CueRecoveryConfig(layer_interval=2)), inputs), expected)


# --- Trainable parameters ---


def trainable_parts(model):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return {("module" if "sink_attention" in n else "lora" if "lora" in n else "base") for n in names}


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, {"module"}),
        ({"r": 2}, {"module", "lora"}),
        ({"train_base": True}, {"module", "base"}),
        ({"train_base": True, "r": 2}, {"module", "lora", "base"}),
    ],
)
def test_trainable_parameters(config, expected):
    model = attach(make_qwen3_vl(), **config)
    assert trainable_parts(model) == expected
    if "base" in expected:
        assert all(p.requires_grad for p in model.parameters())


def test_default_lora_is_on_all_linear_layers_of_the_decoder():
    model = attach(make_qwen2_5_vl(), r=2)
    targets = {name.rpartition(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    linear = {name for name, module in model.named_modules() if name.endswith("_proj") and "layers." in name}
    decoder = {name for name in linear if "language_model" in name and "sink_attention" not in name}
    assert targets == decoder and not any("visual" in name or "lm_head" in name for name in targets)


def test_lora_options_apply(tmp_path):
    model = attach(make_qwen3_vl(), r=4, target_modules=["q_proj"], lora_alpha=32, use_rslora=True)
    adapted = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj"}
    scaling = {m.scaling["default"] for m in model.modules() if isinstance(m, LoraLayer)}
    assert scaling == {16.0}


def test_module_follows_dtype_of_the_backbone(inputs):
    model = make_qwen3_vl().to(torch.bfloat16)
    model = get_peft_model(model, CueRecoveryConfig(layer_interval=1), autocast_adapter_dtype=False)
    layers = [module for module in model.modules() if isinstance(module, CueRecoveryLayer)]
    assert {p.dtype for layer in layers for p in layer.parameters()} == {torch.bfloat16}
    upcast = get_peft_model(make_qwen3_vl().to(torch.bfloat16), CueRecoveryConfig(layer_interval=1))
    layers = [module for module in upcast.modules() if isinstance(module, CueRecoveryLayer)]
    assert {p.dtype for layer in layers for p in layer.parameters()} == {torch.float32}  # PEFT's default
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    assert logits(randomize(upcast), inputs).isfinite().all()


def test_compiled_model_computes_the_same(processor):
    """Compiled like transformers' trainer does with `torch_compile=True`; a missing sink is still an error."""
    config = CueRecoveryConfig(layer_interval=1, r=2, sink_token="<|im_end|>").resolve_sink_token(processor)
    model = randomize(get_peft_model(make_qwen3_vl(num_layers=2), config)).eval()
    inputs = encode(processor, [user("What is this?", make_image(0)), user("Hello.")])
    results = []
    for call in (model, torch.compile(model, backend="eager")):
        model.zero_grad()
        output = call(**inputs).logits
        output.square().mean().backward()
        results.append([output, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    inputs["input_ids"][inputs["input_ids"] == config.sink_token_ids[0]] = 5
    with pytest.raises(ValueError, match=r"Row\(s\) \[0\] of the batch have an image, but not the sink token"):
        torch.compile(model, backend="eager")(**inputs)


# --- Bad input ---


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="`layer_interval` must be an integer of at least 1, got 0"):
        CueRecoveryConfig(layer_interval=0)
    with pytest.raises(ValueError, match="`num_heads` must be an integer of at least 1, got -2"):
        CueRecoveryConfig(num_heads=-2)
    with pytest.raises(ValueError, match="`r` must be 0"):
        CueRecoveryConfig(r=-1)
    with pytest.raises(ValueError, match="`sink_token` must be"):
        CueRecoveryConfig(sink_token="")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"layer_interval": 5}, r"`layer_interval` is 5, but the model has only 4 decoder layer\(s\)"),
        (
            {"layer_interval": 1, "num_heads": 5},
            "`num_heads` must divide the hidden size, got 5 heads for 32",
        ),
        (
            {"layer_interval": 1, "sink_token": "<|im_end|>"},
            r"has not been looked up in the tokenizer. Call `config.resolve_sink_token",
        ),
    ],
)
def test_configs_that_do_not_fit_the_model_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make_qwen3_vl(), CueRecoveryConfig(**config))


def test_unknown_sink_token_is_refused(processor):
    with pytest.raises(ValueError, match=r"got '<\|im_begin\|>', which the tokenizer does not know.*<\|im_start\|>"):
        CueRecoveryConfig(sink_token="<|im_begin|>").resolve_sink_token(processor)


def test_adapter_with_the_assistant_sink_is_refused(tmp_path, processor):
    model = get_peft_model(make_qwen3_vl(), CueRecoveryConfig(layer_interval=1))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = {**json.loads(path.read_text()), "sink_token": "assistant", "sink_token_ids": [1, 2, 3]}
    path.write_text(json.dumps({**saved, "sink_token_offset": 2}))
    with pytest.raises(ValueError, match="`sink_token='assistant'`.* is no longer an option.* Use 'first' and train"):
        PeftModel.from_pretrained(make_qwen3_vl(), tmp_path)


def test_text_model_without_visual_tokens_is_refused():
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM has neither `image_token_id` nor `video_token_id`"):
        get_peft_model(LlamaForCausalLM(config), CueRecoveryConfig(layer_interval=1))


@pytest.mark.parametrize("other, sizes", [({"hidden_size": 64}, (32, 64)), ({"num_layers": 6}, (4, 6))])
def test_adapter_for_another_model_size_is_refused(tmp_path, other, sizes):
    attach(make_qwen3_vl()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"made for a model with `.*` {sizes[0]}, but .* has `.*` {sizes[1]}"):
        PeftModel.from_pretrained(make_qwen3_vl(**other), tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapter_with_nonfinite_weights_is_refused(tmp_path, value):
    model = attach(make_qwen3_vl())
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "o_proj" in name and "sink_attention" in name)[0, :2] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="2 of the 1024 values to be loaded for '.*sink_attention.*o_proj.*' are NaN"):
        PeftModel.from_pretrained(make_qwen3_vl(), tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"r": 4}, r"lacks \d+ weight\(s\), among them '.*lora_A"),
        ({"train_base": True}, "lacks .*embed_tokens.weight'"),
        ({"layer_interval": 2}, "unexpectedly has .*sink_attention"),
        ({}, "lacks 1 weight.*q_proj.weight'"),
    ],
    ids=["rank", "train_base", "layers", "weight-lost"],
)
def test_adapter_weights_that_do_not_match_its_config_are_refused(tmp_path, config, message):
    attach(make_qwen3_vl()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    if not config:
        weights = load_file(tmp_path / "adapter_model.safetensors")
        del weights[next(name for name in weights if "q_proj" in name)]
        save_file(weights, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"The adapter 'default' {message}"):
        PeftModel.from_pretrained(make_qwen3_vl(), tmp_path)


def test_train_base_must_be_the_only_adapter():
    model = attach(make_qwen3_vl(), train_base=True)
    with pytest.raises(ValueError, match="Adapter 'default' has `train_base=True`.*must be the model's only adapter"):
        model.add_adapter("other", CueRecoveryConfig(layer_interval=1))


def test_unsupported_peft_features_are_refused(inputs):
    model = attach(make_qwen3_vl())
    with pytest.raises(NotImplementedError, match="adapter per sample"):
        model(**inputs, adapter_names=["default", "__base__"])
    with pytest.raises(NotImplementedError, match="cannot be averaged"):
        model.add_weighted_adapter(["default"], [1.0], "mean")


def test_plain_lora_is_unaffected(inputs):
    model = make_qwen3_vl()
    expected = logits(model, inputs)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    torch.testing.assert_close(logits(model, inputs), expected)
