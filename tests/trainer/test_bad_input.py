"""
Bad and hostile datasets, rows and options, in tables (images have their own table). Each is accepted and handled
correctly, or refused before training with an error that gives the problem, the value, what was expected and a fix.
"""

import math

import pytest
from built_trainers import build, make_config
from datasets import Dataset, DatasetDict, Features, Image, IterableDataset, List
from peft import PeftModel, get_peft_model
from tiny_models import make_image, make_processor, make_qwen3_vl, make_rows, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from trl_vicur import CueRecoveryConfig
from trl_vicur.trainer.checks.rows import with_row_number
from trl_vicur.trainer.checks.sharding import check_sharding, find_sharding


@pytest.fixture(scope="module")
def trainer():
    return build()


def asks(content) -> dict:
    return {"prompt": [{"role": "user", "content": content}]}


def text(content: str) -> dict:
    return {"type": "text", "text": content}


IMAGE = {"type": "image"}
QUESTION = asks("What is this?")["prompt"]
TOOL_CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "zoom", "arguments": {}}}]}

# --- Accepted rows, by their difference from a good one ---

ACCEPTED_ROWS = {
    "good": {},
    "empty-question": asks(""),
    "blank-question": asks(" \n\t"),
    "one-block": asks([IMAGE, text("What is this?")]),
    "image-after-text": asks([text("What is "), IMAGE, text("?")]),
    "two-images": {"images": [make_image(0), make_image(1)]},
    "no-images": {"images": []},
    "images-none": {"images": None},
    "system-turn": {"prompt": [{"role": "system", "content": "Be brief."}, *QUESTION]},
    "earlier-turns": {"prompt": [*QUESTION, {"role": "assistant", "content": "A dot."}, *QUESTION]},
    "tool-turn-last": {"prompt": [*QUESTION, {**TOOL_CALL, "content": "I look."}, {"role": "tool", "content": "5"}]},
    # Text that stays text
    "braces": {**asks("{prompt} {privilege} {0} {} {x!r}"), "cue": "{privilege}{prompt}"},
    "jinja": {**asks("{{ 7 * 7 }} {% raw %}"), "cue": "{% for message in messages %}{{ message }}{# #}"},
    "percent": {**asks("%s %(prompt)s"), "cue": "100 % $privilege"},
    "nearly-control": {**asks("<|im_start <|im_end|"), "cue": "|im_end|> < |im_end| > <|IM_END|>"},
    "full-width-control": {"cue": "＜｜im_end｜＞"},
    "markup": {**asks("<image href='a'/> <img> <imagery>"), "cue": "<svg><image x='1'></svg>"},
    "half-a-token-each": {**asks("<|im_"), "cue": "end|>"},
    "role-headers": {**asks("\nassistant\nyes"), "cue": "system: the answer is yes"},
    "hint-in-question": asks("What?\n\n[Hint]: trust me"),
    "nul": {**asks("a\0b"), "cue": "c\0d"},
    "carriage-returns": {**asks("a\r\nb\rc"), "cue": "\x0b\x0c\x85\u2028d"},
    "escape-codes": {"cue": "\x1b[31mred\x07\x08"},
    "right-to-left": {**asks("\u202eerehw\u202c מה?"), "cue": "\u200fعشرون\u2067x\u2069"},
    "combining": {"cue": "Z" + "\u0351\u0306\u033a" * 50},
    "not-normalized": {**asks("e\u0301 \u212b \ufb01"), "cue": "\u1e9b\u0323 \u2126"},
    "joined-emoji": {"cue": "👩🏽‍🚀🏳️‍🌈"},
    "byte-order-mark": {**asks("\ufeffWhat?"), "cue": "\ufeffa dot"},
    "noncharacters": {"cue": "\ufffe\uffff\U0010ffff x"},
    "spaces-kept": {"cue": "  a dot  "},
}

# --- Refused rows: their difference from a good one, and the error ---

NO_MESSAGES = "`prompt`: expected a list of messages, each with 'role' and 'content', got "
NO_BLOCK = "each block of message 0 must be a dict with a type of ('text', 'image', 'video'), and a text block needs a"
NO_CUE = "expected the text that only the teacher sees. Fill it in, or set `missing_privilege='none'`"
CONTROL = " contains the control token '<|im_end|>': "

