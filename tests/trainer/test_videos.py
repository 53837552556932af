"""Rows with videos are trained, scored and completed like rows with images, or refused by number."""

import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from image_files import encoded
from peft import PeftModel
from tiny_families import FAMILIES, each_of
from tiny_models import encode, make_image, randomize, with_completion
from tiny_recovery_models import logits
from tiny_trainers import count_encoded_images, make_config, make_trainer, row_of, train_logs, weights

from trl_vicur import CueRecoveryConfig
from trl_vicur.cue_recovery import sink_attention
from trl_vicur.data.images import read_video
from trl_vicur.trainer.checks.rows import RowChecker
from trl_vicur.trainer.lm_head import LMHead
from trl_vicur.trainer.losses import token_logprobs


VIDEO_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
every_family = each_of(VIDEO_FAMILIES)


def make_video(seed: int, num_frames: int = 8, size: tuple[int, int] = (64, 64)) -> list:
    return [make_image(1000 * seed + i, size) for i in range(num_frames)]


def make_rows(count: int) -> list[dict]:
    """In turn a video, an image, both, nothing, and two videos."""
    rows = []
    for i in range(count):
        videos = {0: [make_video(i, 8 + i)], 2: [make_video(i, 6, (96, 64))], 4: [make_video(i), make_video(i + 1, 7)]}
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"What happens in scene {i}?" + "?" * i}],
                "images": [make_image(i)] if i % 5 in (1, 2) else [],
                "videos": videos.get(i % 5, []),
                "cue": f"noise number {i}",
            }
        )
    return rows


def conversation(row: dict, hint: str | None = None) -> list[dict]:
    """The inputs of one row, written out by hand."""
    text = row["prompt"][0]["content"] + (f"\n\n[Hint]: {hint}" if hint else "")
    images = [{"type": "image", "image": image} for image in row["images"]]
    videos = [{"type": "video", "video": np.stack(video)} for video in row["videos"]]
    return [{"role": "user", "content": [*images, *videos, {"type": "text", "text": text}]}]


def logprobs_alone(model, processor, row, hint, completion) -> torch.Tensor:
    inputs = encode(processor, [conversation(row, hint)])
    length = inputs["input_ids"].shape[1]
    states = model.eval()(**with_completion(inputs, completion[None])).logits[0, length - 1 : -1]
    return states.log_softmax(-1).gather(-1, completion[:, None]).squeeze(-1)


def recovery(**arguments) -> CueRecoveryConfig:
    return CueRecoveryConfig(layer_interval=1, **arguments)


@every_family
def test_training_saving_reloading_generating(tmp_path, family):
    model, processor = FAMILIES[family]()
    trainer = make_trainer(
        tmp_path,
        processor,
        model=model,
        rows=make_rows(12),
        peft_config=recovery(r=2),
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
    inputs = encode(processor, [conversation(row) for row in make_rows(4)])
    assert torch.equal(logits(reloaded, inputs), logits(trainer.model.eval(), inputs))
    arguments = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(reloaded.generate(**inputs, **arguments), trainer.model.generate(**inputs, **arguments))


@every_family
@pytest.mark.parametrize("share", ["auto", "never"])
def test_teacher_and_student_score_the_same_tokens(tmp_path, family, share):
    """Scores in shuffled, split batches equal those of each row alone (invariants 4 and 9)."""
    model, processor = FAMILIES[family]()
    rows = make_rows(8)
    trainer = make_trainer(
        tmp_path,
        processor,
        model=model,
        rows=rows,
        peft_config=recovery(),
        max_completion_length=4,
        gradient_accumulation_steps=4,
        share_vision_features=share,
    )
    randomize(trainer.model)
    trainer.model.train()
    trainer._prepare_inputs([trainer.train_dataset[i] for i in range(8)])
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


def test_loss_and_gradients_of_one_row(tmp_path, processor):
    """The sampled-token objective (Eq. 6-8), written out."""
    [row] = make_rows(1)
    trainer = make_trainer(
        tmp_path,
        processor,
        rows=[row],
        peft_config=recovery(),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
    )
    model = randomize(trainer.model)
    model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[0]])
    loss = trainer.compute_loss(model, inputs)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.any() for gradient in gradients.values())
    model.zero_grad()

    completion = inputs["completion_ids"][0]
    with torch.no_grad(), model.disable_adapter():
        teacher = logprobs_alone(model, processor, row, row["cue"], completion)
    student = logprobs_alone(model, processor, row, None, completion)
    advantages = (teacher - student).detach()
    torch.testing.assert_close(loss, -advantages.mean(), rtol=1e-4, atol=1e-6)
    (-advantages * student).mean().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)


