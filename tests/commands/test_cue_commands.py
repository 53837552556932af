"""The command `trl-vicur cues`, as users type it."""

import json
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from openai_server import OpenAIServer, Reply, completion, question_of
from tiny_models import make_image, make_processor, make_qwen3_vl, make_rows

from trl_vicur.cli import main


@pytest.fixture
def dataset_folder(tmp_path):
    dataset = Dataset.from_list(make_rows(4)).remove_columns("cue")
    dataset = dataset.remove_columns("answer").add_column("answer", ["12", "12", "12", "12"])
    dataset.save_to_disk(str(tmp_path / "dataset"))
    return str(tmp_path / "dataset")


def number_of(payload: dict) -> int:
    return int(question_of(payload).split()[-1].rstrip("?"))


def one_of_each_kind(payload: dict) -> Reply:
    """A clean cue, an answer leak, a reasoning leak, and a failure."""
    texts = [
        "A dark square lies left of a light one.",
        "The answer is 12.",
        "By the Pythagorean theorem, add the squares of both sides.",
        "",
    ]
    return completion(texts[number_of(payload)])


def generate(dataset_folder: str, server: OpenAIServer, output, *options: str) -> int:
    command = ["cues", "generate", "--dataset", dataset_folder, "--output", str(output), "--model", "m"]
    return main([*command, "--base_url", server.base_url, *options])


def test_generate_then_audit(tmp_path, dataset_folder, capsys):
    output = tmp_path / "out"
    with OpenAIServer(one_of_each_kind) as server:
        assert generate(dataset_folder, server, output, "--concurrency", "2", "--seed", "7") == 0
    printed = capsys.readouterr().out
    assert "3 of 4 rows have a cue" in printed and "1 failed: The generator's text is empty." in printed
    assert "--retry_failed" in printed and f"trl-vicur cues audit {output} --html report.html" in printed

    html = tmp_path / "report.html"
    assert main(["cues", "audit", str(output), "--html", str(html)]) == 0
    audited = load_from_disk(str(output))
    assert audited["cue_usable"] == [True, False, False, False]
    assert audited["cue_answer_leak"] == ["none", "leak", "none", None]
    assert audited["cue_reasoning_leak"] == [False, False, True, None]
    assert "The answer is" in html.read_text()
    assert json.loads((output / "audit.json").read_text())["usable"] == 1
    assert "## Audit" in (output / "README.md").read_text()
    # and again
    assert main(["cues", "audit", str(output)]) == 0
    assert load_from_disk(str(output))["cue_usable"] == [True, False, False, False]


def test_printed_retry_command_works(tmp_path, dataset_folder, capsys):
    with OpenAIServer(one_of_each_kind) as server:
        generate(dataset_folder, server, tmp_path / "out")
        printed = capsys.readouterr().out
        command = next(line for line in printed.splitlines() if "--retry_failed" in line).partition("with: ")[2]
        asked = len(server.payloads)
        assert main(command.split()[1:]) == 0
        assert [number_of(payload) for payload in server.payloads[asked:]] == [3]


def test_drop(tmp_path, dataset_folder):
    with OpenAIServer(one_of_each_kind) as server:
        generate(dataset_folder, server, tmp_path / "out")
    assert main(["cues", "audit", str(tmp_path / "out"), "--drop", "--output", str(tmp_path / "clean")]) == 0
    assert load_from_disk(str(tmp_path / "clean"))["cue"] == ["A dark square lies left of a light one."]
    assert len(load_from_disk(str(tmp_path / "out"))) == 4
    assert main(["cues", "audit", str(tmp_path / "out"), "--drop"]) == 0
    assert len(load_from_disk(str(tmp_path / "out"))) == 1


def test_fix_regenerate(tmp_path, dataset_folder, capsys):
    with OpenAIServer(one_of_each_kind) as server:
        generate(dataset_folder, server, tmp_path / "out")
    attempts = {}

    def improving(payload):
        """The second attempt at row 1 and the first one at row 2 are clean; row 3 does not change."""
        number = number_of(payload)
        attempts[number] = attempts.get(number, 0) + 1
        assert number != 0 and payload["temperature"] == 0.7
        if number == 3 or (number == 1 and attempts[number] == 1):
            return completion("It is 12." if number == 1 else "I cannot help with that.")
        return completion(f"Two lines cross at point P{number}.")

    with OpenAIServer(improving) as server:
        command = ["cues", "audit", str(tmp_path / "out"), "--fix", "regenerate", "--model", "m"]
        assert main([*command, "--base_url", server.base_url]) == 0
        fixed = load_from_disk(str(tmp_path / "out"))
        assert attempts == {1: 2, 2: 1, 3: 3}
        seeds = [payload["seed"] for payload in server.payloads]
        assert len({*seeds}) == len(seeds), "every attempt has its own seed"
    assert fixed["cue"] == [
        "A dark square lies left of a light one.",
        "Two lines cross at point P1.",
        "Two lines cross at point P2.",
        None,
    ]
    assert fixed["cue_usable"] == [True, True, True, False]
    temperatures = [provenance["temperature"] for provenance in fixed["cue_provenance"]]
    assert temperatures == [0.0, 0.7, 0.7, 0.0]


