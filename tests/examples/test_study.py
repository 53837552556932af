"""The component study: its data, one cell from start to end, its tables, and its interventions."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import get_peft_model
from PIL import Image, ImageDraw
from tiny_models import make_image
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_vicur.cue_recovery import SinkCrossAttention
from trl_vicur.cues import audit_cue
from trl_vicur.data.rows import row_images


STUDY = Path(__file__).parents[2] / "examples" / "study"
sys.path.insert(0, str(STUDY))

import attention_sink  # noqa: E402
import cells  # noqa: E402
import domains  # noqa: E402
import geometry  # noqa: E402
import interventions  # noqa: E402
import records  # noqa: E402
import run  # noqa: E402
import summary  # noqa: E402
import wrong_evidence  # noqa: E402


# --- Bases with an attention sink ---


@pytest.mark.parametrize("name", attention_sink.ROWS)
def test_only_bases_with_a_sink_attend_to_the_first_token(name):
    shares = []
    test = domains.DOMAINS[name].load("test")
    for domain in (domains.DOMAINS[name], domains.DOMAINS[f"{name}_sink"]):
        processor = AutoProcessor.from_pretrained(domain.base)
        model = AutoModelForImageTextToText.from_pretrained(domain.base, attn_implementation="eager")
        inputs = attention_sink.completed(model, processor, domain, [test[row] for row in range(8)])
        with torch.no_grad():
            attentions = model(**inputs, output_attentions=True).attentions[1:]
        on_first = attention_sink.attention_on_first_token(attentions, inputs["attention_mask"])
        first = inputs["attention_mask"].argmax(1)
        assert first.max() > 0  # shorter prompts are padded
        assert len(on_first[0]) == inputs["attention_mask"].sum() - len(first)
        torch.testing.assert_close(on_first[0][0], attentions[0][0, :, first[0] + 1, first[0]])
        shares.append(min(weights.mean() for weights in on_first))
    assert shares[0] < 0.15 and shares[1] > 0.5


# --- The diagrams ---


@pytest.fixture(scope="module")
def drawn():
    """The first scenes of each split, with their images."""
    splits = {name: split._replace(rows=100) for name, split in geometry.SPLITS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "SPLITS", splits)
        return {name: geometry.sample_split(name) for name in splits}


def solve(scene):
    """The answer, computed from the positions of lines and labels, independently of the generator."""
    figure, (kind, _) = scene.figure, scene[:2]
    given = dict(re.findall(r"(\w)=(\d+)", figure.question))
    values = {label: given.get(label.text, label.text) for label in figure.labels}
    values = {label: int(text) for label, text in values.items() if text.isdigit()}

    def center(label):
        return complex(label.column + 0.5, label.row + 0.5) * geometry.PATCH

    def nearest(point, labels):
        return min(labels, key=lambda label: abs(center(label) - point))

    points = [[complex(*point) for point in line] for line in figure.lines]
    unknown = [label for label in figure.labels if label.text == "x"]
    if kind == "crossing chords":
        middle = complex(geometry.IMAGE_SIZE, geometry.IMAGE_SIZE) / 2
        opposite = nearest(2 * middle - center(unknown[0]), values)
        a, b = (value for label, value in values.items() if label != opposite)
        return a * b / values[opposite]
    if kind == "right triangle":
        corners = sorted(points[0][:3], key=lambda corner: abs(corner - points[1][1]))[1:]  # without the marked one
        angles = [nearest(corner, figure.labels) for corner in corners]
        [known] = [label for label in angles if label.text != "x"]
        return 90 - values[known]
    if kind == "isosceles triangle":
        is_angle = {label: min(abs(center(label) - corner) for corner in points[0][:2]) for label in values}
        angle, half = sorted(is_angle, key=is_angle.__getitem__)
        return 2 * values[half] if "base" in figure.question else 180 - 2 * values[angle]
    if kind == "parallel lines":
        top, bottom = points[2]
        down = (bottom - top) / (bottom - top).imag

        def is_acute(label):
            line = min(points[:2], key=lambda line: abs(line[0].imag - center(label).imag))[0].imag
            beside = center(label) - (top + down * (line - top.imag))
            return beside.real * (down * beside.imag).real > 0

        [(known, value)] = values.items()
        return value if is_acute(known) == is_acute(unknown[0]) else 180 - value

    def read(name):
        column = next(label.column for label in figure.labels if label.text == name)
        if scene.style == "direct":
            return next(value for label, value in values.items() if label.column == column)
        at = (column + 0.5) * geometry.PATCH
        tops = [min(bar)[1] for bar in figure.bars if bar[0][0] <= at <= bar[1][0]]
        tops += [point.imag for point in points[-1] if abs(point.real - at) < 1]
        return values[nearest(complex(0.5 * geometry.PATCH, tops[0]), values)]

    more, less = re.findall(r" (\w)\b(?= than| \?| to)", figure.question)
    return read(more) - read(less) if kind == "bar chart" else read(less) - read(more)


def test_answers_follow_from_lines_and_label_positions(drawn):
    for scene, _ in (pair for split in drawn.values() for pair in split):
        assert solve(scene) == scene.figure.answer, scene


def test_calculations_are_right_and_start_from_the_cue_and_the_question(drawn):
    signs = {"-": int.__sub__, "*": int.__mul__, "/": int.__floordiv__}
    for scene, _ in (pair for split in drawn.values() for pair in split):
        known = {*re.findall(r"\d+", f"{scene.figure.cue} {scene.figure.question}"), "2", "90", "180"}
        for left, sign, right, result in re.findall(r"(\d+) ([-*/]) (\d+) = (\d+)", scene.figure.steps):
            assert {left, right} <= known
            assert signs[sign](int(left), int(right)) == int(result)
            known.add(result)
        assert str(scene.figure.answer) in known
        row = {"cue": scene.figure.cue, "answer": str(scene.figure.answer)}
        assert domains.score_geometry(scene.completion, row) == (True, True)
        assert domains.score_geometry(scene.completion_ending_in(0), row) == (False, True)


def test_splits_share_no_labelling_and_are_reproducible(drawn):
    labellings = {name: {geometry.labelling(scene) for scene, _ in split} for name, split in drawn.items()}
    for name, own in labellings.items():
        for other in labellings.keys() - {name}:
            assert not own & labellings[other]
    rows = domains.shortened(domains.DOMAINS["geometry"], 3).load("validation")
    for row, (scene, image) in zip(rows, drawn["validation"], strict=False):
        assert row["cue"] == scene.figure.cue and row_images(row)[0].tobytes() == image.tobytes()


def test_out_of_domain_combinations_are_in_no_other_split(drawn):
    for name, split in drawn.items():
        combinations = {(scene.kind, scene.style) for scene, _ in split}
        assert combinations == set(geometry.OUT_OF_DOMAIN if name == "test_ood" else geometry.IN_DOMAIN)


def test_cues_of_diagrams_pass_the_audit(drawn):
    for scene, _ in drawn["distillation"]:
        figure = scene.figure
        labels = [label.text for label in figure.labels]
        audit = audit_cue(figure.cue, figure.question, str(figure.answer), labels)
        assert audit.usable, (scene, audit.reasons)


def test_each_label_is_visible_in_its_own_visual_token(drawn):
    for scene, image in drawn["test"]:
        tokens = scene.label_tokens
        assert len(set(tokens)) == len(tokens)
        boxes = interventions.tile_boxes(image, geometry.TOKENS_PER_SIDE)
        assert all(image.crop(boxes[token]).convert("L").getextrema()[0] < 80 for token in tokens)


# --- Rows of real datasets ---


@pytest.mark.parametrize(
    "row, answer",
    [
        ({"images": [make_image(0)], "problem": "<image>Find x.", "answer": "3"}, "3"),  # Geometry3K
        ({"image": make_image(0), "problem": "Find x.", "solution": "<answer> 3 </answer>"}, "3"),  # Vision-R1
        ({"images": [make_image(0)], "prompt": [{"role": "user", "content": "Find x."}], "answer": "3"}, "3"),
    ],
)
def test_rows_of_real_datasets_are_accepted(tmp_path, row, answer):
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


# --- Records ---


def test_last_record_of_a_name_counts(tmp_path):
    path = tmp_path / "new" / "easy_vqa.jsonl"
    assert records.read_records(path, "run") == {}
    for kind, name, value in (("run", "a", 1), ("run", "b", 2), ("base", "a", 3), ("run", "a", 4)):
        records.append_record(path, kind, name, {"value": value})
    assert records.read_records(path, "run") == {"a": {"value": 4}, "b": {"value": 2}}
    assert records.read_records(path, "base") == {"a": {"value": 3}}


def test_record_of_a_killed_process_is_ignored_and_overwritten(tmp_path):
    path = tmp_path / "easy_vqa.jsonl"
    records.append_record(path, "run", "a", {"value": 1})
    whole = path.read_bytes()
    unfinished = whole.replace(b'"a"', b'"b"')
    for length in range(1, len(unfinished) - 1):
        path.write_bytes(whole + unfinished[:length])
        assert records.read_records(path, "run") == {"a": {"value": 1}}
    records.append_record(path, "run", "c", {"value": 3})
    assert records.read_records(path, "run") == {"a": {"value": 1}, "c": {"value": 3}}
    assert len(path.read_bytes().splitlines()) == 2


def test_last_record_without_line_break_is_kept(tmp_path):
    path = tmp_path / "easy_vqa.jsonl"
    records.append_record(path, "run", "a", {"value": 1})
    path.write_bytes(path.read_bytes().rstrip())
    assert records.read_records(path, "run") == {"a": {"value": 1}}
    records.append_record(path, "run", "b", {"value": 2})
    assert records.read_records(path, "run") == {"a": {"value": 1}, "b": {"value": 2}}


def test_damaged_record_is_named_by_its_line(tmp_path):
    path = tmp_path / "easy_vqa.jsonl"
    for name in "abc":
        records.append_record(path, "run", name, {})
    path.write_text(path.read_text().replace('"b"', '"b'))
    with pytest.raises(ValueError, match=r"easy_vqa\.jsonl, line 2 is not JSON"):
        records.read_records(path, "run")


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "easy_vqa.jsonl"
    code = (
        "import sys, pathlib, records\n"
        "for i in range(50):\n"
        "    records.append_record(pathlib.Path(sys.argv[1]), 'run', f'{sys.argv[2]}-{i}', {'right': '3' * 20_000})\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path), name], cwd=STUDY) for name in "abcd"]
    assert [process.wait() for process in processes] == [0] * 4
    known = records.read_records(path, "run")
    assert known.keys() == {f"{name}-{i}" for name in "abcd" for i in range(50)}
    assert all(len(result["right"]) == 20_000 for result in known.values())


def test_committed_results_have_a_base_and_known_cells():
    paths = sorted(records.RESULTS.glob("*.jsonl"))
    assert [path.stem for path in paths] == sorted(domains.DOMAINS)
    for path in paths:
        assert list(records.read_records(path, "base")) == ["base"]
        for name, result in records.read_records(path, "run").items():
            cell = name.removesuffix(run.run_name("", result["learning_rate"], result["seed"]))
            assert cell in cells.GRID | cells.REMOVED


# --- A cell end to end ---


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with the results and the student of one cell, trained for two steps in its own process."""
    folder = tmp_path_factory.mktemp("study")
    arguments = ["--domain", "easy_vqa", "--max_steps", "2", "--max_rows", "64"]
    arguments += ["--results", str(folder / "results"), "--output_dir", str(folder / "students")]
    cell = ["--cell", "cue+module", "--learning_rate", "0.001", "--seed", "0"]
    result = subprocess.run([sys.executable, str(STUDY / "run.py"), *arguments, *cell], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder, arguments


@pytest.mark.parametrize("name", [name for name, cell in cells.GRID.items() if cell.module])
def test_every_module_of_the_grid_fits_its_base(name):
    cell, domain = cells.GRID[name], domains.DOMAINS["easy_vqa"]
    model = AutoModelForImageTextToText.from_pretrained(domain.base)
    whole_size = model.num_parameters()
    model = get_peft_model(model, run.peft_config(cell, domain))
    if cell.shared_weights:
        run.share_weights(model)
    modules = {module for module in model.modules() if isinstance(module, SinkCrossAttention)}
    assert len(modules) == (1 if cell.one_layer or cell.shared_weights else 2)
    added = sum(parameter.numel() for module in modules for parameter in module.parameters())
    assert (added < 0.01 * whole_size) == (cell.bottleneck_size is not None)


@pytest.mark.slow
def test_cell_appends_one_record_with_all_that_the_tables_need(study):
    folder, _ = study
    known = records.read_records(folder / "results" / "easy_vqa.jsonl", "run")["cue+module-lr0.001-seed0"]
    assert known["seed"] == 0 and known["learning_rate"] == 1e-3 and known["cell"]["module"]
    assert known["parameters"]["trainable"] > known["parameters"]["module"] > 0
    assert [point["step"] for point in known["curve"]] == [1, 2]
    assert len(known["validation"]["right"]) == len(known["test"]["right"]) == 64
    assert sum(epoch["rollouts"] for epoch in known["leakage"]) == 2 * 32
    assert set(known["update_ratio"]) == {"layers.1", "layers.3"}


@pytest.mark.slow
def test_only_missing_runs_are_started_and_all_are_in_the_tables(study, monkeypatch):
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

    figures = folder / "figures.json"
    monkeypatch.setattr(sys, "argv", ["summary.py", "--results", str(folder / "results"), "--json", str(figures)])
    summary.main()
    tables = (folder / "results" / "README.md").read_text()
    assert "| `cue+module` | 1 |" in tables and "| base that reads the cue |" in tables
    assert (folder / "results" / "easy_vqa.png").stat().st_size > 10_000
    known = json.loads(figures.read_text())["easy_vqa"]
    [student] = records.read_records(folder / "results" / "easy_vqa.jsonl", "run").values()
    assert known["cells"]["cue+module"]["scores"]["test"]["accuracy"]["mean"] == student["test"]["accuracy"]
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


@pytest.mark.slow
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
    assert torch.equal(logits(), intact)  # interventions leave no trace
    for changed in (zeroed, swapped, hidden):
        assert not torch.allclose(changed, intact, atol=1e-4)


def test_interventions_have_a_table(tmp_path):
    path = tmp_path / "easy_vqa.jsonl"
    assert summary.interventions_markdown(path, "accuracy") == []
    with_module = {"zero": {"accuracy": 0.25}, "attention on evidence, over uniform": {"layers.1": 1.5}}
    for run_name, found in (("cue", {}), ("cue+module", with_module)):
        records.append_record(path, "interventions", run_name, {"intact": {"accuracy": 0.5}, **found})
    *_, header, _, without, with_module, _ = summary.interventions_markdown(path, "accuracy")
    assert header == "| | intact | zero | attention on evidence, over uniform |"
    assert without == "| `cue` | 50.0% |  |  |" and with_module == "| `cue+module` | 50.0% | 25.0% | 1.50 |"


def test_images_are_changed_only_where_intended():
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


# --- Wrong evidence ---


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("the half is k and the angle is b", "right"),
        ("the half is b and the angle is k", "swapped"),
        ("the half is k and the angle is k", "repeated"),
        ("the half is k and the angle is c", "other"),
        ("the half is k", "other"),
    ],
)
def test_evidence_is_classified_by_its_error(said, kind):
    completion = f"{said} . k: 4 . 2 * 4 = 8 . the answer is 8 ."
    assert wrong_evidence.kind_of_evidence(completion, "the half is k and the angle is b") == kind


