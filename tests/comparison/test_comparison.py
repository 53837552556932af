"""Answers of several models side by side: `compare_models`, its page, and the command `trl-vicur compare`."""

import re

import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from html_pages import Page
from peft import get_peft_model
from scripted_generators import ScriptedGenerator, text_of
from tiny_models import make_image, make_processor, make_qwen3_vl

from trl_vicur import CueRecoveryConfig
from trl_vicur.cli import main
from trl_vicur.comparison import compare_models, write_html_comparison


HOSTILE = "<script>alert(1)</script>"


def make_dataset(count=4):
    rows = {
        "prompt": [[{"role": "user", "content": f"How long is AB in picture {i}?"}] for i in range(count)],
        "images": [[make_image(i)] for i in range(count)],
        "cue": [f"AB is labelled {i} {HOSTILE}" for i in range(count)],
        "answer": [str(i) for i in range(count)],
    }
    features = {"prompt": List({"role": Value("string"), "content": Value("string")}), "images": List(ImageFeature())}
    return Dataset.from_dict(rows, Features(features | {name: Value("string") for name in ("cue", "answer")}))


def answering(*right, name="scripted", **arguments):
    """A generator that answers these rows correctly and all others with 99."""

    def reply(number, messages):
        assert text_of(messages) == f"How long is AB in picture {number}?", "the prompt does not contain the cue"
        return f"{HOSTILE} The answer is {number if number in right else 99}."

    return ScriptedGenerator(reply, model=name, **arguments)


