"""A row is read once: decoded images and videos, and what the student and the teacher see of them."""

import copy

import numpy as np
import pytest
from tiny_models import make_image

from trl_vicur.data.examples import Example, fill_prompt, read_row


TEMPLATE = "{prompt}\n\n[Hint]: {privilege}"


def blocks(prompt: list[dict]) -> list[dict]:
    return [block for message in prompt for block in message["content"]]


def test_both_conversations_have_the_same_decoded_images_and_videos(tmp_path):
    path = tmp_path / "image.png"
    make_image(0).save(path)
    frames = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}]
    row = {"prompt": prompt, "images": [str(path)], "videos": [frames.tolist()], "cue": "noise"}
    before = copy.deepcopy(row)
    example = read_row(row, "cue", "error", TEMPLATE)
    assert row == before
    for conversation, text in ((example.prompt, "What?"), (example.teacher_prompt, "What?\n\n[Hint]: noise")):
        assert [message["role"] for message in conversation] == ["system", "user"]
        system, image, video, question = blocks(conversation)
        assert system == {"type": "text", "text": "Be brief."} and question == {"type": "text", "text": text}
        assert image["image"].tobytes() == make_image(0).tobytes()
        assert np.array_equal(video["video"], frames)
    assert blocks(example.prompt)[1]["image"] is blocks(example.teacher_prompt)[1]["image"]


def test_without_privilege_the_teacher_reads_the_students_prompt():
    row = {"prompt": [{"role": "user", "content": "What?"}], "image": make_image(0), "cue": None}
    for column, missing in ((None, "error"), ("cue", "none")):
        example = read_row(row, column, missing, TEMPLATE)
        assert isinstance(example, Example) and example.prompt == example.teacher_prompt
    with pytest.raises(ValueError, match="`cue` is None, expected the text that only the teacher sees"):
        read_row(row, "cue", "error", TEMPLATE)


def test_content_blocks_are_filled_in_order():
    content = [{"type": "video"}, {"type": "text", "text": "and"}, {"type": "image"}]
    [message] = fill_prompt([{"role": "user", "content": content}], ["image"], ["video"])
    assert message["content"] == [
        {"type": "video", "video": "video"},
        {"type": "text", "text": "and"},
        {"type": "image", "image": "image"},
    ]
    with pytest.raises(ValueError, match="Number of videos provided \\(0\\) does not match"):
        fill_prompt([{"role": "user", "content": content}], ["image"], [])