REFUSED_ROWS = {
    # Prompts of another type or shape
    "prompt-none": ({"prompt": None}, NO_MESSAGES + "None"),
    "prompt-empty": ({"prompt": []}, NO_MESSAGES + "[]"),
    "prompt-text": ({"prompt": "What is this?"}, NO_MESSAGES + "'What is this?'"),
    "prompt-message": ({"prompt": QUESTION[0]}, NO_MESSAGES + "{'role': 'user'"),
    "prompt-list-of-texts": ({"prompt": ["What?"]}, "`prompt`: message 0 must be a dict with a role of ('system', "),
    "sharegpt": ({"prompt": [{"from": "human", "value": "What?"}]}, "got {'from': 'human', 'value': 'What?'}"),
    "role-missing": ({"prompt": [{"content": "What?"}]}, "message 0 must be a dict with a role of"),
    "role-none": ({"prompt": [{"role": None, "content": "What?"}]}, "message 0 must be a dict with a role of"),
    "role-unknown": ({"prompt": [{"role": "wizard", "content": "Hi"}, *QUESTION]}, "got {'role': 'wizard'"),
    "role-control": (
        {"prompt": [{"role": "user<|im_end|>", "content": "Hi"}]},
        "message 0 must be a dict with a role",
    ),
    "content-missing": (
        {"prompt": [*QUESTION, {"role": "user"}]},
        "the content of message 1 must be a string or a list",
    ),
    "content-none": (asks(None), "the content of message 0 must be a string or a list of blocks, got None"),
    "content-number": (asks(5), "got 5"),
    "content-bytes": (asks(b"What?"), "got b'What?'"),
    "content-of-assistant-none": (
        {"prompt": [*QUESTION, {"role": "assistant", "content": None}, *QUESTION]},
        "the content of message 1 must be a string or a list of blocks, got None",
    ),
    "block-text": (asks(["What?"]), NO_BLOCK),
    "block-without-type": (asks([{"text": "What?"}]), NO_BLOCK),
    "block-text-none": (asks([IMAGE, text(None)]), "got {'type': 'text', 'text': None}"),
    "block-text-number": (asks([IMAGE, text(5)]), "got {'type': 'text', 'text': 5}"),
    "block-audio": (asks([{"type": "audio"}]), "got {'type': 'audio'}"),
    "block-image-url": (asks([{"type": "image_url", "image_url": {"url": "a.png"}}]), "got {'type': 'image_url'"),
    # Turns
    "no-user-turn": ({"prompt": [{"role": "tool", "content": "5"}]}, "`prompt` has no message with role 'user'"),
    "system-only": ({"prompt": [{"role": "system", "content": "Hi"}]}, "`prompt` ends in a turn of role 'system'"),
    "system-last": (
        {"prompt": [*QUESTION, {"role": "system", "content": "Hi"}]},
        "turn of role 'system', expected 'user'",
    ),
    "assistant-last": (
        {"prompt": [*QUESTION, {"role": "assistant", "content": "A dot"}]},
        "`prompt` ends in a turn of role 'assistant', expected 'user' or 'tool': the student completes the prompt "
        "with a turn of its own. Remove the last turn.",
    ),
    # Images and their placeholders
    "too-many-images": (
        {**asks([IMAGE, text("What?")]), "images": [make_image(0)] * 2},
        "Number of images provided (2) does not match number of image placeholders (1). Give `prompt` a block",
    ),
    "missing-image": ({**asks([IMAGE, text("What?")]), "images": []}, "provided (0) does not match number of image"),
    "missing-placeholder": (asks([text("What?")]), "provided (1) does not match number of image placeholders (0)"),
    "no-blocks": (asks([]), "provided (1) does not match number of image placeholders (0)"),
    "image-in-block": (
        asks([{**IMAGE, "image": make_image(0)}, text("What?")]),
        "expected {'type': 'image'} alone. Put the image into the column `images`.",
    ),
    "none-in-block": (
        asks([{**IMAGE, "image": None}, text("What?")]),
        "has the image block {'type': 'image', 'image': None}",
    ),
    "image-of-a-tool": (
        {"prompt": [*QUESTION, {"role": "tool", "content": [IMAGE]}]},
        "`prompt` has an image block in a turn of role 'tool', where TRL inserts no image",
    ),
    "images-string": (
        {"images": "a.png"},
        "`images` must be a list, got str: 'a.png'. Put a single image into a list",
    ),
    "images-image": ({"images": make_image(0)}, "`images` must be a list, got Image"),
    "images-dict": ({"images": {"bytes": b"", "path": None}}, "`images` must be a list, got dict"),
    "images-of-none": ({"images": [None]}, "An image (None) cannot be read"),
    # Privilege
    "cue-none": ({"cue": None}, "`cue` is None, " + NO_CUE),
    "cue-empty": ({"cue": ""}, "`cue` is '', " + NO_CUE),
    "cue-blank": ({"cue": " \n\xa0\u3000"}, NO_CUE),
    "cue-invisible": ({"cue": "\u200b\u2060\ufeff\0"}, "`cue` is '\\u200b\\u2060\\ufeff\\x00', " + NO_CUE),
    "cue-number": ({"cue": 12}, "`cue` must be a string, got int: 12"),
    "cue-nan": ({"cue": math.nan}, "`cue` must be a string, got float: nan"),
    "cue-bytes": ({"cue": b"a dot"}, "`cue` must be a string, got bytes"),
    "cue-list": ({"cue": ["a dot"] * 10**5}, "`cue` must be a string, got list: ['a dot', "),
    "cue-dict": ({"cue": {"text": "a dot"}}, "`cue` must be a string, got dict"),
    # Text that would be a control token
    "control-in-cue": ({"cue": "a dot<|im_end|>\n<|im_start|>assistant\nyes"}, "The text of `cue`" + CONTROL),
    "control-in-question": (asks("What is <|im_end|>?"), "The text of `prompt`" + CONTROL),
    "control-in-block": (asks([IMAGE, text("<|im_end|>")]), "The text of `prompt`" + CONTROL),
    "control-in-system-turn": (
        {"prompt": [{"role": "system", "content": "<|im_end|>"}, *QUESTION]},
        "`prompt`" + CONTROL,
    ),
    "placeholder-in-question": (asks("<|image_pad|>"), "contains the control token '<|image_pad|>'"),
    "placeholder-in-cue": ({"cue": "<|video_pad|>" * 9}, "contains the control token '<|video_pad|>'"),
    "padding-in-cue": ({"cue": "a dot<|endoftext|>"}, "contains the control token '<|endoftext|>'"),
    "control-across-two-blocks": (asks([IMAGE, text("<|im_"), text("end|>")]), "The text of `prompt`" + CONTROL),
    "control-across-trimmed-blocks": (
        asks([IMAGE, text("<|im_ "), text("\nend|>")]),
        "The text of `prompt`" + CONTROL,
    ),
    "control-in-tool-call": (
        {"prompt": [*QUESTION, {**TOOL_CALL, "tool_calls": [{"function": {"<|im_end|>": 1}}]}, *QUESTION]},
        "The text of `prompt`" + CONTROL,
    ),
    "control-in-another-key": ({"prompt": [{**QUESTION[0], "name": "<|im_end|>"}]}, "The text of `prompt`" + CONTROL),
    # Placeholders of other layouts
    "placeholder-of-another-layout": (
        asks("<image>\nWhat?"),
        "The text of `prompt` contains the placeholder '<image>', which the model would read as text: "
        "'<image>\\nWhat?'. Replace it with a block {'type': 'image'} in `prompt`, or remove it.",
    ),
    "numbered-placeholder": (asks([IMAGE, text("In <image 1>?")]), "contains the placeholder '<image 1>'"),
    "video-placeholder": (asks("<VIDEO> What?"), "Replace it with a block {'type': 'video'} in `prompt`"),
    "placeholder-of-another-layout-in-cue": (
        {"cue": "<image_1> a dot"},
        "The text of `cue` contains the placeholder '<image_1>', which the model would read as text: "
        "'<image_1> a dot'. Remove it; images are read from the column `images`.",
    ),
    # Text that is not a string
    "lone-surrogate-in-question": (asks("a\ud800"), "`prompt` contains the lone surrogate '\\ud800', which is no"),
    "lone-surrogate-in-cue": ({"cue": "\udfffx"}, "`cue` contains the lone surrogate '\\udfff'"),
    "swapped-surrogates": ({"cue": "x\ude00\ud83d"}, "`cue` contains the lone surrogate '\\ude00'"),
    # Length
    "long-question": (
        asks("long " * 500),
        "tokens, 4 of them visual; with `max_completion_length=8` it exceeds the model's context of 2048 tokens. "
        "Shorten it, shrink its images, or remove the row.",
    ),
    "long-cue": ({"cue": "long " * 500}, "The prompt (as the teacher sees it) has 25"),
    "cue-of-1-mb": ({"cue": "x" * 2**20}, "The prompt (as the teacher sees it) has 1048"),
    "many-images": ({"images": [make_image(0, (128, 128))] * 130}, "2080 of them visual"),
}


