"""
Property tests of the path from dataset rows to the inputs of student and teacher: a row is refused for a true reason,
or its texts reach both models byte for byte as text (invariant 10), and both score the same completion tokens
(invariant 9).

For thousands of examples: `pytest tests/trainer/test_fuzz_rows.py --hypothesis-profile=long`.
"""

import pytest
import torch
from built_trainers import build
from datasets import Dataset
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tiny_models import SPECIAL_TOKENS, make_image, make_processor, make_qwen3_vl, make_rows

from trl_vicur import CueRecoveryConfig, ViCuRTrainer


# --- Rows ---

PARTS_OF_TOKENS = (
    "< | > <| |> <|im_ im_start end|> <|image_ pad|> <|vision_start _end|> ＜｜im_end｜＞ </think>".split()
)
SYNTAX = "{ } {{ }} {% %} {# #} {prompt} {privilege} {0} {x!r:>9} %s $prompt \\ [Hint]: system:".split()
INVISIBLE = [" ", "\n", "\t", "\r", "\0", "\x1b[0m", "\u200b", "\u200d", "\u202e", "\ufeff", "\U0010ffff"]
UNUSUAL = ["e\u0301", "\u0301\u0336\u20dd", "👩🏽‍🚀", "ﷺ", "\nassistant\n"]
HARMLESS = [*PARTS_OF_TOKENS, *SYNTAX, *INVISIBLE, *UNUSUAL]
HARMFUL = [*SPECIAL_TOKENS, "\ud800", "\udc00"]


def texts_of(pieces: list[str]) -> st.SearchStrategy[str]:
    return st.lists(st.one_of(st.sampled_from(pieces), st.text(max_size=4)), max_size=6).map("".join)


MOSTLY = st.integers(0, 15).map(bool)
TEXTS = MOSTLY.flatmap(lambda is_harmless: texts_of(HARMLESS if is_harmless else HARMFUL + HARMLESS))
IMAGES = [make_image(number, size) for number, size in enumerate([(32, 32), (64, 32), (1, 1), (33, 70)])]
BLOCKS = st.one_of(st.just({"type": "image"}), TEXTS.map(lambda text: {"type": "text", "text": text}))


@st.composite
def rows(draw) -> dict:
    """A row that is often valid."""
    contents = TEXTS if draw(st.booleans()) else st.lists(BLOCKS, max_size=4)
    roles = draw(st.lists(st.sampled_from(["system", "user", "assistant", "tool"]), max_size=3))
    if draw(MOSTLY):
        roles.append("user")
    prompt = [{"role": role, "content": draw(contents if draw(MOSTLY) else TEXTS)} for role in roles]
    num_images = num_places(prompt) or draw(st.integers(0, 3))
    images = draw(st.lists(st.sampled_from(IMAGES), min_size=num_images, max_size=num_images))
    cue = draw(TEXTS) + draw(st.sampled_from(["a dot", "a dot", "a dot", ""]))
    return {"prompt": prompt, "images": images, "cue": cue, "answer": "yes"}


def blocks(message: dict) -> list[dict]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def num_places(prompt: list[dict]) -> int:
    return sum(block["type"] == "image" for message in prompt for block in blocks(message))


# --- Properties ---

PROCESSOR = make_processor()
VOCABULARY = PROCESSOR.tokenizer.get_vocab()
# A byte-level vocabulary writes printable bytes as themselves and the others as characters from 256 on
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
IDS_OF_BYTES = {byte: VOCABULARY[chr(byte)] for byte in PRINTABLE}
IDS_OF_BYTES |= {byte: VOCABULARY[chr(256 + number)] for number, byte in enumerate(UNPRINTABLE)}


def ids_of_text(text: str) -> list[int]:
    """One token per byte, so no text can become a control token."""
    return [IDS_OF_BYTES[byte] for byte in text.encode()]


