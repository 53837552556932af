"""Every vision-language family that TRL's DistillationTrainer trains, with cue recovery."""

import math

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from tiny_families import FAMILIES, HIDDEN, each_of
from tiny_models import encode, make_image, randomize, user
from tiny_recovery_models import batch, conversations, logits
from tiny_trainers import logprobs_alone, make_config, make_rows, make_trainer, row_of, train_logs, weights
from torch import nn
from transformers import (
    Llama4Config,
    Llama4ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    PreTrainedConfig,
    Qwen3VLTextModel,
)

from trl_vicur import CueRecoveryConfig
from trl_vicur.cue_recovery import CueRecoveryContext, CueRecoveryLayer
from trl_vicur.cue_recovery.positions import last_reading_layer
from trl_vicur.trainer.checks.rows import RowChecker
from trl_vicur.trainer.lm_head import LMHead
from trl_vicur.trainer.losses import token_logprobs
from trl_vicur.trainer.vision.blank_image import BlankImageRow
from trl_vicur.trainer.vision.features import record_features, split_by_sample


every_family = each_of(FAMILIES)


def rows_for(family: str, count: int, share: str) -> list[dict]:
    """Rows with one, two and no images."""
    rows = make_rows(count)
    if family == "llava_onevision" and share == "never":
        # See test_llava_onevision_needs_shared_features_for_several_images
        rows = [{**row, "images": row["images"][:1]} for row in rows]
    return rows


def attach(model, **config):
    return get_peft_model(model, CueRecoveryConfig(layer_interval=1, **config)).eval()


@every_family
def test_identity_at_birth_and_off_means_off(family):
    model, processor = FAMILIES[family]()
    inputs = batch(processor)
    expected = logits(model, inputs)
    model = attach(model, r=2)
    assert torch.equal(logits(model, inputs), expected)
    randomize(model)
    changed = (logits(model, inputs) != expected).flatten(1).any(dim=1)
    assert changed.tolist() == [True, True, True]  # LoRA also changes the text
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)


@every_family
def test_module_changes_only_samples_with_images(family):
    model, processor = FAMILIES[family]()
    inputs = batch(processor)
    expected = logits(model, inputs)
    changed = (logits(randomize(attach(model)), inputs) != expected)[:, -1].any(dim=1)
    assert changed.tolist() == [True, True, False]


@every_family
def test_each_sample_alone(family):
    model, processor = FAMILIES[family]()
    model = randomize(attach(model))
    together = logits(model, batch(processor))
    for conversation, padded in zip(conversations(), together, strict=True):
        alone = logits(model, encode(processor, [conversation]))[0]
        torch.testing.assert_close(padded[-len(alone) :], alone, rtol=1e-3, atol=1e-4)


