"""The rows that a model is asked about: what identifies them, which have text, and their prompts."""

import pytest
from datasets import Dataset
from tiny_models import make_image, make_rows

from trl_vicur.data.questions import QuestionRows


def make_dataset(**columns):
    rows = [{"question": f"Which {i}?", "image": make_image(i), "other": i} for i in range(3)]
    for name, values in columns.items():
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return Dataset.from_list(rows)


def test_settings_identify_rows_by_the_columns_that_are_read():
    dataset = make_dataset(cue=["a", "b", "c"])
    settings = QuestionRows(dataset, cue_column="cue", answer_column=None).settings()
    assert settings.keys() == {"question_column", "cue_column", "answer_column", "rows", "dataset"}
    assert (settings["question_column"], settings["cue_column"], settings["answer_column"]) == (
        "question",
        "cue",
        None,
    )
    changed = {
        "other": dataset.map(lambda row: {"other": 7}),
        "cue": dataset.map(lambda row: {"cue": "d"}),
        "image": dataset.map(lambda row: {"image": make_image(9)}),
    }
    digests = {name: QuestionRows(each, cue_column="cue").settings()["dataset"] for name, each in changed.items()}
    assert digests["other"] == settings["dataset"]
    assert len({settings["dataset"], digests["cue"], digests["image"]}) == 3


def test_columns_that_a_dataset_may_lack():
    dataset = make_dataset(cue=["a", "b", "c"])
    with pytest.raises(ValueError, match="`answer_column` is 'answer'"):
        QuestionRows(dataset, cue_column="cue", answer_column="answer")
    rows = QuestionRows(dataset, may_lack=["answer_column"], cue_column="cue", answer_column="answer")
    assert rows.value(1, "cue_column") == "b" and rows.value(1, "answer_column") is None
    assert rows.settings()["answer_column"] == "answer"


def test_rows_with_text():
    rows = QuestionRows(make_dataset(cue=["a", " \n", None]), cue_column="cue", other_column="other")
    assert rows.with_text("cue") == [0] and rows.with_text("other") == [0, 1, 2]
    assert rows.values("cue") == ["a", " \n", None]


def test_question_becomes_a_user_turn_with_the_image():
    (message,) = QuestionRows(make_dataset()).conversation(2)
    image, text = message["content"]
    assert message["role"] == "user" and text["text"] == "Which 2?"
    assert image["image"].tobytes() == make_image(2).tobytes()
    (message,) = QuestionRows(Dataset.from_list(make_rows(1))).conversation(0)
    assert message["content"][-1]["text"] == make_rows(1)[0]["prompt"][0]["content"]


@pytest.mark.parametrize("question", ["", "  ", None])
def test_blank_questions_are_refused(question):
    rows = QuestionRows(make_dataset(question=["Which?", question, "Which?"]))
    with pytest.raises(ValueError, match="asks nothing"):
        rows.conversation(1)
    rows.conversation(0)