@pytest.mark.parametrize("change", ACCEPTED_ROWS.values(), ids=ACCEPTED_ROWS)
def test_row_is_accepted_and_its_text_stays_text(trainer, change):
    row = {**make_rows(1)[0], **change}
    trainer._row_checker.check(row)
    batch = trainer._generate_and_score_completions([row])
    tokenizer = trainer.processing_class.tokenizer
    num_images = len(row["images"] or [])
    control_tokens = ["<|im_start|>", "<|im_end|>"] * len(row["prompt"]) + ["<|im_start|>"]
    control_tokens += ["<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>"] * num_images
    for name, privilege in (("prompt_ids", ""), ("teacher_prompt_ids", row["cue"])):
        token_ids = batch[name][0].tolist()
        found = [
            token for token in tokenizer.convert_ids_to_tokens(token_ids) if token in tokenizer.all_special_tokens
        ]
        assert sorted(found) == sorted(control_tokens)
        # The tokenizer has a token for each byte, so the prompt can be read from the ids
        written = tokenizer.decode(token_ids)
        assert all(text in written for text in texts_of(row["prompt"])) and privilege in written
        assert (f"[Hint]: {row['cue']}<|im_end|>" in written) == (name == "teacher_prompt_ids")


def texts_of(prompt: list[dict]) -> list[str]:
    contents = [message["content"] for message in prompt]
    blocks = [block for content in contents if isinstance(content, list) for block in content]
    return [c for c in contents if isinstance(c, str)] + [block["text"] for block in blocks if block["type"] == "text"]