@every_family
def test_cache_and_no_cache_agree(family):
    model, processor = FAMILIES[family]()
    model = randomize(attach(model))
    inputs = batch(processor)
    arguments = dict(max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    cached = model.generate(**inputs, **arguments, use_cache=True)
    uncached = model.generate(**inputs, **arguments, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@every_family
def test_every_trainable_parameter_gets_a_gradient(family):
    model, processor = FAMILIES[family]()
    model = randomize(attach(model))
    model(**batch(processor)).logits[:, -1].square().mean().backward()
    without = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert without == []


@every_family
def test_training_saving_reloading_generating(tmp_path, family):
    """Three steps over rows with one, two and no images."""
    model, processor = FAMILIES[family]()
    trainer = make_trainer(
        tmp_path,
        processor,
        model=model,
        rows=make_rows(12),
        peft_config=CueRecoveryConfig(layer_interval=1, r=2),
        max_steps=3,
        max_completion_length=4,
    )
    before = weights(trainer.model)
    trainer.train()
    assert len(train_logs(trainer)) == 3
    assert all(math.isfinite(log["loss"]) and log["grad_norm"] > 0 for log in train_logs(trainer))
    after = weights(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert any("sink_attention" in name for name in moved)
    assert all("sink_attention" in name or "lora" in name for name in moved)

    trainer.save_model(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(FAMILIES[family]()[0], tmp_path / "adapter").eval()
    inputs = batch(processor)
    assert torch.equal(logits(reloaded, inputs), logits(trainer.model.eval(), inputs))
    arguments = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(reloaded.generate(**inputs, **arguments), trainer.model.generate(**inputs, **arguments))


@every_family
@pytest.mark.parametrize("share", ["auto", "never"])
def test_teacher_and_student_score_the_same_tokens(tmp_path, family, share):
    """
    The trainer's scores in shuffled, split batches equal those of each row alone (invariant 9), with and without
    shared image features.
    """
    model, processor = FAMILIES[family]()
    trainer = make_trainer(
        tmp_path,
        processor,
        model=model,
        rows=rows_for(family, 8, share),
        peft_config=CueRecoveryConfig(layer_interval=1),
        max_completion_length=4,
        gradient_accumulation_steps=4,
        share_vision_features=share,
    )
    randomize(trainer.model)
    rows = [trainer.train_dataset[i] for i in range(8)]
    trainer.model.train()
    trainer._prepare_inputs(rows)
    for inputs in trainer._buffered_inputs:
        mask = inputs["completion_mask"].bool()
        with torch.no_grad():
            student_states = trainer._student_hidden_states(trainer.model, inputs)
            scores = trainer.teacher.score(trainer.model, inputs)
        for index in range(len(mask)):
            completion = inputs["completion_ids"][index][mask[index]]
            row = row_of(inputs["prompt_ids"][index], rows, processor)
            student, _ = token_logprobs(student_states[index][mask[index]], LMHead.from_model(model), completion)
            teacher, _ = token_logprobs(scores.states[index][mask[index]], scores.head, completion)
            alone = logprobs_alone(trainer.model, processor, row, None, completion)
            torch.testing.assert_close(student, alone, rtol=1e-3, atol=1e-4)
            with trainer.model.disable_adapter():
                alone = logprobs_alone(trainer.model, processor, row, row["cue"], completion)
            torch.testing.assert_close(teacher, alone, rtol=1e-3, atol=1e-4)


@every_family
def test_losses_use_the_logits_of_the_model(family):
    """Invariant 9: head scale, soft-cap, bias and temperature are the model's, wherever its configs define them."""
    model, processor = FAMILIES[family]()
    model.lm_head.bias = nn.Parameter(torch.randn(model.lm_head.out_features))
    inputs = batch(processor)
    with torch.no_grad():
        states = model.base_model(**inputs).last_hidden_state
    head = LMHead.from_model(attach(model, r=2))
    torch.testing.assert_close(head.logits(states, temperature=0.7), logits(model, inputs) / 0.7)


@every_family
@pytest.mark.parametrize("size", [(64, 64), (32, 64), (200, 40)])
def test_images_are_counted_before_training(tmp_path, family, size):
    """The count includes surrounding tokens if the processor cannot count visual ones alone; it is never too low."""
    model, processor = FAMILIES[family]()
    counted = RowChecker(make_config(tmp_path), processor, max_length=2048)._num_image_tokens((size,))
    input_ids = encode(processor, [user("", make_image(0, size))])["input_ids"]
    assert (input_ids == model.config.image_token_id).sum() <= counted <= input_ids.numel()


@every_family
def test_row_with_a_blank_image_changes_no_other_row(family):
    """A rank whose rows are all text adds this row when other ranks have images."""
    model, processor = FAMILIES[family]()
    model = randomize(attach(model))
    inputs = encode(processor, [user("What is this?"), user("And what may that be?")])
    expected = logits(model, inputs)
    blank = BlankImageRow(processor, model.config.image_token_id, {})
    texts = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    input_ids, attention_mask, others = blank.add_to_batch(inputs["input_ids"], inputs["attention_mask"], texts)
    with record_features(model) as recorded:
        together = logits(model, {"input_ids": input_ids, "attention_mask": attention_mask, **others})
    torch.testing.assert_close(together[:-1, -expected.shape[1] :], expected, rtol=1e-3, atol=1e-4)
    (features,) = recorded["image"]
    # Before 5.18, transformers returns no feature per visual token for these, so they are not shared
    is_unknown = family in ("gemma4", "idefics3", "smolvlm") and Version(transformers.__version__) < Version("5.18")
    assert (split_by_sample(features, [0, 0, blank.num_image_tokens]) is None) == is_unknown


# --- Unsupported models are refused by name ---


def test_too_long_prompt_is_refused_if_the_processor_cannot_count(tmp_path):
    model, processor = FAMILIES["smolvlm"]()
    model.config.text_config.max_position_embeddings = 120
    with pytest.raises(ValueError, match=r"Row 1 of train_dataset: .* exceeds the model's context of 120 tokens"):
        make_trainer(
            tmp_path, processor, model=model, rows=[{**make_rows(4)[i], "cue": "a" * 20} for i in (2, 0, 2, 2)]
        )


def test_llava_onevision_needs_shared_features_for_several_images(tmp_path):
    """LLaVA-OneVision encodes several images of a row differently, but TRL does not pass their number."""
    model, processor = FAMILIES["llava_onevision"]()
    trainer = make_trainer(
        tmp_path,
        processor,
        model=model,
        peft_config=CueRecoveryConfig(layer_interval=1),
        share_vision_features="never",
    )
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        trainer.train()


def test_models_with_images_outside_the_decoder_are_refused():
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(
            MllamaConfig(
                text_config={**HIDDEN, "vocab_size": 64, "cross_attention_layers": [1], "pad_token_id": 0},
                vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "image_size": 28},
                image_token_index=60,
            )
        )
    with pytest.raises(ValueError, match="MllamaForConditionalGeneration keeps it outside"):
        get_peft_model(model, CueRecoveryConfig(layer_interval=1))


def test_decoder_without_layers_is_refused():
    with torch.device("meta"):
        model = Llama4ForConditionalGeneration(
            Llama4Config(
                text_config={**HIDDEN, "vocab_size": 64, "num_local_experts": 2, "pad_token_id": 0},
                vision_config={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
                image_token_index=60,
            )
        )
    with pytest.raises(ValueError, match="but Llama4ForCausalLM of Llama4ForConditionalGeneration has no such layers"):
        attach(model)


class NoKeywords(Qwen3VLTextModel):
    def forward(self, inputs_embeds, attention_mask, position_ids):
        return super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids)


class KeywordsAreDropped(Qwen3VLTextModel):
    def forward(self, *args, cue_recovery_context=None, **kwargs):
        return super().forward(*args, **kwargs)


def test_decoder_without_keyword_arguments_is_refused():
    model, _ = FAMILIES["qwen3_vl"]()
    model.get_decoder().__class__ = NoKeywords
    with pytest.raises(ValueError, match="but NoKeywords of Qwen3VLForConditionalGeneration has no such layers"):
        attach(model)


def test_decoder_that_drops_keyword_arguments_is_refused_at_the_first_call():
    model, processor = FAMILIES["qwen3_vl"]()
    inputs = batch(processor)
    expected = logits(model, inputs)
    model.get_decoder().__class__ = KeywordsAreDropped
    model = attach(model)
    with pytest.raises(ValueError, match="Qwen3VLModel does not pass its keyword arguments on to its decoder layers"):
        model(**inputs)
    with pytest.raises(ValueError, match="This model family is not supported"):
        model.generate(**inputs, max_new_tokens=1)
    with model.disable_adapter():
        assert torch.equal(logits(model, inputs), expected)
    assert torch.equal(logits(model.unload(), inputs), expected)


def test_parallel_streams_of_hidden_states_are_refused():
    """Gemma 3n's decoder layers receive four."""
    layer = CueRecoveryLayer(nn.Linear(8, 8))
    context = CueRecoveryContext(torch.ones(2, 3, dtype=torch.bool), {"default": torch.zeros(2, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"has the shape \(4, 2, 3, 8\), but `input_ids` has \(2, 3\)"):
        layer(torch.zeros(4, 2, 3, 8), context)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, 5),
        ({"layer_types": ["sliding_attention"] * 6}, 5),  # all layers have a window
        ({"layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"] * 2}, 3),
        ({"layer_types": ["conv", "conv", "full_attention"] + ["conv"] * 3}, 2),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 3}, 1),
        ({"layer_types": ["linear_attention"] * 6}, 5),
    ],
)
def test_no_module_after_last_global_attention_layer(settings, expected):
    config = PreTrainedConfig()
    config.update({"num_hidden_layers": 6, **settings})
    assert last_reading_layer(config) == expected