def test_measures_with_a_local_model(tmp_path, dataset_folder):
    model = make_qwen3_vl()
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size))
    model.save_pretrained(tmp_path / "model")
    make_processor().save_pretrained(tmp_path / "model")
    with OpenAIServer(one_of_each_kind) as server:
        generate(dataset_folder, server, tmp_path / "out")
    command = ["cues", "audit", str(tmp_path / "out"), "--model", str(tmp_path / "model")]
    assert main([*command, "--recoverability", "2", "--usefulness", "--privilege_gap"]) == 0
    audited = load_from_disk(str(tmp_path / "out"))
    for column in ("cue_agreement", "cue_entropy", "correct_with_cue", "correct_without_cue", "cue_gap", "answer_gap"):
        assert column in audited.column_names
    assert all(gap >= 0 for gap in audited["cue_gap"] if gap is not None)


def test_datasets_from_files_and_splits(tmp_path, dataset_folder, capsys):
    make_image(0).save(tmp_path / "a.png")
    lines = [json.dumps({"question": f"picture {i}", "images": [str(tmp_path / "a.png")]}) for i in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    dataset = load_from_disk(dataset_folder)
    DatasetDict(train=dataset, test=dataset.select([0])).save_to_disk(str(tmp_path / "splits"))
    with OpenAIServer(lambda payload: completion("seen")) as server:
        assert generate(str(tmp_path / "rows.jsonl"), server, tmp_path / "a") == 0
        assert load_from_disk(str(tmp_path / "a"))["cue"] == ["seen"] * 2
        assert generate(str(tmp_path / "splits"), server, tmp_path / "b", "--split", "test") == 0
        assert load_from_disk(str(tmp_path / "b"))["cue"] == ["seen"]
        assert generate(str(tmp_path / "splits"), server, tmp_path / "c", "--split", "dev") == 1
    assert "no split 'dev', only ['train', 'test']" in capsys.readouterr().err


def test_dataset_of_another_source_is_not_changed(tmp_path, capsys):
    Dataset.from_list(make_rows(2)).save_to_disk(str(tmp_path / "mine"))
    before = {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert main(["cues", "audit", str(tmp_path / "mine")]) == 0
    assert main(["cues", "audit", str(tmp_path / "mine"), "--drop"]) == 1
    assert "`--output`" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "mine").iterdir()} == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "--dataset", "{dataset}", "--output", "{out}"], "`--model` is missing"),
        (["generate", "--dataset", "{dataset}", "--output", "{dataset}", "--model", "m"], "contains other files"),
        (["generate", "--dataset", "{tmp}/no.txt", "--output", "{out}", "--model", "m"], "no.txt"),
        (
            ["generate", "--dataset", "{dataset}", "--output", "{out}", "--model", "m", "--question_column", "ask"],
            "no column 'ask'",
        ),
        (["audit", "{dataset}"], "`cue_column` is 'cue', but the dataset has only"),
        (["audit", "{dataset}", "--fix", "regenerate"], "Set `--model`"),
        (["audit", "{dataset}", "--privilege_gap", "--model", "m", "--base_url", "http://x"], "not `--base_url`"),
    ],
)
def test_errors_say_what_to_do_without_a_traceback(tmp_path, dataset_folder, capsys, arguments, message):
    (tmp_path / "no.txt").write_text("")
    places = {"dataset": dataset_folder, "out": tmp_path / "out", "tmp": tmp_path}
    options = ["--base_url", "http://localhost:1/v1"] if arguments[0] == "generate" else []
    assert main(["cues", *(argument.format(**places) for argument in arguments), *options]) == 1
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_unfinished_generation_is_not_audited(tmp_path, dataset_folder, capsys):
    with OpenAIServer(lambda payload: Reply({"error": {"message": "no"}}, 401)) as server:
        assert generate(dataset_folder, server, tmp_path / "out") == 1
    assert main(["cues", "audit", str(tmp_path / "out")]) == 1
    assert "has not finished" in capsys.readouterr().err


def test_interruption_says_how_to_continue(tmp_path, dataset_folder, capsys, monkeypatch):
    from trl_vicur.generation import OpenAIGenerator

    def interrupt(self, requests):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(OpenAIGenerator, "generate", interrupt)
    with OpenAIServer(one_of_each_kind) as server:
        assert generate(dataset_folder, server, tmp_path / "out") == 130
    assert "run the same command to resume" in capsys.readouterr().err


def test_help_is_quick_and_errors_show_usage():
    code = """
import sys
from trl_vicur.cli import main
try:
    main(["--help"])
except SystemExit:
    print([name for name in ("torch", "datasets") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "cues" in result.stdout and result.stdout.rstrip().endswith("[]")
    for arguments in ([], ["cues"], ["cues", "generate"], ["cue"], ["cues", "audit"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    for arguments in (["cues", "generate", "--help"], ["cues", "audit", "-h"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