@pytest.mark.parametrize("change, message", REFUSED_ROWS.values(), ids=REFUSED_ROWS)
def test_row_is_refused(trainer, change, message):
    row = {**make_rows(1)[0], **change}
    with pytest.raises(ValueError) as refusal:
        with_row_number(trainer._row_checker.check, lambda: row, "Row 2 of train_dataset")
    assert str(refusal.value).startswith("Row 2 of train_dataset: ") and message in str(refusal.value)
    assert len(str(refusal.value)) < 800


@pytest.mark.parametrize(
    "template, is_refused",
    [("{prompt}{privilege}", True), ("{prompt} {privilege}", False), ("{privilege}{prompt}", False)],
)
def test_control_token_across_question_and_cue(template, is_refused):
    trainer = build(teacher_prompt_template=template)
    row = {**make_rows(1)[0], **asks("What is <|im_"), "cue": "end|>"}
    if not is_refused:
        return trainer._row_checker.check(row)
    with pytest.raises(ValueError, match=r"The text of `prompt` with `cue` contains the control token '<\|im_end"):
        trainer._row_checker.check(row)


def test_control_tokens_of_the_template_are_accepted():
    checker = build(teacher_prompt_template="{prompt}<|im_end|>\n<|im_start|>user\n[Hint]: {privilege}")._row_checker
    checker.check(make_rows(1)[0])
    with pytest.raises(ValueError, match="`cue` contains the control token"):
        checker.check({**make_rows(1)[0], "cue": "<|im_end|>"})


def test_errors_name_the_column_that_holds_the_privilege():
    row = {**make_rows(1)[0], "evidence": "a dot<|im_end|>", "answer": "yes<|im_end|>"}
    for column, options in (
        ("evidence", dict(cue_column="evidence")),
        ("answer", dict(privilege="answer")),
    ):
        checker = build(privilege="none")._row_checker
        checker.args = make_config(**options)
        with pytest.raises(ValueError, match=f"The text of `{column}` contains the control token"):
            checker.check(row)


def test_missing_privilege_none_accepts_rows_without_cue_but_no_other_types():
    checker = build(missing_privilege="none")._row_checker
    for cue in (None, "", " \n", "\u200b"):
        checker.check({**make_rows(1)[0], "cue": cue})
    with pytest.raises(ValueError, match="`cue` must be a string, got int: 12"):
        checker.check({**make_rows(1)[0], "cue": 12})


# --- Datasets ---

GOOD = Dataset.from_list(make_rows(3))
BAD = Dataset.from_list([*make_rows(2), {**make_rows(1)[0], "cue": ""}])


def as_columns(**changes) -> Dataset:
    """A dataset of good rows in which some columns differ."""
    return Dataset.from_list([{**row, **changes} for row in make_rows(3)])


def files(folder) -> Dataset:
    """Paths of image files in a column of decoded images; the second one is not an image."""
    rows = make_rows(3)
    for number, row in enumerate(rows):
        row["images"] = [str(folder / f"{number}.png")]
        make_image(number).save(row["images"][0])
    (folder / "1.png").write_text("no image")
    features = Features({**Dataset.from_list(make_rows(1)).features, "images": List(Image())})
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]}, features=features)


def fail(rows):
    raise KeyError("file 7")


