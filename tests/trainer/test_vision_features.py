"""No image is encoded twice if its features would be the same, and sharing them changes nothing."""

import weakref

import pytest
import torch
from tiny_models import make_qwen2_5_vl, make_qwen3_vl
from tiny_trainers import ADAPTER, count_encoded_images, make_trainer, train_logs, weights
from transformers import TrainerCallback
from transformers.modeling_outputs import BaseModelOutputWithPooling

from trl_vicur import CueRecoveryConfig
from trl_vicur.trainer.vision.features import get_backbone, is_vision_frozen, split_by_sample


def recovery(**arguments) -> CueRecoveryConfig:
    return CueRecoveryConfig(**ADAPTER, **arguments)


def vision_lora() -> CueRecoveryConfig:
    return recovery(r=4, target_modules=r".*visual.*(qkv|q_proj)")


def num_images(trainer) -> int:
    """Number of images in the generation batches of a run over the whole dataset, each batch counted once."""
    return sum(len(row["images"]) for row in trainer.train_dataset)


@pytest.mark.parametrize(
    ("peft_config", "arguments", "expected"),
    [
        (recovery, {}, 1),
        (lambda: recovery(r=4), {}, 1),
        (recovery, dict(teacher_model_kind="live"), 1),
        (lambda: recovery(r=4), dict(teacher_model_kind="ema"), 1),
        (recovery, dict(num_iterations=2, max_steps=4), 1),
        (recovery, dict(gradient_checkpointing=True), 1),
        (recovery, dict(share_vision_features="never"), 3),
        # The tower trains: the student encodes images itself, and only a live teacher has the rollout's weights
        (lambda: recovery(train_base=True), dict(teacher_model_kind="live"), 2),
        (lambda: recovery(train_base=True), dict(teacher_model_kind="ema"), 3),
        (vision_lora, {}, 3),
        (vision_lora, dict(teacher_model_kind="live"), 2),
        # A frozen copy with its own tower teaches
        (lambda: recovery(train_base=True), {}, 2),
    ],
)
def test_number_of_encodings_per_image(tmp_path, processor, peft_config, arguments, expected):
    trainer = make_trainer(tmp_path, processor, peft_config=peft_config(), **arguments)
    with count_encoded_images(trainer.model) as images:
        trainer.train()
    assert images.count == expected * num_images(trainer)


def test_encodings_with_a_stronger_teacher(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, peft_config=recovery(), teacher_model=make_qwen3_vl(seed=5))
    with count_encoded_images(trainer.model) as of_student, count_encoded_images(trainer.teacher_model) as of_teacher:
        trainer.train()
    assert of_student.count == of_teacher.count == num_images(trainer)


@pytest.mark.parametrize("arguments", [{}, dict(num_iterations=2, max_steps=4)])
def test_sharing_is_exact_under_bf16(tmp_path, processor, arguments):
    """Rollout and losses encode in the same precision: identical features if both encode as many images at once."""
    runs = []
    for share in ("auto", "never"):
        trainer = make_trainer(
            tmp_path,
            processor,
            peft_config=recovery(r=4),
            bf16=True,
            gradient_accumulation_steps=1,
            share_vision_features=share,
            **arguments,
        )
        trainer.train()
        runs.append(weights(trainer.model))
    torch.testing.assert_close(*runs, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("peft_config", "arguments"),
    [
        (lambda: recovery(r=4), {}),
        (recovery, dict(num_iterations=2, max_steps=4, distillation_mode="full_logits")),
        (lambda: recovery(train_base=True), dict(teacher_model_kind="live", privilege="cue")),
    ],
)
def test_sharing_changes_nothing(tmp_path, family, peft_config, arguments):
    """
    Rows with none, one and two images, shuffled and split into micro-batches.

    In float64: encoding more images at once may round differently, and Adam amplifies the smallest gradient.
    """
    model, processor = family
    make_model = make_qwen3_vl if model.config.model_type == "qwen3_vl" else make_qwen2_5_vl
    runs = []
    for share in ("auto", "never"):
        trainer = make_trainer(
            tmp_path,
            processor,
            model=make_model().double(),
            peft_config=peft_config(),
            share_vision_features=share,
            **arguments,
        )
        trainer.train()
        runs.append((train_logs(trainer), weights(trainer.model)))
    (shared_logs, shared_weights), (logs, expected_weights) = runs
    for shared_log, log in zip(shared_logs, logs, strict=True):
        for name in ("loss", "grad_norm", "entropy", "logprob_gap/mean"):
            assert shared_log[name] == pytest.approx(log[name], rel=1e-4, abs=1e-6), name
    torch.testing.assert_close(shared_weights, expected_weights, rtol=1e-4, atol=1e-6)


def test_evaluation_encodes_once(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, peft_config=recovery())
    trainer.eval_dataset = trainer.train_dataset
    with count_encoded_images(trainer.model) as images:
        trainer.evaluate()
    assert images.count == num_images(trainer)


def test_loss_before_the_first_rollout(tmp_path, processor):
    """Whether features can be shared is decided when the trainer is built."""
    losses = []
    for _ in range(2):
        trainer = make_trainer(tmp_path, processor, peft_config=recovery())
        trainer.model.train()
        if not losses:
            inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
            inputs = {key: value for key, value in inputs.items() if not key.endswith("_features")}
        losses.append(trainer.compute_loss(trainer.model, dict(inputs)))
    assert losses[0] == losses[1]


def test_features_of_one_generation_batch_are_kept_at_a_time(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, peft_config=recovery())
    kept = []

    class Note(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            samples = [sample for batch in trainer._buffered_inputs for sample in batch["image_features"]]
            kept.append([weakref.ref(sample["pooler_output"][0]) for sample in samples])

    trainer.add_callback(Note())
    trainer.train()
    assert [[sample() is not None for sample in samples] for samples in kept] == [[False] * 4, [True] * 4]
    # And the model is unchanged
    assert "get_image_features" not in vars(get_backbone(trainer.model))


def test_frozen_means_untrained_and_outside_any_adapter():
    model = make_qwen3_vl()
    assert not is_vision_frozen(model)
    get_backbone(model).visual.requires_grad_(False)
    assert is_vision_frozen(model)
    get_backbone(model).visual.merger.requires_grad_(True)
    assert not is_vision_frozen(model)


def test_features_are_split_by_visual_tokens():
    """Whatever a model returns: one tensor per image, also of different or zero sizes, or one for all images."""
    features = torch.randn(6, 8)
    num_tokens = [2, 0, 4]
    expected = features.split(num_tokens)
    for sequence in (features.split([2, 1, 3]), list(features.split([2, 4])), [features[:0], features]):
        samples = split_by_sample(BaseModelOutputWithPooling(pooler_output=sequence), num_tokens)
        assert all(torch.equal(torch.cat(s["pooler_output"]), e) for s, e in zip(samples, expected, strict=True))
    samples = split_by_sample(BaseModelOutputWithPooling(pooler_output=features.view(3, 2, 8)), num_tokens)
    assert all(torch.equal(s["pooler_output"], e) for s, e in zip(samples, expected, strict=True))


def test_model_without_a_feature_per_visual_token_encodes_each_time():
    assert split_by_sample(BaseModelOutputWithPooling(pooler_output=torch.zeros(3, 4, 8)), [4, 0, 9]) is None
    assert split_by_sample(BaseModelOutputWithPooling(), [4, 0, 8]) is None
