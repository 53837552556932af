"""Invariant 13: the module runs where its weights are, under device maps and offload."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import PeftModel, get_peft_model
from tiny_models import make_qwen3_vl, randomize
from tiny_recovery_models import attach, batch, logits, recovery_layers

from trl_vicur import CueRecoveryConfig
from trl_vicur.cue_recovery import CueRecoveryContext, CueRecoveryLayer, record_update_ratios, sink_attention


@pytest.fixture
def unsplit(processor):
    model = randomize(attach(make_qwen3_vl(), processor))
    inputs = batch(processor)
    return model, inputs, logits(model, inputs)


def device_map(prefix: str, offloaded: str) -> dict[str, str]:
    """The second half of the decoder layers is offloaded, everything else is on the CPU."""
    layers = {f"language_model.layers.{i}": "cpu" if i < 2 else offloaded for i in range(4)}
    others = ("visual", "language_model.embed_tokens", "language_model.norm", "language_model.rotary_emb")
    named = {f"model.{name}": device for name, device in {**dict.fromkeys(others, "cpu"), **layers}.items()}
    return {prefix + name: device for name, device in {**named, "lm_head": "cpu"}.items()}


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_invariant_13_module_runs_where_its_weights_are_under_offload(tmp_path, unsplit, offload):
    model, inputs, expected = unsplit
    attended = sink_attention(model, **inputs)
    if offload == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, tmp_path, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    with record_update_ratios(model) as ratios:
        torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    torch.testing.assert_close(sink_attention(model, **inputs), attended, rtol=0, atol=0)
    assert ratios.keys() == attended.keys()
    assert all(parameter.is_meta for parameter in model.parameters())


def test_invariant_13_module_runs_where_its_weights_are_when_partly_offloaded(tmp_path, unsplit):
    model, inputs, expected = unsplit
    split = device_map("base_model.model.", "disk")
    dispatch_model(model, split, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert [next(layer.parameters()).is_meta for layer in recovery_layers(model)] == [False, True, True]
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)


def test_invariant_13_adapter_is_not_loaded_onto_layers_on_disk(tmp_path, unsplit):
    """For layers on disk, PEFT writes LoRA's weights to disk and drops those of any other method."""
    model, _, _ = unsplit
    model.save_pretrained(tmp_path / "adapter")
    base = model.unload()
    base.save_pretrained(tmp_path / "base")
    folders = {"offload_folder": str(tmp_path / "offload")}
    split = type(base).from_pretrained(tmp_path / "base", device_map=device_map("", "disk"), **folders)
    with pytest.raises(ValueError, match="layers.2 is offloaded to disk"):
        PeftModel.from_pretrained(
            split, tmp_path / "adapter", device_map=device_map("base_model.model.", "disk"), **folders
        )


def test_invariant_13_new_module_on_an_offloaded_model_keeps_its_weights(processor):
    inputs = batch(processor)
    base = make_qwen3_vl()
    expected = logits(base, inputs)
    cpu_offload(base, execution_device="cpu")
    model = get_peft_model(base, CueRecoveryConfig(layer_interval=1)).eval()
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    randomize(model)
    assert not torch.equal(logits(model, inputs), expected)


def test_invariant_13_module_runs_before_inputs_are_moved():
    """accelerate moves a decoder layer's inputs after the module has run. "meta" is the other device here."""
    decoder_layer = torch.nn.Linear(8, 8).to("meta")
    add_hook_to_module(decoder_layer, AlignDevicesHook(execution_device="meta", io_same_device=False))
    decoder_layer.cue_recovery = layer = CueRecoveryLayer(decoder_layer)
    layer.update_layer("default", CueRecoveryConfig(), hidden_size=8, num_heads=2, eps=1e-6)
    context = CueRecoveryContext(torch.tensor([[False, True]]), {"default": torch.tensor([0])})
    for device in ("cpu", "meta"):
        layer.to_empty(device=device)
        output = layer(torch.randn(1, 2, 8), context)
        assert output.device.type == device and output.shape == (1, 2, 8)