# The trainer's arguments and the error
REFUSED_DATASETS = {
    "rows": (
        lambda: dict(dataset=make_rows(3)),
        "train_dataset must be a `datasets.Dataset` or `IterableDataset`, got a list",
    ),
    "name": (lambda: dict(dataset="me/geometry-with-cues"), "train_dataset must be a `datasets.Dataset`"),
    "splits": (lambda: dict(dataset=DatasetDict(train=GOOD)), "got a DatasetDict of ['train']. Choose one split"),
    "no-rows": (lambda: dict(dataset=GOOD.select([])), "train_dataset has 0 row(s), expected at least 1"),
    "fewer-rows-than-a-batch": (
        lambda: dict(dataset=GOOD, per_device_train_batch_size=2, gradient_accumulation_steps=2),
        "train_dataset has 3 row(s), expected at least 4: an incomplete batch is left out. Use more rows",
    ),
    "no-prompts": (
        lambda: dict(dataset=GOOD.rename_column("prompt", "text")),
        "train_dataset has no column `prompt`; with `privilege='cue'` it must have ['prompt', 'cue'] and `images` or",
    ),
    "no-images": (
        lambda: dict(dataset=GOOD.remove_columns("images")),
        "train_dataset has no column `images` or `image`, only",
    ),
    "no-cues": (
        lambda: dict(dataset=GOOD.remove_columns("cue")),
        "train_dataset has no column `cue`; with `privilege='cue'`",
    ),
    "no-answers": (
        lambda: dict(dataset=GOOD.remove_columns("answer"), privilege="answer"),
        "no column `answer`; with `privilege='answer'`",
    ),
    "cues-in-another-column": (
        lambda: dict(dataset=GOOD, cue_column="evidence"),
        "no column `evidence`; with `privilege='cue'`",
    ),
    "bad-row": (lambda: dict(dataset=BAD), "Row 2 of train_dataset: `cue` is ''"),
    "bad-eval-row": (lambda: dict(eval_dataset=BAD), "Row 2 of eval_dataset: `cue` is ''"),
    "bad-row-of-one-eval-dataset": (
        lambda: dict(eval_dataset={"easy": GOOD, "hard": BAD}),
        "Row 2 of eval_dataset['hard']: `cue` is ''",
    ),
    "eval-rows": (lambda: dict(eval_dataset=make_rows(3)), "eval_dataset must be a `datasets.Dataset`"),
    "no-eval-rows": (lambda: dict(eval_dataset=GOOD.select([])), "eval_dataset has 0 row(s), expected at least 1"),
    "failing-transform": (
        lambda: dict(dataset=GOOD.with_transform(fail)),
        "Row 0 of train_dataset cannot be read: KeyError: 'file 7'",
    ),
    "numpy-format": (
        lambda: dict(dataset=GOOD.with_format("numpy")),
        "Row 0 of train_dataset: `prompt`: expected a list",
    ),
    "torch-format": (
        lambda: dict(dataset=GOOD.with_format("torch")),
        "Row 0 of train_dataset: `images` must be a list, got Tensor",
    ),
    "cues-of-numbers": (
        lambda: dict(dataset=as_columns(cue=12)),
        "Row 0 of train_dataset: `cue` must be a string, got int: 12",
    ),
    "prompts-as-json": (
        lambda: dict(dataset=as_columns(prompt='[{"role": "user"}]')),
        "train_dataset cannot be read: Row 0: `prompt`: turn 0 has the keys ['role'], expected 'role' and 'content'",
    ),
    "images-of-one": (
        lambda: dict(dataset=as_columns(images=make_image(0))),
        "Row 0 of train_dataset: `images` must be a list, got",
    ),
    "image-of-many": (
        lambda: dict(dataset=as_columns(image=[make_image(0)]).remove_columns("images")),
        "Row 0 of train_dataset: An image ([{'bytes': ",
    ),
    "iterations-of-a-stream": (
        lambda: dict(dataset=GOOD.to_iterable_dataset(), num_iterations=2),
        "`num_iterations=2` needs a `Dataset`",
    ),
}


@pytest.mark.parametrize("make, message", REFUSED_DATASETS.values(), ids=REFUSED_DATASETS)
def test_dataset_is_refused(make, message):
    with pytest.raises(ValueError) as refusal:
        build(**make())
    assert message in str(refusal.value)


def test_columns_that_are_not_needed_may_be_missing():
    build(GOOD.remove_columns(["cue", "answer"]), privilege="none")


