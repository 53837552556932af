"""A teacher on a real vLLM server: training with its scores equals training with the same teacher in this process."""

import pytest
import torch
from engines import HEAD_DIM, MROPE, server  # first, since it skips these tests where vLLM is not installed
from served_teacher import assert_trains_as_with_local_teacher, make_trainer
from tiny_models import make_processor, make_qwen3_vl


@pytest.fixture(scope="module")
def teacher():
    rope = {**MROPE, "mrope_interleaved": True}
    return make_qwen3_vl(num_layers=2, hidden_size=64, head_dim=HEAD_DIM, seed=5, rope_parameters=rope)


@pytest.fixture(scope="module")
def url(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    teacher.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    arguments = ["--served-model-name", "me/teacher", "--enable-scale-out", "--max-logprobs", "20"]
    with server(folder, *arguments, "--max-model-len", "512") as address:
        yield address


@pytest.mark.parametrize(
    "options",
    [dict(), dict(distillation_mode="topk_logits", distillation_topk=20, beta=0.5)],
    ids=["sampled_token", "topk_logits"],
)
def test_training_equals_that_with_a_local_teacher(url, teacher, tmp_path, options):
    torch.manual_seed(0)
    assert_trains_as_with_local_teacher(url, teacher, make_processor(), tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(teacher_model="me/other"), r"serves \['me/teacher'\], not the teacher model 'me/other'"),
        (
            dict(distillation_mode="topk_logits", distillation_topk=30),
            "with 400: .*greater than max allowed: 20.* Start it with `--max-logprobs 30` or more",
        ),
    ],
)
def test_server_errors_are_reported_before_training(url, tmp_path, options, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_trainer(tmp_path, make_processor(), teacher_model_server_url=url, **options)


def test_server_that_resizes_images_differently_is_refused(url, tmp_path):
    processor = make_processor()
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    with pytest.raises(
        ValueError,
        match=r"turns a prompt with 1 image\(s\) into .* which differ from the .* of the student's processor",
    ):
        make_trainer(tmp_path, processor, teacher_model_server_url=url)
