"""The component study: its data, one cell from start to end, its tables, and its interventions."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from PIL import Image, ImageDraw
from tiny_models import make_image

from trl_vicur.dataset_rows import row_images


STUDY = Path(__file__).parents[1] / "examples" / "study"
sys.path.insert(0, str(STUDY))

import cells  # noqa: E402
import domains  # noqa: E402
import interventions  # noqa: E402
import run  # noqa: E402
import summary  # noqa: E402


# --- Rows of real datasets ---


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"images": [make_image(0)], "problem": "<image>Find x.", "answer": "3"}, "3"),  # Geometry3K
        ({"image": make_image(0), "problem": "Find x.", "solution": "<answer> 3 </answer>"}, "3"),  # Vision-R1
        ({"images": [make_image(0)], "prompt": [{"role": "user", "content": "Find x."}], "answer": "3"}, "3"),
    ],
)
def test_real_rows_drop_in(tmp_path, row, answer):
    rows = [{**row, "cue": f"cue {number}", "id": number} for number in range(6)]
    DatasetDict(train=Dataset.from_list(rows), test=Dataset.from_list(rows[:1])).save_to_disk(tmp_path)
    splits = {
        split: domains.load_rows(str(tmp_path), split, num_validation_rows=2)
        for split in ("distillation", "validation", "test")
    }
    assert [len(dataset) for dataset in splits.values()] == [4, 2, 1]
    assert not set(splits["distillation"]["cue"]) & set(splits["validation"]["cue"])
    loaded = splits["test"][0]
    assert loaded["prompt"] == [{"role": "user", "content": "Find x."}] and loaded["answer"] == answer
    assert row_images(loaded)[0].size == (64, 64)
    assert domains.score_math(r"So x is \boxed{\frac{6}{2}}.", loaded) == (True, None)
    assert domains.score_math(r"So x is \boxed{4}.", loaded) == (False, None)


def test_missing_column_is_named(tmp_path):
    rows = Dataset.from_list([{"images": [make_image(0)], "text": "Find x."}])
    DatasetDict(train=rows, test=rows).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"'problem'.*\['images', 'text'\]"):
        domains.load_rows(str(tmp_path), "test")


# --- A cell from start to end ---


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with the results and the student of one cell, trained for two steps in a process of its own."""
    folder = tmp_path_factory.mktemp("study")
    arguments = ["--domain", "easy_vqa", "--max_steps", "2", "--max_rows", "64"]
    arguments += ["--results", str(folder / "results"), "--output_dir", str(folder / "students")]
    cell = ["--cell", "cue+module", "--learning_rate", "0.001", "--seed", "0"]
    result = subprocess.run([sys.executable, str(STUDY / "run.py"), *arguments, *cell], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, arguments


def test_cell_leaves_one_file_with_all_that_the_tables_need(study):
    folder, _ = study
    [path] = (folder / "results").rglob("*.json")
    known = json.loads(path.read_text())
    assert known["seed"] == 0 and known["learning_rate"] == 1e-3 and known["cell"]["module"]
    assert known["parameters"]["trainable"] > known["parameters"]["module"] > 0
    assert [point["step"] for point in known["curve"]] == [1, 2]
    assert len(known["validation"]["right"]) == len(known["test"]["right"]) == 64
    assert sum(epoch["rollouts"] for epoch in known["leakage"]) == 2 * 32
    assert set(known["update_ratio"]) == {"layers.1", "layers.3"}


def test_only_what_is_missing_is_run_and_all_of_it_is_in_the_tables(study, monkeypatch):
    folder, arguments = study
    started = []

    def fail(command, **kwargs):
        started.append(command[-6:])
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setitem(cells.GRID, "cue+module", cells.Cell(learning_rates=(1e-3,)))
    monkeypatch.setattr(run.subprocess, "run", fail)
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, "--seeds", "2", "--cells", "cue+module"])
    run.main()
    # Seed 0 is there; seed 1 has the learning rate that was best with seed 0
    assert started == [["--cell", "cue+module", "--learning_rate", "0.001", "--seed", "1"]]

    monkeypatch.setattr(sys, "argv", ["summary.py", "--results", str(folder / "results")])
    summary.main()
    tables = (folder / "results" / "README.md").read_text()
    assert "| `cue+module` | 1 |" in tables and "| base that reads the cue |" in tables
    assert (folder / "results" / "easy_vqa.png").stat().st_size > 10_000
    known = json.loads((folder / "results" / "summary.json").read_text())["easy_vqa"]
    run_known = json.loads(next((folder / "results" / "easy_vqa").glob("cue+module-*.json")).read_text())
    assert known["cells"]["cue+module"]["scores"]["test"]["accuracy"]["mean"] == run_known["test"]["accuracy"]
    assert known["base"]["test_with_cue"]["accuracy"] > known["base"]["test"]["accuracy"]