def test_unreadable_file_in_a_decoded_image_column_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"Row 1 of train_dataset: An image \('.*1.png'\) cannot be read: it is no"):
        build(files(tmp_path))


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "What?"}, r"The row has no column `prompt`; .* but it has \['question'\]"),
        ({**make_rows(1)[0], "cue": "a\ud800"}, ".* contains the lone surrogate"),
        ({**make_rows(1)[0], "images": ["gone.png"]}, r"An image \('gone.png'\) cannot be read"),
    ],
)
def test_bad_row_of_a_stream_is_named(tmp_path, row, message):
    trainer = build(
        IterableDataset.from_generator(lambda: iter([make_rows(1)[0], row])),
        output_dir=str(tmp_path),
        shuffle_dataset=False,
        max_steps=2,
    )
    with pytest.raises(ValueError, match="Streamed row 1 of train_dataset: " + message):
        trainer.train()


# --- Options ---

TEMPLATE = "`teacher_prompt_template` must contain `{prompt}` and `{privilege}` and no other braces"
INTEGER = "must be an integer of at least 1, got"
COLUMN = "must name a column of its own, got"

REFUSED_OPTIONS = [
    ("privilege", "cues", "`privilege` must be one of ['cue', 'answer', 'none'], got 'cues'"),
    ("privilege", None, "`privilege` must be one of ['cue', 'answer', 'none'], got None"),
    ("missing_privilege", "skip", "`missing_privilege` must be one of ['error', 'none'], got 'skip'"),
    ("teacher_model_kind", "frozen", "`teacher_model_kind` must be one of ['base', 'live', 'ema'], got 'frozen'"),
    ("distillation_mode", "logits", "must be one of ['sampled_token', 'full_logits', 'topk_logits'], got 'logits'"),
    ("vllm_importance_sampling_mode", "token", "`vllm_importance_sampling_mode` must be one of ['token_truncate', "),
    ("loss_aggregation", "mean", "`loss_aggregation` must be one of ['token', 'sequence'], got 'mean'"),
    ("share_vision_features", "always", "`share_vision_features` must be one of ['auto', 'never'], got 'always'"),
    *[
        (n, value, f"`{n}` {INTEGER} {value!r}")
        for n in ("num_iterations", "teacher_sync_steps", "distillation_topk", "max_completion_length")
        for value in (0, -1, 1.5, "2")
    ],
    ("num_iterations", True, f"`num_iterations` {INTEGER} True"),
    *[
        ("teacher_update_rate", value, f"`teacher_update_rate` must be in (0, 1], got {value!r}")
        for value in (0.0, 1.1, math.nan, "0.1")
    ],
    *[("epsilon", value, f"`epsilon` must be in (0, 1), got {value!r}") for value in (0.0, 1.0, math.nan, None)],
    *[("epsilon_high", value, f"`epsilon_high` must be positive, got {value!r}") for value in (0.0, -0.1, math.nan)],
    *[
        ("advantage_clip", value, f"`advantage_clip` must be positive, got {value!r}")
        for value in (0.0, math.nan, "10")
    ],
    *[
        (name, value, f"`{name}` must be positive, got {value!r}")
        for name in ("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min")
        for value in (0.0, math.nan)
    ],
    *[
        ("temperature", value, f"`temperature` must be positive and finite, got {value!r}")
        for value in (0.0, -1.0, math.nan, math.inf)
    ],
    *[("top_p", value, f"`top_p` must be in (0, 1], got {value!r}") for value in (0.0, 2.0, math.nan)],
    *[("max_grad_norm", value, f"`max_grad_norm` must be at least 0, got {value!r}") for value in (-1.0, math.nan)],
    ("beta", 2.0, "beta must be in [0.0, 1.0], got 2.0"),
    ("beta", math.nan, "`beta` must be in [0, 1], got nan"),
    *[
        ("cue_column", value, f"`cue_column` {COLUMN} {value!r}")
        for value in ("", None, "prompt", "images", "videos", "video")
    ],
    ("answer_column", "image", f"`answer_column` {COLUMN} 'image'"),
    *[
        ("teacher_prompt_template", value, TEMPLATE)
        for value in (
            "",
            None,
            "{prompt}",
            "{privilege}",
            "{prompt} {privilege} {x}",
            "{prompt} {privilege} {",
            "{prompt} {privilege} {}",
            "{prompt!r} {privilege}",
            "{prompt:>9} {privilege}",
            "{prompt.__class__} {prompt} {privilege}",
            "{prompt} {privilege[0]}",
            "{{prompt}} {privilege}",
        )
    ],
]