def test_wrong_evidence_of_the_base_is_counted_and_has_a_table(tmp_path, monkeypatch):
    domain = domains.shortened(domains.DOMAINS["geometry"], 24)
    monkeypatch.setitem(domains.DOMAINS, "geometry", domain)
    monkeypatch.setattr(sys, "argv", ["wrong_evidence.py", "--results", str(tmp_path)])
    wrong_evidence.main()
    path = tmp_path / "geometry.jsonl"
    [known] = records.read_records(path, "wrong_evidence").values()
    found = known["evidence"]
    assert set(found) == {"isosceles triangle, indirect", "line chart, indirect"}
    assert sum(sum(counts.values()) for counts in found.values()) == 24
    model = interventions.load_student(domain, Path(domain.base))
    scores = domains.evaluate(model, AutoProcessor.from_pretrained(domain.base), domain, domain.load("test_ood"))
    right = sum(counts["right"] for counts in found.values())
    assert 0 < right == round(24 * scores["evidence_accuracy"])

    assert summary.wrong_evidence_markdown(tmp_path / "easy_vqa.jsonl") == []
    lines = summary.wrong_evidence_markdown(path)
    counts = " | ".join(str(count) for count in found["isosceles triangle, indirect"].values())
    assert f"| `test_ood-base` | isosceles triangle, indirect | {counts} |" in lines

    # The teacher follows the cue, even after a wrong name; the base repeats no name
    sides = known["second name"]["isosceles triangle"]
    assert sides["teacher"]["right"] > 0.95 and sides["teacher"]["wrong"] > 0.5
    assert sides["student"]["right"] > 0.9 and sides["student"]["wrong"] < 0.1
    assert lines[-2].startswith("| `test_ood-base` | isosceles triangle | 1.00 / 0.")