@every_family
def test_sink_attends_to_the_video(family):
    model, processor = FAMILIES[family]()
    trained = randomize(PeftModel(model, recovery()).eval())
    inputs = encode(processor, [conversation(make_rows(1)[0])])
    is_video = inputs["mm_token_type_ids"] == 2
    assert is_video.any()
    for attention in sink_attention(trained, **inputs).values():
        assert (attention[:, :, is_video[0]] > 0).all()
        torch.testing.assert_close(attention[:, :, is_video[0]].sum(dim=-1), torch.ones(attention.shape[:2]))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize(
    "peft_config, arguments, expected",
    [
        (recovery, {}, 1),
        (recovery, dict(share_vision_features="never"), 3),
        (lambda: recovery(train_base=True), dict(teacher_model_kind="live"), 2),
    ],
)
def test_number_of_encodings_per_video(tmp_path, family, peft_config, arguments, expected):
    model, processor = FAMILIES[family]()
    trainer = make_trainer(tmp_path, processor, model=model, rows=make_rows(8), peft_config=peft_config(), **arguments)
    with count_encoded_images(trainer.model) as visuals:
        trainer.train()
    assert visuals.count == expected * sum(len(row["images"]) + len(row["videos"]) for row in make_rows(8))


def test_videos_are_processed_once(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, rows=make_rows(8), max_steps=2)
    preprocess = type(processor.video_processor).preprocess
    with patch.object(type(processor.video_processor), "preprocess", autospec=True, side_effect=preprocess) as work:
        trainer.train()
    assert work.call_count == 2


def test_resuming_between_two_steps_on_the_same_rollouts(tmp_path, processor):
    arguments = dict(rows=make_rows(8), num_iterations=2, save_strategy="steps", save_steps=1, max_steps=4)
    whole, resumed = (
        make_trainer(tmp_path / name, processor, peft_config=recovery(), **arguments) for name in ("whole", "resumed")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert [log["loss"] for log in train_logs(resumed)] == [log["loss"] for log in train_logs(whole)]
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)


def test_evaluation_with_a_single_video_column(tmp_path, processor):
    rows = [{**row, "video": (row.pop("videos") or [None])[0]} for row in make_rows(4)]
    trainer = make_trainer(tmp_path, processor, rows=rows, peft_config=recovery())
    trainer.eval_dataset = trainer.train_dataset
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_student_samples_no_video_tokens(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, rows=make_rows(4))
    head = trainer.model.lm_head
    trainer.model.lm_head = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        trainer.model.lm_head.bias[trainer.model.config.video_token_id] = 100
    trainer.model.train()
    inputs = trainer._prepare_inputs([trainer.train_dataset[i] for i in range(4)])
    assert (inputs["completion_ids"] != trainer.model.config.video_token_id).all()


# --- Accepted videos ---


def test_video_formats_give_the_same_inputs():
    frames = make_video(0, 4, (48, 32))
    expected = np.stack(frames)
    assert expected.shape == (4, 32, 48, 3)
    encoded_frames = [{"bytes": encoded(frame, "PNG"), "path": None} for frame in frames]
    for video in (frames, tuple(frames), encoded_frames, expected, expected.tolist(), expected.transpose(0, 3, 1, 2)):
        assert np.array_equal(read_video(video), expected)
    for video in (torch.from_numpy(expected), expected.astype(np.int64)):
        assert np.array_equal(read_video(video), expected)


def test_dataset_with_videos_as_arrays_trains(tmp_path, processor):
    rows = [{**row, "videos": [np.stack(video) for video in row["videos"]]} for row in make_rows(2)]
    trainer = make_trainer(tmp_path, processor, rows=2 * rows, max_steps=1)
    trainer.train()
    assert math.isfinite(train_logs(trainer)[0]["loss"])