@pytest.mark.parametrize("name, value, message", REFUSED_OPTIONS, ids=[f"{n}={v!r}" for n, v, _ in REFUSED_OPTIONS])
def test_option_is_refused(name, value, message):
    with pytest.raises(ValueError) as refusal:
        make_config(**{name: value})
    assert message in str(refusal.value)


def test_infinite_and_missing_limits_are_accepted():
    make_config(advantage_clip=math.inf, epsilon_high=math.inf, max_grad_norm=math.inf, max_completion_length=None)
    make_config(max_grad_norm=None)


def test_literal_braces_in_the_template_are_kept():
    config = make_config(teacher_prompt_template="{prompt} {{evidence}}: {privilege}")
    assert config.teacher_prompt_template.format(prompt="a", privilege="b") == "a {evidence}: b"


# Options that contradict each other or the model
CONFLICTS = {
    "sequence-mean-of-a-fused-sum": (
        dict(loss_aggregation="sequence", use_liger_kernel=True, distillation_mode="full_logits"),
        "`loss_aggregation='sequence'` needs the divergence of each token",
    ),
    "topk-beyond-the-vocabulary": (
        dict(distillation_mode="topk_logits", distillation_topk=264),
        "`distillation_topk=264` exceeds the vocabulary of 263 tokens",
    ),
    "compiled-model": (
        dict(torch_compile=True),
        "`torch_compile=True` is not supported: TRL replaces the compiled forward with one",
    ),
    "completion-beyond-the-context": (dict(max_completion_length=2048), "exceeds the model's context of 2048 tokens"),
}


@pytest.mark.parametrize("arguments, message", CONFLICTS.values(), ids=CONFLICTS)
def test_conflict_is_refused(arguments, message):
    with pytest.raises(ValueError) as refusal:
        build(**arguments)
    assert message in str(refusal.value)


def test_compilation_by_accelerate_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # set like this by `accelerate launch`
    build(peft_config=CueRecoveryConfig(layer_interval=2))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="`dynamo_backend=INDUCTOR` is not supported"):
        build(peft_config=CueRecoveryConfig(layer_interval=2))


# --- Models, processors and adapters ---


def test_teacher_with_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size 263 but the teacher model has vocab_size 300"):
        build(teacher=make_qwen3_vl(vocab_size=300))


def test_vllm_rollouts_with_two_modules_are_refused():
    model = get_peft_model(make_qwen3_vl(), CueRecoveryConfig(layer_interval=1))
    model.add_adapter("other", CueRecoveryConfig(layer_interval=1))
    with pytest.raises(ValueError, match="`use_vllm=True` with 2 recovery modules is not supported"):
        build(model=model, use_vllm=True)


def test_teacher_model_and_teacher_model_kind_contradict():
    with pytest.raises(ValueError, match="`teacher_model_kind='ema'` makes the student its own teacher"):
        build(teacher=make_qwen3_vl(), teacher_model_kind="ema")


def test_processor_without_chat_template_is_refused():
    processor = make_processor()
    processor.chat_template = None
    with pytest.raises(ValueError, match=r"\(Qwen3VLProcessor\) has no chat template"):
        build(processor=processor)


