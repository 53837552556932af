"""Unquantized modules on a base quantized by bitsandbytes, with its kernels for CPUs."""

import math

import bitsandbytes
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tiny_models import make_qwen3_vl, randomize
from tiny_recovery_models import batch, logits
from tiny_trainers import make_config, make_rows, train_logs, weights
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from trl_vicur import CueRecoveryConfig, ViCuRTrainer


QUANTIZATIONS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
every_quantization = pytest.mark.parametrize("quantization_config", QUANTIZATIONS.values(), ids=QUANTIZATIONS)


@pytest.fixture(autouse=True)
def same_kernels_on_every_cpu(monkeypatch):
    """CPUs with AVX-512 use another kernel for 4-bit products with widths that are multiples of 32."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


@pytest.fixture(scope="module")
def base(tmp_path_factory, processor) -> str:
    folder = tmp_path_factory.mktemp("base")
    make_qwen3_vl(hidden_size=64).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def load(base: str, quantization_config: BitsAndBytesConfig):
    return AutoModelForImageTextToText.from_pretrained(
        base, quantization_config=quantization_config, dtype=torch.bfloat16, device_map="cpu"
    ).eval()


@every_quantization
def test_identity_at_birth_and_off_means_off(base, processor, quantization_config):
    model = load(base, quantization_config)
    inputs = batch(processor)
    expected = logits(model, inputs)
    model = get_peft_model(model, CueRecoveryConfig(layer_interval=1, r=2)).eval()
    assert torch.equal(logits(model, inputs), expected)
    assert not torch.equal(logits(randomize(model), inputs), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)


@pytest.mark.slow
@every_quantization
def test_training_saving_reloading_generating(tmp_path, base, processor, quantization_config):
    trainer = ViCuRTrainer(
        model=base,
        args=make_config(
            tmp_path,
            max_steps=3,
            max_completion_length=4,
            model_init_kwargs={"dtype": torch.bfloat16, "device_map": "cpu"},
        ),
        train_dataset=Dataset.from_list(make_rows(12)),
        processing_class=processor,
        quantization_config=quantization_config,
        peft_config=CueRecoveryConfig(layer_interval=1, r=2),
    )
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.bfloat16}
    before = weights(trainer.model)
    trainer.train()
    assert all(math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in train_logs(trainer))
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("sink_attention" in name for name in moved) and moved <= trained.keys()

    trainer.save_model(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(
        load(base, quantization_config), tmp_path / "adapter", autocast_adapter_dtype=False
    )
    for name, parameter in reloaded.named_parameters():
        if name in trained:
            parameter.data = parameter.data.to(torch.bfloat16)  # PEFT loads LoRA on int8 in float32
    inputs = batch(processor)
    assert torch.equal(logits(reloaded.eval(), inputs), logits(trainer.model.eval(), inputs))
    arguments = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(reloaded.generate(**inputs, **arguments), trainer.model.generate(**inputs, **arguments))


@every_quantization
def test_quantized_base_cannot_train(base, quantization_config):
    with pytest.raises(ValueError, match="`train_base=True`.* quantized weights cannot"):
        get_peft_model(load(base, quantization_config), CueRecoveryConfig(layer_interval=1, train_base=True))