VIDEO = {"type": "video"}
FRAMES = make_video(0, 4)
REFUSED = {
    "not-a-list": ({"videos": "scene.mp4"}, "`videos` must be a list, got str: 'scene.mp4'. Put a single video into"),
    "empty": ({"videos": [[]]}, r"A video ([]) cannot be read: expected a list of frames"),
    "number": ({"videos": [5]}, "A video (5) cannot be read"),
    "one-image": ({"videos": [np.zeros((8, 8, 3), np.uint8)]}, "cannot be read: expected a list of frames"),
    "four-channels": ({"videos": [np.zeros((4, 8, 8, 4), np.uint8)]}, "cannot be read: expected a list of frames"),
    "floats": ({"videos": [np.zeros((4, 8, 8, 3))]}, "an array of integers from 0 to 255"),
    "out-of-range": ({"videos": [np.full((4, 8, 8, 3), 256)]}, "an array of integers from 0 to 255"),
    "ragged": ({"videos": [[[[[0, 0, 0]]], [[[0, 0, 0], [1, 1, 1]]]]]}, "cannot be read: expected a list of frames"),
    "frames-of-two-sizes": (
        {"videos": [[make_image(0), make_image(0, (32, 64))]]},
        "The frames of a video have the sizes [(32, 64), (64, 64)], expected one. Resize them.",
    ),
    "no-such-frame": ({"videos": [["a.png", "b.png"]]}, "An image ('a.png') cannot be read: the file does not exist"),
    "one-frame": ({"videos": [FRAMES[:1]]}, "The processor does not accept a video of the shape (1, 64, 64, 3)"),
    "missing-place": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]},
        "Number of videos provided (1) does not match number of video placeholders (0). Give `prompt` a block",
    ),
    "missing-video": (
        {"prompt": [{"role": "user", "content": [VIDEO, VIDEO]}]},
        "Number of videos provided (1) does not match number of video placeholders (2). Give `prompt` a block",
    ),
    "video-in-block": (
        {"prompt": [{"role": "user", "content": [{**VIDEO, "video": "scene.mp4"}]}]},
        "expected {'type': 'video'} alone. Put the video into the column `videos`.",
    ),
    "video-of-a-tool": (
        {"prompt": [{"role": "user", "content": "What?"}, {"role": "tool", "content": [VIDEO]}]},
        "`prompt` has a video block in a turn of role 'tool'",
    ),
    "control-token": (
        {"prompt": [{"role": "user", "content": "<|video_pad|>"}]},
        "contains the control token '<|video_pad|>'",
    ),
    "too-long": ({"videos": 40 * [FRAMES]}, "it exceeds the model's context of 2048 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_rows_are_refused_by_name(tmp_path, processor, case):
    changed, error = REFUSED[case]
    row = {"prompt": [{"role": "user", "content": "What?"}], "images": [], "videos": [FRAMES], "cue": "noise"}
    checker = RowChecker(make_config(tmp_path), processor, max_length=2048)
    checker.check(row)
    with pytest.raises(ValueError) as raised:
        checker.check({**row, **changed})
    assert error in str(raised.value)


def test_bad_video_is_reported_with_its_row(tmp_path, processor):
    rows = make_rows(4)
    rows[2]["videos"][0][3] = make_image(0, (8, 8))
    with pytest.raises(ValueError, match=r"Row 2 of train_dataset: The frames of a video have the sizes \[\(8, 8\)"):
        make_trainer(tmp_path, processor, rows=rows)


@pytest.mark.parametrize(
    "family, arguments, has_tools, error",
    [
        ("llava_onevision", {}, False, "which a LlavaOnevisionProcessor lays out in a way that ViCuRTrainer does not"),
        ("glm4v", {}, False, "for which a Glm4vProcessor writes image tokens"),
        ("qwen3_vl", dict(use_vllm=True), False, "which TRL does not pass on to vLLM. Set `use_vllm=False`, or give"),
        (
            "qwen3_vl",
            dict(teacher_model_server_url="http://localhost"),
            False,
            "cannot be sent to the teacher's server",
        ),
        ("qwen3_vl", {}, True, "Train without `tools`, or give the frames as images."),
    ],
)
def test_unsupported_uses_of_videos_are_refused(tmp_path, family, arguments, has_tools, error):
    _, processor = FAMILIES[family]()
    checker = RowChecker(make_config(tmp_path, **arguments), processor, 2048, has_tools)
    with pytest.raises(ValueError) as raised:
        checker.check(make_rows(1)[0])
    assert error in str(raised.value)


def test_sharded_vision_tower_is_refused(tmp_path, processor, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="would make ranks with a sharded vision tower wait for each other"):
        make_trainer(tmp_path, processor, rows=make_rows(4))