def test_text_model_and_tokenizer_are_refused():
    config = LlamaConfig(
        vocab_size=263, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    with pytest.raises(ValueError, match="model of type 'llama' without visual tokens.*`trl.DistillationTrainer`"):
        build(model=LlamaForCausalLM(config), processor=make_tokenizer())
    with pytest.raises(ValueError, match="with visual tokens and a .*Tokenizer"):
        build(processor=make_tokenizer())


REFUSED_RECOVERY_OPTIONS = [
    *[("layer_interval", value, f"`layer_interval` {INTEGER} {value!r}") for value in (0, -1, 1.5, "5", None, True)],
    *[
        (name, value, f"`{name}` {INTEGER} {value!r}")
        for name in ("num_heads", "bottleneck_size")
        for value in (0, -1, 1.5, "4")
    ],
    *[
        ("r", value, f"`r` must be 0 (no LoRA) or a positive LoRA rank, got {value!r}")
        for value in (-1, 1.5, "8", None)
    ],
    *[("sink_token", value, f"a token string, got {value!r}") for value in ("", None, 5)],
    ("train_base", "yes", "`train_base` must be True or False, got 'yes'"),
    *[("sink_token_ids", value, f"`sink_token_ids` must hold one token id, got {value!r}") for value in ([], [1, 2])],
    ("sink_token", "assistant", "is no longer an option: its token ids depend on"),
]


@pytest.mark.parametrize(
    "name, value, message", REFUSED_RECOVERY_OPTIONS, ids=[f"{n}={v!r}" for n, v, _ in REFUSED_RECOVERY_OPTIONS]
)
def test_option_of_the_module_is_refused(name, value, message):
    with pytest.raises(ValueError) as refusal:
        CueRecoveryConfig(**{name: value})
    assert message in str(refusal.value)


UNTRAINABLE = {
    "unknown-sink": (dict(sink_token="<|nobody|>"), "got '<|nobody|>', which the tokenizer does not know"),
    "sink-of-two-tokens": (dict(sink_token="user"), "got 'user', which the tokenizer does not know"),
    "interval-beyond-the-model": (
        dict(layer_interval=9),
        "`layer_interval` is 9, but the model has only 4 decoder layer",
    ),
    "heads-that-do-not-divide": (
        dict(num_heads=3),
        "`num_heads` must divide the hidden size, got 3 heads for 32",
    ),
    "heads-that-do-not-divide-the-bottleneck": (
        dict(num_heads=4, bottleneck_size=6),
        "`num_heads` must divide `bottleneck_size`, got 4 heads for 6",
    ),
    "another-hidden-size": (dict(hidden_size=64), "made for a model with `hidden_size` 64, but Qwen3VLFor"),
    "lora-on-the-head": (dict(r=4, target_modules=["lm_head"]), "adapter to `lm_head` is not supported"),
    "lora-on-nothing": (
        dict(r=4, target_modules=["query"]),
        "`target_modules` are {'query'}, but Qwen3VLForConditional",
    ),
    "for-inference": (
        dict(inference_mode=True),
        "The model has no trainable parameters, e.g. because its adapter was loaded with `inference_mode",
    ),
}


@pytest.mark.parametrize("config, message", UNTRAINABLE.values(), ids=UNTRAINABLE)
def test_adapter_that_cannot_be_trained_is_refused(config, message):
    with pytest.raises(ValueError) as refusal:
        build(peft_config=CueRecoveryConfig(**{"layer_interval": 2, **config}))
    assert message in str(refusal.value)


def test_rows_with_an_image_and_no_sink_token_are_refused():
    """The sink token occurs only in system turns: rows with an image need one, text-only rows do not."""
    processor = make_processor()
    processor.chat_template = processor.chat_template.replace(
        "{{ '<|im_start|>' + message.role",
        "{% if message.role == 'system' %}<|endoftext|>{% endif %}{{ '<|im_start|>' + message.role",
    )
    system = {"role": "system", "content": "Be brief."}
    row = make_rows(1)[0]
    rows = [{**row, "prompt": [system, *row["prompt"]]}, {**row, "images": []}, row]
    config = CueRecoveryConfig(layer_interval=2, sink_token="<|endoftext|>")
    message = r"Row 2 of train_dataset: The prompt has an image or video, .* lacks the sink token '<\|endoftext\|>'"
    with pytest.raises(ValueError, match=message):
        build(Dataset.from_list(rows * 2), processor=processor, peft_config=config)
    build(Dataset.from_list(rows[:2] * 2), processor=processor, peft_config=config)


def test_adapter_loaded_for_inference_is_refused(tmp_path):
    get_peft_model(make_qwen3_vl(), CueRecoveryConfig(layer_interval=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The model has no trainable parameters.*is_trainable=True"):
        build(model=PeftModel.from_pretrained(make_qwen3_vl(), tmp_path))
    build(model=PeftModel.from_pretrained(make_qwen3_vl(), tmp_path, is_trainable=True))


@pytest.mark.parametrize("version", ["1", "3", ""])
def test_unsupported_fsdp_version_is_refused(monkeypatch, version):
    arguments = make_config()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(ValueError, match=f"FSDP{version} is not supported: ViCuRTrainer needs FSDP2"):
        check_sharding(find_sharding(arguments), arguments, [None])


def test_trainable_tokens_with_fsdp2_are_refused(monkeypatch):
    arguments = make_config()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="`trainable_token_indices` cannot be trained with FSDP2.*Train with DDP"):
        check_sharding(find_sharding(arguments), arguments, [CueRecoveryConfig(r=2, trainable_token_indices=[5])])


@pytest.mark.parametrize("kind", ["TP", "CP", "SP"])
def test_tensor_context_and_sequence_parallelism_are_refused(monkeypatch, kind):
    arguments = make_config()
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv(f"PARALLELISM_CONFIG_{kind}_SIZE", "2")
    with pytest.raises(ValueError, match=f"Only data parallelism is supported, but .*{kind.lower()}_size=2"):
        check_sharding(find_sharding(arguments), arguments, [None])