def test_verdicts(tmp_path):
    dataset = make_dataset(5)
    dataset = dataset.remove_columns("answer").add_column("answer", ["0", "1", "2", "3", None])
    models = {"base": lambda: answering(0), "OPSD": lambda: answering(0, 1), "ViCuR": lambda: answering(0, 1, 2)}
    compared = compare_models(dataset, models)
    right = [
        None if row is None else [name for name, is_right in row.items() if is_right] for row in compared["correct"]
    ]
    assert right == [["base", "OPSD", "ViCuR"], ["OPSD", "ViCuR"], ["ViCuR"], [], None]
    assert compared["completions"][1]["base"] == f"{HOSTILE} The answer is 99."

    write_html_comparison(compared, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert page.rows == [1, 2], "only the rows on which the models disagree"
    assert "2 of 4 questions (50.0%)" in page.head
    text = re.sub(r"\s+", " ", page.head)
    assert "base 1 25.0% OPSD 2 50.0% ViCuR 3 75.0%" in text
    for right, verdict in enumerate(["✗ wrong✗ wrong✗ wrong", "✗ wrong✗ wrong✓ right", "✗ wrong✓ right✓ right"]):
        assert f"{verdict}125.0%" in text, right
    assert [button["value"] for button in page.attributes("button")] == ["all", "right-011", "right-001"]
    assert [card["data-groups"] for card in page.attributes("article")] == ["all right-011", "all right-001"]
    card = re.sub(r"\s+", " ", page.cards[1])
    assert f"CueAB is labelled 2 {HOSTILE}" in card and "Answer2" in card
    assert f"OPSD ✗ wrong {HOSTILE} The answer is 99." in card and f"ViCuR ✓ right {HOSTILE} The answer is 2." in card
    assert len(page.attributes("script")) == 1 and len(page.attributes("img")) == 2

    write_html_comparison(compared, tmp_path / "page.html", max_rows=1)
    assert Page((tmp_path / "page.html").read_text()).rows == [1, 2], "one row of each kind"


def test_a_failed_completion_is_wrong_and_says_why(tmp_path):
    def fail(number, messages):
        raise ValueError(f"cut {HOSTILE}")

    models = {"base": lambda: ScriptedGenerator(fail), "student": lambda: answering(0)}
    compared = compare_models(make_dataset(1), models)
    assert compared["correct"] == [{"base": False, "student": True}]
    assert compared["completion_errors"] == [{"base": f"cut {HOSTILE}", "student": None}]
    write_html_comparison(compared, tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_text())
    assert f"No completion. cut {HOSTILE}" in page.cards[0] and len(page.attributes("script")) == 1


def test_interrupted_comparison_continues(tmp_path):
    dying, again, other = answering(0), answering(0), answering(1, name="other")
    dying.die_at = 2
    with pytest.raises(KeyboardInterrupt):
        compare_models(make_dataset(), {"base": lambda: dying, "student": lambda: other}, tmp_path)
    compared = compare_models(make_dataset(), {"base": lambda: again, "student": lambda: other}, tmp_path)
    assert [request.number for request in again.requests] == [2, 3]
    assert [request.number for request in other.requests] == [0, 1, 2, 3]
    whole = compare_models(make_dataset(), {"base": lambda: answering(0), "student": lambda: answering(1)})
    assert compared["completions"] == whole["completions"] and compared["correct"] == whole["correct"]
    with pytest.raises(ValueError, match="model was 'scripted' and is 'new'"):
        models = {"base": lambda: answering(0, name="new"), "student": lambda: other}
        compare_models(make_dataset(), models, tmp_path)


@pytest.mark.parametrize(
    "names, change, message",
    [
        (["base"], {}, r"at least two models to compare, got \['base'\]"),
        (["base", "../x"], {}, "'../x' cannot be a model's name"),
        (["a", "b"], {"answer_column": "label"}, "`answer_column` is 'label'"),
        (["a", "b"], {"answer_column": "empty"}, "No row has an answer in 'empty'"),
    ],
)
def test_datasets_that_cannot_be_compared(names, change, message):
    dataset = make_dataset(1).add_column("empty", [" "])
    with pytest.raises(ValueError, match=message):
        compare_models(dataset, {name: lambda: answering(0) for name in names}, **change)


def test_page_of_a_dataset_that_was_not_compared(tmp_path):
    with pytest.raises(ValueError, match="with `compare_models`"):
        write_html_comparison(make_dataset(1), tmp_path / "page.html")


# --- The command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, an adapter for it, a student that is a separate model, and questions."""
    folder = tmp_path_factory.mktemp("comparison")
    for name, seed in (("model", 0), ("student", 1)):
        make_qwen3_vl(seed=seed).save_pretrained(folder / name)
        make_processor().save_pretrained(folder / name)
    get_peft_model(make_qwen3_vl(), CueRecoveryConfig(layer_interval=1)).save_pretrained(folder / "adapter")
    make_dataset(3).save_to_disk(folder / "questions")
    return folder


def test_command(folder, capsys):
    arguments = ["compare", "--model", str(folder / "model"), "--dataset", str(folder / "questions")]
    arguments += ["--output", str(folder / "out"), "--adapter", f"ViCuR={folder / 'adapter'}"]
    arguments += ["--student", f"OPSD={folder / 'student'}", "--max_new_tokens", "4", "--num_rows", "2"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "2 questions" in output and f"shown in {folder}/out/comparison.html" in output
    assert all(name in output for name in ("base", "ViCuR", "OPSD"))
    assert {path.name for path in (folder / "out").iterdir()} == {
        "base.sqlite",
        "ViCuR.sqlite",
        "OPSD.sqlite",
        "comparison.html",
    }
    assert "ViCuR" in (folder / "out" / "comparison.html").read_text()
    assert main([*arguments, "--max_new_tokens", "5"]) == 1
    assert "max_new_tokens was 4 and is 5" in capsys.readouterr().err


def test_names_of_students(folder, capsys):
    arguments = ["compare", "--model", "m", "--dataset", str(folder / "questions"), "--output", "o"]
    assert main([*arguments, "--adapter", "a=x", "--student", "a=y"]) == 1
    assert "its own name, got ['base', 'a', 'a']" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--adapter", "path"])
    assert stop.value.code == 2 and "expected NAME=PATH, got 'path'" in capsys.readouterr().err
