"""The teacher's view: the privilege in the last user turn, and no control tokens from data."""

import copy
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import SPECIAL_TOKENS, make_image, make_processor

from trl_vicur import ViCuRConfig
from trl_vicur.data.examples import read_privilege, read_row
from trl_vicur.data.messages import control_token_pattern
from trl_vicur.data.teacher_prompt import add_privilege, hint_marker
from trl_vicur.trainer.checks.rows import RowChecker


TEMPLATE = "{prompt}\n\n[Hint]: {privilege}"
PROCESSOR = make_processor()


def config(**arguments):
    return ViCuRConfig("unused", bf16=False, report_to="none", **arguments)


def privilege_of(row, **arguments):
    args = config(**arguments)
    return read_privilege(row, args.privilege_column, args.missing_privilege)


def test_privilege_comes_from_the_named_column():
    row = {"cue": "a red circle", "answer": "12", "evidence": "seen"}
    assert privilege_of(row) == "a red circle"
    assert privilege_of(row, privilege="answer") == "12"
    assert privilege_of(row, cue_column="evidence") == "seen"
    assert privilege_of(row, privilege="none") is None


@pytest.mark.parametrize("missing", [None, "", "  \n"])
def test_missing_privilege_is_an_error_unless_allowed(missing):
    with pytest.raises(ValueError, match="`cue` is .*missing_privilege='none'"):
        privilege_of({"cue": missing})
    assert privilege_of({"cue": missing}, missing_privilege="none") is None


@pytest.mark.parametrize("missing_privilege", ["error", "none"])
def test_privilege_that_is_not_text_is_refused(missing_privilege):
    with pytest.raises(ValueError, match=r"`cue` must be a string, got list: \['a'\]"):
        privilege_of({"cue": ["a"]}, missing_privilege=missing_privilege)


def test_hint_goes_into_the_last_user_turn():
    prompt = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Second?"},
    ]
    before = copy.deepcopy(prompt)
    teacher = add_privilege(prompt, "a cue", TEMPLATE)
    assert teacher[:3] == prompt[:3]
    assert teacher[3] == {"role": "user", "content": "Second?\n\n[Hint]: a cue"}
    assert prompt == before
    assert add_privilege(prompt, None, TEMPLATE) == prompt


def test_hint_goes_into_the_last_text_block():
    image = make_image(0)
    content = [{"type": "text", "text": "See"}, {"type": "image", "image": image}, {"type": "text", "text": "this?"}]
    teacher = add_privilege([{"role": "user", "content": content}], "a cue", TEMPLATE)
    assert teacher[0]["content"] == [*content[:2], {"type": "text", "text": "this?\n\n[Hint]: a cue"}]
    only_image = add_privilege([{"role": "user", "content": [{"type": "image"}]}], "a cue", TEMPLATE)
    assert only_image[0]["content"] == [{"type": "image"}, {"type": "text", "text": "\n\n[Hint]: a cue"}]


def test_prompt_without_user_turn_is_refused():
    with pytest.raises(ValueError, match="no message with role 'user'"):
        add_privilege([{"role": "system", "content": "Hi"}], "a cue", TEMPLATE)


@given(prompt=st.text(), privilege=st.text(min_size=1))
def test_braces_in_data_are_text(prompt, privilege):
    for text in (prompt, privilege, prompt + "{prompt}", "{privilege}" + privilege, "{0} {}"):
        teacher = add_privilege([{"role": "user", "content": text}], privilege, TEMPLATE)
        assert teacher[0]["content"] == f"{text}\n\n[Hint]: {privilege}"


@pytest.mark.parametrize(
    "template, marker",
    [
        (TEMPLATE, "Hint"),
        ("{prompt} Visible evidence: {privilege}!", "Visible evidence"),
        ("{privilege}\n\n{prompt}", ""),
        ("[Hint]: {privilege}\n\n{prompt}", "Hint"),
        ("{prompt}\n<hint>{privilege}</hint>", "hint"),
        ("{prompt}\n\nLook at the picture first.\n**Hint**:\n\n{privilege}", "Hint"),
        ("{prompt} {{evidence}}: {privilege}", "evidence"),
        ("Say {{prompt}}. {prompt} Clue: {privilege}", "Clue"),
        # A hint is recognized by the word before the privilege; here there is none
        ("{prompt}{privilege}", ""),
        ("{prompt}\n=> {privilege} (a hint)", ""),
    ],
)
def test_hint_marker(template, marker):
    assert hint_marker(template) == marker


# --- 10. Data is data ---

# Text that resembles a control token or is one
nearly_control = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL_TOKENS, "<|", "|>", "<", ">", "|", "im_start", "<|im_", "start|>", "[Hint]:", "{prompt}"]
        ),
        st.text(max_size=5),
        st.text(alphabet=string.printable, max_size=5),
    ),
    max_size=6,
).map("".join)


@settings(max_examples=150, deadline=None)
@given(question=nearly_control, cue=nearly_control, answer=nearly_control)
def test_invariant_10_text_never_becomes_a_control_token(question, cue, answer):
    """A row is refused, or its teacher prompt has the control tokens of the chat format and no others."""
    for privilege in ("cue", "answer"):
        args = config(privilege=privilege, missing_privilege="none")
        row = {
            "prompt": [{"role": "user", "content": question}],
            "images": [make_image(0)],
            "cue": cue,
            "answer": answer,
        }
        text = question + "\0" + (cue if privilege == "cue" else answer)
        try:
            RowChecker(args, PROCESSOR, max_length=10**6).check(row)
        except ValueError as error:
            assert "control token" in str(error)
            assert any(token in text for token in SPECIAL_TOKENS)
            continue
        example = read_row(row, args.privilege_column, args.missing_privilege, args.teacher_prompt_template)
        messages = example.teacher_prompt
        ids = PROCESSOR.apply_chat_template([messages], tokenize=True, return_dict=True, add_generation_prompt=True)
        special = set(PROCESSOR.tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS))
        found = [PROCESSOR.tokenizer.convert_ids_to_tokens(i) for i in ids["input_ids"][0] if i in special]
        expected = ["<|im_start|>", "<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>", "<|im_end|>"]
        assert found == [*expected, "<|im_start|>"]


def test_control_tokens_are_the_tokenizers_special_ones():
    pattern = control_token_pattern(PROCESSOR)
    assert all(pattern.search(f"a{token}b").group() == token for token in SPECIAL_TOKENS)
    assert pattern.search("<|im_begin|> <think> im_start") is None
