"""The trainer accepts datasets of any known layout."""

import pytest
from datasets import Dataset, IterableDataset
from tiny_models import make_image
from tiny_trainers import make_trainer, train_logs


QUESTION = "What is in the picture?"


def llava(i: int) -> dict:
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}" + "?" * i}, {"from": "gpt", "value": "yes"}]
    return {"image": make_image(i), "conversations": turns, "cue": f"noise number {i}"}


def question(i: int) -> dict:
    return {"problem": QUESTION + "?" * i, "solution": "yes", "image": make_image(i), "cue": f"noise number {i}"}


def trl(i: int) -> dict:
    content = [{"type": "image"}, {"type": "text", "text": QUESTION + "?" * i}]
    return {"prompt": [{"role": "user", "content": content}], "images": [make_image(i)], "cue": f"noise number {i}"}


def logs(tmp_path, processor, rows, **options):
    trainer = make_trainer(tmp_path, processor, rows=rows, **options)
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in train_logs(trainer)]


@pytest.mark.parametrize("layout", [llava, question])
def test_all_layouts_train_as_trl_rows(tmp_path, processor, layout):
    expected = logs(tmp_path, processor, [trl(i) for i in range(8)])
    assert logs(tmp_path, processor, [layout(i) for i in range(8)]) == expected
    assert expected[0][0] != 0


def test_the_last_assistant_turn_is_the_answer(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, rows=[llava(i) for i in range(8)], privilege="answer")
    assert [row["answer"] for row in trainer.train_dataset] == ["yes"] * 8


def test_evaluation_datasets_and_streams_are_read_as_well(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, rows=[trl(i) for i in range(8)])
    metrics = trainer.evaluate(Dataset.from_list([question(i) for i in range(2)]))
    stream = IterableDataset.from_generator(lambda: (llava(i) for i in range(2)))
    assert trainer.evaluate(stream).keys() == metrics.keys()


def test_columns_are_named_by_an_option(tmp_path, processor):
    rows = [{"q": QUESTION, "gold": "yes", "answer": "no", "image": make_image(i), "cue": "noise"} for i in range(8)]
    trainer = make_trainer(tmp_path, processor, rows=rows, columns="prompt=q, answer=gold")
    assert trainer.train_dataset[0]["answer"] == "yes"
    assert trainer.train_dataset[0]["prompt"][0]["content"][1]["text"] == QUESTION


@pytest.mark.parametrize(
    "rows, options, message",
    [
        (
            [{"question": QUESTION, "problem": QUESTION, "image": None, "cue": "x"}] * 8,
            {},
            "train_dataset cannot be read: Several columns could hold the prompt",
        ),
        ([question(0)] * 7 + [{**question(0), "problem": None}], {}, "train_dataset cannot be read: Row 7: `problem`"),
        ([trl(0)] * 8, {"columns": "prompt"}, "`columns` is 'prompt', expected pairs such as"),
        ([trl(0)] * 8, {"columns": "prompt=q"}, "`columns` names 'q' for 'prompt', but the dataset has"),
        ([{"text": "A cat.", "image": None, "cue": "x"}] * 8, {}, "train_dataset has no column `prompt`"),
    ],
    ids=["ambiguous", "bad row", "malformed option", "wrong option", "unknown"],
)
def test_other_layouts_are_refused(tmp_path, processor, rows, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, processor, rows=rows, **options)
