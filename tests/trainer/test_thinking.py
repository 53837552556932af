"""Thinking checkpoints, and teachers in another thinking mode than the student, are reported before training."""

import re
import warnings
from pathlib import Path

import pytest
import trl
from scoring_server import ScoringServer
from served_teacher import make_trainer
from tiny_models import CHAT_TEMPLATE, make_processor, make_qwen3_vl

from trl_vicur.trainer.checks.thinking import thinking_mode_of_processor


# Qwen3-VL-Thinking opens the block; Qwen3 and Qwen3.5 write an empty one if thinking is off
HEADER = "<|im_start|>assistant\n"
OPENS = CHAT_TEMPLATE.replace(HEADER, HEADER + "<think>\n")
THINKS_BY_DEFAULT = CHAT_TEMPLATE.replace(
    "{%- if add_generation_prompt %}" + HEADER,
    "{%- if add_generation_prompt %}"
    + HEADER
    + "{%- if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
)


def with_template(template: str):
    processor = make_processor()
    processor.chat_template = template
    return processor


def thinking_warnings(make) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make()
    return [str(each.message) for each in caught if "thinking" in str(each.message)]


@pytest.mark.parametrize(
    ("name", "by_default", "enabled", "disabled"),
    [
        ("qwen3", "on", "on", "off"),
        ("qwen3_5_think", "on", "on", "off"),
        ("qwen3_5_nothink", "off", "on", "off"),
        ("gemma4_v5", "off", "on", "off"),
        ("glm4moe", "on", "on", "off"),
        ("nemotron_3_nano", "on", "on", "off"),
        ("deepseek_r1_distill", None, None, None),  # for text models, whose messages have no content blocks
        ("qwen3_vl", "none", "none", "none"),
        ("qwen2_5_vl", "none", "none", "none"),
        ("qwen3_instruct_2507", "none", "none", "none"),
        ("gemma3", "none", "none", "none"),
        ("smolvlm", "none", "none", "none"),
    ],
)
def test_mode_of_released_chat_templates(name, by_default, enabled, disabled):
    template = Path(trl.__file__).with_name("chat_templates") / f"{name}.jinja"
    processor = with_template(template.read_text())
    modes = [
        thinking_mode_of_processor(processor, kwargs)
        for kwargs in (None, {"enable_thinking": True}, {"enable_thinking": False})
    ]
    assert modes == [by_default, enabled, disabled]


@pytest.mark.parametrize(
    ("template", "options", "warns"),
    [
        (OPENS, {}, True),
        (OPENS, {"privilege": "none"}, False),
        (THINKS_BY_DEFAULT, {}, True),
        (THINKS_BY_DEFAULT, {"chat_template_kwargs": {"enable_thinking": False}}, False),
        (CHAT_TEMPLATE, {}, False),
    ],
    ids=["thinking", "no-privilege", "hybrid", "hybrid-off", "instruct"],
)
def test_privilege_for_a_thinking_student_warns(tmp_path, template, options, warns):
    messages = thinking_warnings(lambda: make_trainer(tmp_path, with_template(template), **options))
    assert len(messages) == warns
    if warns:
        assert "(`privilege='cue'`), which costs thinking models up to 17 %" in messages[0]
        assert "chat_template_kwargs={'enable_thinking': False}" in messages[0]


OFF = {"chat_template_kwargs": {"enable_thinking": False}}
PAIRS = {
    "thinking-teacher": (
        CHAT_TEMPLATE,
        OPENS,
        {},
        "'me/teacher' renders prompts for thinking, but .* no thinking mode",
    ),
    "hybrid-teacher": (
        CHAT_TEMPLATE,
        THINKS_BY_DEFAULT,
        OFF,
        "'me/teacher' switches thinking off, but .* no thinking",
    ),
    "instruct-teacher": (OPENS, CHAT_TEMPLATE, {}, "'me/teacher' has no thinking mode, but .* renders prompts for th"),
    "both-off": (THINKS_BY_DEFAULT, THINKS_BY_DEFAULT, OFF, None),
    "both-instruct": (CHAT_TEMPLATE, CHAT_TEMPLATE, {}, None),
}


@pytest.mark.parametrize("is_served", [False, True], ids=["local", "served"])
@pytest.mark.parametrize("pair", PAIRS)
def test_teacher_in_another_thinking_mode_warns(tmp_path, monkeypatch, pair, is_served):
    of_student, of_teacher, options, expected = PAIRS[pair]
    model = make_qwen3_vl(num_layers=2, hidden_size=64, seed=5)
    options = {"privilege": "none", **options}
    monkeypatch.chdir(tmp_path)
    if is_served:
        with ScoringServer(model, with_template(of_teacher)) as server:
            messages = thinking_warnings(
                lambda: make_trainer(
                    tmp_path, with_template(of_student), teacher_model_server_url=server.url, **options
                )
            )
    else:
        model.save_pretrained("me/teacher")
        with_template(of_teacher).save_pretrained("me/teacher")
        messages = thinking_warnings(
            lambda: make_trainer(tmp_path, with_template(of_student), teacher_model="me/teacher", **options)
        )
    assert len(messages) == (expected is not None), messages
    if expected is not None:
        assert re.search(expected, messages[0]), messages


def test_teacher_without_a_processor_is_not_compared(tmp_path):
    make_qwen3_vl(num_layers=2, hidden_size=64, seed=5).save_pretrained(tmp_path / "teacher")
    teacher = str(tmp_path / "teacher")
    options = dict(teacher_model=teacher, privilege="none")
    assert not thinking_warnings(lambda: make_trainer(tmp_path, with_template(OPENS), **options))
