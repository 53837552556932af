"""The quickstart from start to end, shortened to a few steps, and its data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def easy_vqa_dataset():
    sys.path.insert(0, str(EXAMPLES))
    import easy_vqa_dataset

    return easy_vqa_dataset


@pytest.mark.slow
def test_quickstart_runs_and_reports(tmp_path):
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--max_steps", "2", "--compare", "--seed", "1"]
    result = subprocess.run([*command, "--output_dir", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    last_line = result.stdout.strip().splitlines()[-1]
    assert last_line.startswith("Saved the adapter in") and "Next:" in last_line
    assert "all 256 completions are the same" in result.stdout

    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("base", "cue_teacher", "student", "answer_student"):
        assert 0 <= results[name]["grounded_accuracy"] <= results[name]["accuracy"] <= 1
    assert results["settings"]["seed"] == 1 and results["settings"]["max_steps"] == 2
    # The quickstart depends on a base that sees badly and trusts hints
    assert results["base"]["grounded_accuracy"] < 0.7
    assert results["cue_teacher"]["grounded_accuracy"] > 0.9
    assert (tmp_path / "sink_attention.png").stat().st_size > 10_000
    assert (tmp_path / "student" / "adapter_config.json").is_file()


def test_committed_base_is_small():
    assert sum(path.stat().st_size for path in (EXAMPLES / "quickstart_base").iterdir()) <= 8 * 2**20


@pytest.mark.slow
def test_no_image_is_in_two_splits(easy_vqa_dataset):
    from datasets import Image, List

    def paths(split):
        dataset = easy_vqa_dataset.load_easy_vqa(split).cast_column("images", List(Image(decode=False)))
        return {path["path"] for images in dataset["images"] for path in images}

    vision, base, distillation, test = (paths(split) for split in ("vision", "base", "distillation", "test"))
    assert base < vision
    assert not vision & distillation and not (vision | distillation) & test
    assert len(test) > 800


def test_cues_describe_the_scene_and_not_the_answer(easy_vqa_dataset):
    """All rows about an image have the same cue, and it answers each of their questions."""
    dataset = easy_vqa_dataset.load_easy_vqa("test")
    rows = zip(dataset["prompt"], dataset["cue"], dataset["answer"], strict=True)
    for prompt, cue, answer in rows:
        scene = easy_vqa_dataset.Scene(*cue.split()[1:])
        assert easy_vqa_dataset.answer_question(prompt[0]["content"], scene) == answer


@pytest.mark.parametrize(
    "completion, accuracy, grounded_accuracy",
    [
        ("the image shows a teal circle . the answer is no .", 1, 1),
        ("the image shows a red circle . the answer is no .", 1, 0),
        ("the image shows a teal circle . the answer is yes .", 0, 0),
        ("no", 0, 0),
        ("the Hint says no", 0, 0),
    ],
)
def test_score(easy_vqa_dataset, completion, accuracy, grounded_accuracy):
    from datasets import Dataset

    dataset = Dataset.from_list([{"cue": "a teal circle", "answer": "no"}])
    scores = easy_vqa_dataset.score([completion], dataset)
    assert scores["accuracy"] == accuracy and scores["grounded_accuracy"] == grounded_accuracy
    assert scores["hint_leakage"] == ("Hint" in completion)