def test_difference_is_paired_and_has_an_interval():
    def runs(*rights):
        return {seed: {"test": {"right": right * 50}} for seed, right in enumerate(rights)}

    better, worse = runs("1133", "1313"), runs("0033", "0013")
    same = summary.paired_difference(worse, worse, "test", "accuracy")
    assert same == {"seeds": 2, "mean": 0.0, "low": 0.0, "high": 0.0}
    difference = summary.paired_difference(better, worse, "test", "accuracy")
    assert difference["mean"] == 0.5 and 0.3 < difference["low"] < 0.5 < difference["high"] < 0.7
    assert summary.paired_difference(better, worse, "test", "grounded_accuracy")["mean"] == 0.125
    assert summary.paired_difference(better, {}, "test", "accuracy") is None


# --- Interventions ---


def test_interventions_reach_the_module(study):
    folder, _ = study
    domain = domains.DOMAINS["easy_vqa"]
    processor = interventions.AutoProcessor.from_pretrained(domain.base)
    [student] = (folder / "students").rglob("student")
    model = interventions.load_student(domain, student)
    for module in model.modules():
        if isinstance(module, interventions.SinkCrossAttention):
            torch.nn.init.normal_(module.o_proj.weight)
    rows = list(domain.load("validation").select(range(3)))
    inputs = domains.easy_vqa_dataset.encode(rows, processor)
    tokens = [interventions.evidence_tokens(row, 3) for row in rows]

    @torch.no_grad()
    def logits():
        return model(**inputs).logits[:, -1]

    intact = logits()
    with interventions.changed_update(model, torch.zeros_like):
        zeroed = logits()
    with interventions.changed_update(model, lambda update: update.roll(1, dims=0)):
        swapped = logits()
    with interventions.hidden_tokens(model, tokens, batch_size=3):
        hidden = logits()
    assert torch.equal(logits(), intact)  # and nothing stays behind
    for changed in (zeroed, swapped, hidden):
        assert not torch.allclose(changed, intact, atol=1e-4)


def test_interventions_have_a_table(tmp_path):
    assert summary.interventions_markdown(tmp_path, "easy_vqa", "accuracy") == []
    (tmp_path / "easy_vqa" / "interventions").mkdir(parents=True)
    with_module = {"zero": {"accuracy": 0.25}, "attention on evidence, over uniform": {"layers.1": 1.5}}
    for run_name, found in (("cue", {}), ("cue+module", with_module)):
        path = tmp_path / "easy_vqa" / "interventions" / f"{run_name}.json"
        path.write_text(json.dumps({"intact": {"accuracy": 0.5}, **found}))
    *_, header, _, with_module, without, _ = summary.interventions_markdown(tmp_path, "easy_vqa", "accuracy")
    assert header == "| | intact | zero | attention on evidence, over uniform |"
    assert without == "| `cue` | 50.0% |  |  |" and with_module == "| `cue+module` | 50.0% | 25.0% | 1.50 |"


def test_pictures_are_changed_where_they_should_be():
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((24, 2, 40, 18), fill="red")  # all in the middle of the upper third
    row = {"images": [image]}
    tokens, others = interventions.evidence_tokens(row, 3), interventions.other_tokens(row, 3)
    assert tokens == [1] and len(others) == 1 and others != tokens
    [blank] = interventions.blanked(row, tokens, 3)["images"]
    assert blank.getcolors() == [(64 * 64, (255, 255, 255))]
    [blank] = interventions.blanked(row, others, 3)["images"]
    assert blank.tobytes() == image.tobytes()
    [shuffled] = interventions.shuffled(row, 3, seed=0)["images"]
    assert interventions.evidence_tokens({"images": [shuffled]}, 3) != tokens