def ids_of_prompt(row: dict, hint: str | None) -> list[int]:
    """The expected inputs of a model."""
    images = iter(row["images"])

    def ids_of_image() -> list[int]:
        grid = PROCESSOR.image_processor([next(images)], return_tensors="pt")["image_grid_thw"]
        visual = [VOCABULARY["<|image_pad|>"]] * (int(grid.prod()) // 4)
        return [VOCABULARY["<|vision_start|>"], *visual, VOCABULARY["<|vision_end|>"]]

    # Images without a slot come before the first user turn that is a string
    num_unplaced = len(row["images"]) - num_places(row["prompt"])
    hinted = max(number for number, message in enumerate(row["prompt"]) if message["role"] == "user")
    ids = []
    for number, message in enumerate(row["prompt"]):
        ids += [VOCABULARY["<|im_start|>"], *ids_of_text(message["role"] + "\n")]
        if message["role"] == "user" and isinstance(message["content"], str):
            for _ in range(num_unplaced):
                ids += ids_of_image()
            num_unplaced = 0
        written = list(blocks(message))
        if hint is not None and number == hinted:
            last = max((n for n, block in enumerate(written) if block["type"] == "text"), default=None)
            text = "" if last is None else written.pop(last)["text"]
            hinted_block = {"type": "text", "text": f"{text}\n\n[Hint]: {hint}"}
            written.insert(len(written) if last is None else last, hinted_block)
        for block in written:
            ids += ids_of_image() if block["type"] == "image" else ids_of_text(block["text"])
        ids += [VOCABULARY["<|im_end|>"], *ids_of_text("\n")]
    return [*ids, VOCABULARY["<|im_start|>"], *ids_of_text("assistant\n")]


def is_visible(text: str) -> bool:
    return any(char.isprintable() and not char.isspace() for char in text)


def has_reason(error: str, row: dict) -> bool:
    """Whether the row really has the reported problem."""
    prompt, cue = row["prompt"], row["cue"]
    texts = [[block["text"] for block in blocks(message) if block["type"] == "text"] for message in prompt]
    if "expected a list of messages" in error:
        return not prompt
    if "ends in a turn of role" in error:
        return prompt[-1]["role"] not in ("user", "tool")
    if "no message with role 'user'" in error:
        return all(message["role"] != "user" for message in prompt)
    if "expected the text that only the teacher sees" in error:
        return not is_visible(cue)
    if "contains the control token" in error:
        joined = [cue, *map("".join, texts), *("".join(map(str.strip, parts)) for parts in texts)]
        return any(token in text for token in SPECIAL_TOKENS for text in joined)
    if "contains the lone surrogate" in error:
        return any("\ud800" <= char <= "\udfff" for char in cue + "".join(map("".join, texts)))
    if "in a turn of role 'tool', where TRL inserts no image" in error:
        return num_places([message for message in prompt if message["role"] == "tool"]) > 0
    if "Number of images provided" in error:
        is_string = any(message["role"] == "user" and isinstance(message["content"], str) for message in prompt)
        return len(row["images"]) != num_places(prompt) or is_string
    return False


@pytest.fixture(scope="module")
def trainers():
    """A trainer whose student is its own teacher and needs cues, and one with another teacher and optional cues."""

    def make_trainer(**arguments) -> ViCuRTrainer:
        return build(
            Dataset.from_list(make_rows(1)),
            model=make_qwen3_vl(num_layers=2),
            processor=PROCESSOR,
            max_completion_length=3,
            **arguments,
        )

    return [
        make_trainer(peft_config=CueRecoveryConfig(layer_interval=1)),
        make_trainer(teacher=make_qwen3_vl(num_layers=2, seed=1), missing_privilege="none"),
    ]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(rows(), min_size=1, max_size=3), which=st.integers(0, 1))
def test_rows_are_refused_for_a_true_reason_or_reach_both_models_unchanged(trainers, rows, which):
    trainer = trainers[which]
    accepted = []
    for row in rows:
        try:
            trainer._row_checker.check(row)
            accepted.append(row)
        except ValueError as error:
            event("refused: " + str(error)[:50])
            assert has_reason(str(error), row), error
    event(f"{len(accepted)} of {len(rows)} rows accepted")
    if not accepted:
        return

    passes = []

    def note(model, input_ids, attention_mask, logits_to_keep, **inputs):
        passes.append((input_ids, attention_mask.bool(), logits_to_keep, inputs))
        return type(trainer)._get_last_hidden_state(
            trainer, model, input_ids, attention_mask, logits_to_keep, **inputs
        )

    trainer._get_last_hidden_state = note
    batch = trainer._generate_and_score_completions(accepted)
    assert torch.isfinite(trainer.compute_loss(trainer.model, batch))

    length = batch["completion_ids"].size(1)
    for (input_ids, mask, logits_to_keep, _), is_teacher in zip(passes, (False, True), strict=True):
        assert logits_to_keep == length
        assert torch.equal(input_ids[:, -length:], batch["completion_ids"])
        assert torch.equal(mask[:, -length:], batch["completion_mask"].bool())
        for row, ids, is_token in zip(accepted, input_ids[:, :-length], mask[:, :-length], strict=True):
            hint = row["cue"] if is_teacher and is_visible(row["cue"]) else None
            assert ids[is_token].tolist() == ids_of_prompt(row, hint)
    (*_, of_student), (*_, of_teacher) = passes
    assert of_student.get("pixel_values") is of_teacher.get("pixel_values")
    assert any(row["images"] for row in accepted) == ("pixel_values" in of_student)
