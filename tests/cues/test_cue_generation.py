"""Every row gets its cue or an error, whatever the generator does and whenever the process dies."""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from io import BytesIO
from pathlib import Path

import pytest
import scripted_generators
import torch
from datasets import Dataset, Features, Image, List, Value, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_server import OpenAIServer, Reply, completion, question_of
from peft import PeftModel
from scripted_generators import ScriptedCueGenerator
from tiny_models import make_image, make_processor, make_qwen3_vl, make_rows

from trl_vicur.cues import (
    CUE_PROMPT,
    ChatRequest,
    ChatResponse,
    CuePrompt,
    GeneratorUnavailableError,
    OpenAIGenerator,
    TransformersGenerator,
    generate_cues,
)
from trl_vicur.cues.cue_text import check_cue
from trl_vicur.generation.response_store import ResponseStore


SUPPORT = Path(scripted_generators.__file__).parent


def make_dataset(count: int = 6) -> Dataset:
    return Dataset.from_list(make_rows(count)).remove_columns("cue")


def question(number: int) -> str:
    return f"What is in picture {number}?"


# --- the result


def test_every_row_once_in_order_with_provenance(tmp_path):
    dataset = make_dataset()
    result = generate_cues(dataset, ScriptedCueGenerator(temperature=0.5), tmp_path / "out", seed=100)
    loaded = load_from_disk(str(tmp_path / "out"))
    assert loaded["cue"] == result["cue"] == [f"evidence for {question(i)}" for i in range(6)]
    assert loaded["cue_error"] == [None] * 6
    assert loaded["prompt"] == dataset["prompt"] and loaded["answer"] == dataset["answer"]
    assert [image.tobytes() for [image] in loaded["images"]] == [image.tobytes() for [image] in dataset["images"]]
    provenance = loaded[3]["cue_provenance"]
    assert provenance["generator"] == "scripted" and provenance["model"] == "m" and provenance["temperature"] == 0.5
    assert provenance["prompt_version"] == CUE_PROMPT.version and provenance["seed"] == 103
    card = (tmp_path / "out" / "README.md").read_text()
    assert "6 rows, 6 of them" in card and "scripted" in card and "Do not answer the question" in card


def test_trainer_accepts_the_result(tmp_path):
    from trl_vicur import ViCuRConfig
    from trl_vicur.trainer.checks.datasets import check_dataset
    from trl_vicur.trainer.checks.rows import RowChecker

    dataset = Dataset.from_dict({"image": [make_image(0)], "question": ["What is it?"]})
    result = generate_cues(dataset, ScriptedCueGenerator(), tmp_path / "out")
    assert result[0]["prompt"] == [{"role": "user", "content": "What is it?"}]
    args = ViCuRConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    check_dataset(result, "result", RowChecker(args, make_processor(), 2048), args)


def test_the_generator_never_sees_the_answer():
    rows = [{**row, "answer": "SECRET", "completion": "SECRET", "visible_text": ["SECRET"]} for row in make_rows(3)]
    rows = [{key: value for key, value in row.items() if key != "cue"} for row in rows]
    payloads = []

    class Spy(ScriptedCueGenerator):
        def generate(self, requests):
            for request in requests:
                payloads.append(repr(request.messages()))
                yield ChatResponse(request.number, "seen")

    generate_cues(Dataset.from_list(rows), Spy())
    assert len(payloads) == 3 and not any("SECRET" in payload for payload in payloads)


def test_question_is_the_text_of_the_user_turns():
    prompt = [
        {"role": "system", "content": "SYSTEM"},
        {"role": "user", "content": "first {prompt} {0}"},
        {"role": "assistant", "content": "REPLY"},
        {"role": "user", "content": "second"},
    ]
    texts = []

    class Spy(ScriptedCueGenerator):
        def generate(self, requests):
            for request in requests:
                texts.append(request.messages()[-1]["content"][-1]["text"])
                yield ChatResponse(request.number, "seen")

    generate_cues(Dataset.from_list([{"prompt": prompt, "images": [make_image(0)]}]), Spy())
    assert "first {prompt} {0}\n\nsecond" in texts[0] and "SYSTEM" not in texts[0] and "REPLY" not in texts[0]


def test_own_prompt_from_a_file(tmp_path):
    (tmp_path / "short.txt").write_text("List what shows {question} {}")
    prompt = CuePrompt.from_file(tmp_path / "short.txt")
    [message] = prompt.messages("how {question}", [])
    assert message["content"][-1]["text"] == "List what shows how {question} {}"
    result = generate_cues(make_dataset(1), ScriptedCueGenerator(), prompt=prompt)
    assert result[0]["cue_provenance"]["prompt_version"] == "short.txt"
    with pytest.raises(ValueError, match="has no `{question}`"):
        CuePrompt("bad", "no place")


def test_several_images_and_paths_and_undecoded_images(tmp_path):
    make_image(1).save(tmp_path / "a.png")
    seen = []
    generator = ScriptedCueGenerator(lambda question, images: seen.append([i.size for i in images]) or "seen")
    undecoded = Features({"question": Value("string"), "images": List(Image(decode=False))})
    paths = [str(tmp_path / "a.png")] * 2
    generate_cues(Dataset.from_dict({"question": ["q"], "images": [paths]}), generator)
    generate_cues(Dataset.from_dict({"question": ["q"], "images": [paths]}, features=undecoded), generator)
    assert seen == [[(64, 64), (64, 64)]] * 2


# --- rows that fail


def test_a_failing_row_is_recorded_and_only_retried_on_request(tmp_path):
    def broken(asked, images):
        if "3" in asked:
            raise RuntimeError("broken lens")
        return "seen"

    result = generate_cues(make_dataset(), ScriptedCueGenerator(broken), tmp_path / "out")
    assert result["cue"] == ["seen"] * 3 + [None] + ["seen"] * 2
    assert result["cue_error"] == [None] * 3 + ["broken lens"] + [None] * 2

    fixed = ScriptedCueGenerator()
    assert generate_cues(make_dataset(), fixed, tmp_path / "out")["cue"] == result["cue"] and fixed.asked == []
    result = generate_cues(make_dataset(), fixed, tmp_path / "out", retry_failed=True)
    assert fixed.asked == [3]
    assert result["cue"][3] == f"evidence for {question(3)}" and result["cue_error"] == [None] * 6


@pytest.mark.parametrize(
    "row, error",
    [
        ({"images": []}, "no image"),
        ({"images": None}, "no image"),
        ({"images": [{"bytes": b"no image at all", "path": None}]}, "cannot identify image"),
        ({"question": ""}, "asks nothing"),
        ({"question": None}, "asks nothing"),
        ({"question": "what <|im_end|> is it"}, "control token"),
        ({"question": "<image>\nwhat is it"}, "`question` contains the placeholder '<image>'"),
        ({"question": "<image>\nwhat is it"}, "Remove it; images are read from the column `images`."),
    ],
)
def test_bad_rows_are_recorded(row, error):
    buffer = BytesIO()
    make_image(0).save(buffer, "PNG")
    good = {"question": "q", "images": [{"bytes": buffer.getvalue(), "path": None}]}
    features = Features({"question": Value("string"), "images": List(Image())})
    rows = [good, {**good, **row}, good]
    dataset = Dataset.from_dict({key: [row[key] for row in rows] for key in good}, features=features)
    result = generate_cues(dataset, ScriptedCueGenerator())
    assert [cue is None for cue in result["cue"]] == [False, True, False]
    assert error in result["cue_error"][1]


def test_missing_image_file_is_found_before_generation(tmp_path):
    make_image(0).save(tmp_path / "a.png")
    features = Features({"question": Value("string"), "images": List(Image())})
    data = {"question": ["q", "q"], "images": [[str(tmp_path / "a.png")], [str(tmp_path / "b.png")]]}
    generator = ScriptedCueGenerator()
    with pytest.raises(ValueError, match="Row 1: there is no image file .*b.png"):
        generate_cues(Dataset.from_dict(data, features=features), generator)
    assert generator.asked == []


def test_truncated_image_is_recorded():
    buffer = BytesIO()
    make_image(0, size=(200, 200)).save(buffer, "PNG")
    data = [{"bytes": buffer.getvalue()[: len(buffer.getvalue()) // 2], "path": None}]
    features = Features({"question": Value("string"), "images": List(Image(decode=False))})
    result = generate_cues(
        Dataset.from_dict({"question": ["q"], "images": [data]}, features=features), ScriptedCueGenerator()
    )
    assert result["cue"] == [None] and "truncated" in result["cue_error"][0].lower()


@pytest.mark.parametrize(
    "text, error",
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("...", "no word"),
        ("<!DOCTYPE html><html><body>502 Bad Gateway</body></html>", "HTML"),
        ("<html>", "HTML"),
        ("I cannot help with that.", "refused"),
        ("I can't assist with this request.", "refused"),
        ("I can’t see it.", "refused"),
        ("I'm sorry, but I cannot identify people.", "refused"),
        ("Sorry, I am not able to view images.", "refused"),
        ("As an AI language model, I do not see images.", "refused"),
        ("I don't see any image.", "refused"),
        ("Unfortunately, there is no picture.", "refused"),
        ("I am unable to answer.", "refused"),
        ("<think>the answer is 12", "did not finish thinking"),
        ("<think>the answer is 12</think>", "empty"),
    ],
)
def test_texts_that_are_not_cues(text, error):
    response = check_cue(ChatResponse(1, text))
    assert response.number == 1 and response.text is None and error in response.error


@pytest.mark.parametrize(
    "text, cue",
    [
        ("  AB is labelled 5.\n", "AB is labelled 5."),
        ("<think>hm, 12?</think>\n\nAB is labelled 5.", "AB is labelled 5."),
        ("A sign reads 'Sorry, closed'.", "A sign reads 'Sorry, closed'."),
        ("A person cannot be seen behind the wall.", "A person cannot be seen behind the wall."),
        ("I and J are points on the circle.", "I and J are points on the circle."),
        ("No image label is cut off; the axis ends at 40.", "No image label is cut off; the axis ends at 40."),
        ("图中AB标为5", "图中AB标为5"),
    ],
)
def test_texts_that_are_cues(text, cue):
    assert check_cue(ChatResponse(1, text)) == ChatResponse(1, cue)


# --- bad input


def test_bad_datasets():
    from datasets import DatasetDict

    generator = ScriptedCueGenerator()
    dataset = make_dataset(2)
    for bad, error, message in [
        (dataset.rename_column("prompt", "text"), ValueError, "'prompt' or 'question'"),
        (dataset.rename_column("images", "pictures"), ValueError, "'images' or 'image'"),
        (dataset.add_column("cue", ["a", "b"]), ValueError, r"already has the columns \['cue'\]"),
        (dataset.select([]), ValueError, "no rows"),
        (DatasetDict(train=dataset), TypeError, r"splits \['train'\]"),
        (dataset.to_iterable_dataset(), TypeError, "IterableDataset"),
        ([{"question": "q"}], TypeError, "got list"),
    ]:
        with pytest.raises(error, match=message):
            generate_cues(bad, generator)
    with pytest.raises(ValueError, match="'ask', only"):
        generate_cues(dataset, generator, question_column="ask")
    assert generator.asked == []


def test_unknown_output_folder_is_refused(tmp_path):
    dataset = make_dataset(2)
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("text")
    (tmp_path / "sqlite").mkdir()
    connection = sqlite3.connect(tmp_path / "sqlite" / "cues.sqlite")
    connection.execute("CREATE TABLE mine (a)")
    connection.commit()
    connection.close()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cues.sqlite").write_bytes(b"no database" * 1000)
    for name, message in [
        ("file", "is a file"),
        ("folder", "thesis.tex"),
        ("sqlite", "another program"),
        ("damaged", "is not a trl-vicur response store, or is corrupt"),
    ]:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        generator = ScriptedCueGenerator()
        with pytest.raises(ValueError, match=message):
            generate_cues(dataset, generator, tmp_path / name)
        assert generator.asked == []
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "change, difference",
    [
        ({"generator": ScriptedCueGenerator(model="other")}, "model was 'm' and is 'other'"),
        ({"generator": ScriptedCueGenerator(temperature=1.0)}, "temperature was 0.0 and is 1.0"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"prompt": CuePrompt("mine", "{question}")}, "prompt_version was '1' and is 'mine'"),
        ({"prompt": CuePrompt("1", "{question}")}, "prompt was"),
        ({"dataset": make_dataset(7)}, "rows was 6 and is 7"),
        ({"dataset": make_dataset().select([1, 0, 2, 3, 4, 5])}, "dataset was"),
    ],
)
def test_output_of_other_settings_is_refused(tmp_path, change, difference):
    arguments = {"dataset": make_dataset(), "generator": ScriptedCueGenerator(), "output": tmp_path / "out"}
    generate_cues(**arguments)
    with pytest.raises(ValueError, match=difference):
        generate_cues(**arguments | change)
    # and the existing output is unchanged
    assert load_from_disk(str(tmp_path / "out"))["cue"][0] == f"evidence for {question(0)}"


def test_rebuilt_dataset_is_recognized(tmp_path):
    make_dataset().save_to_disk(str(tmp_path / "saved"))
    generate_cues(make_dataset(), ScriptedCueGenerator(), tmp_path / "out")
    generator = ScriptedCueGenerator()
    generate_cues(load_from_disk(str(tmp_path / "saved")), generator, tmp_path / "out")
    assert generator.asked == []


def test_two_processes_cannot_write_the_same_output(tmp_path):
    with ResponseStore(tmp_path / "s.sqlite", {}), pytest.raises(BlockingIOError, match="Another process"):
        ResponseStore(tmp_path / "s.sqlite", {})


# --- killed processes and full disks

KILLED_RUN = """
import sys, time
sys.path.insert(0, {support!r})
from datasets import load_from_disk
from scripted_generators import ScriptedCueGenerator
from trl_vicur.cues import generate_cues

log = open({log!r}, "a", buffering=1)

def reply(question, images):
    print(question, file=log)
    time.sleep(0.002)
    return f"evidence for {{question}}"

print("ready", flush=True)
generate_cues(load_from_disk({dataset!r}), ScriptedCueGenerator(reply), {output!r})
print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_at_many_points_nothing_is_lost_or_done_twice(tmp_path):
    """`SIGKILL` at random moments, from opening the store to renaming the last file."""
    count = 150
    make_dataset(count).save_to_disk(str(tmp_path / "dataset"))
    code = KILLED_RUN.format(
        support=str(SUPPORT),
        log=str(tmp_path / "log"),
        dataset=str(tmp_path / "dataset"),
        output=str(tmp_path / "out"),
    )
    # All other processes are forked from one parent, which imports everything once
    parent = f"""
import os, random, signal, sys, time
sys.path.insert(0, {str(SUPPORT)!r})
import datasets, scripted_generators, trl_vicur.cues
code = {code!r}
generator = random.Random(0)
kills = 0
while kills < 100:
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        exec(code)
        os._exit(0)
    time.sleep(generator.uniform(0.0, 0.12) * (1 + kills / 20))  # on a busy machine the first ones come too early
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        break
    kills += 1
print(kills)
"""
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    result = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[-1]) >= 5, "too few kills to be a test"

    generator = ScriptedCueGenerator()
    dataset = generate_cues(make_dataset(count), generator, tmp_path / "out")
    assert dataset["cue"] == [f"evidence for {question(i)}" for i in range(count)]
    # A row is requested again only if the process was killed before it wrote the reply
    asked = (tmp_path / "log").read_text().splitlines() + [question(number) for number in generator.asked]
    assert {*asked} == {question(i) for i in range(count)}
    assert len(asked) - count <= int(result.stdout.split()[-1])
    assert not (tmp_path / "out" / "unfinished").exists()


def test_killed_while_the_dataset_is_moved_into_place(tmp_path, monkeypatch):
    """After any number of renames, the dataset is complete or absent, and the next run completes it."""
    renames = []
    original = Path.replace

    def stop_at(limit):
        def replace(self, target):
            if len(renames) == limit:
                raise KeyboardInterrupt
            renames.append(target)
            return original(self, target)

        return replace

    expected = [f"evidence for {question(i)}" for i in range(6)]
    for limit in range(4):
        renames.clear()
        monkeypatch.setattr(Path, "replace", stop_at(limit))
        try:
            generate_cues(make_dataset(), ScriptedCueGenerator(), tmp_path / "out")
            finished = True
        except KeyboardInterrupt:
            finished = False
        monkeypatch.setattr(Path, "replace", original)
        try:
            assert load_from_disk(str(tmp_path / "out"))["cue"] == expected
        except FileNotFoundError:
            assert not finished
    assert finished, "the limit of the last round must suffice for all renames"
    generator = ScriptedCueGenerator()
    assert generate_cues(make_dataset(), generator, tmp_path / "out")["cue"] == expected and generator.asked == []


@pytest.mark.slow
def test_full_disk_keeps_what_is_written(tmp_path):
    """A limit on file sizes acts like a full disk: first in the store, later in the dataset."""
    rows = [{**row, "images": [make_image(i, size=(128, 128))]} for i, row in enumerate(make_rows(40))]
    dataset = Dataset.from_list(rows).remove_columns("cue")  # of 2 MB
    dataset.save_to_disk(str(tmp_path / "dataset"))
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(SUPPORT)!r})
from datasets import load_from_disk
from scripted_generators import ScriptedCueGenerator
from trl_vicur.cues import generate_cues
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
dataset = load_from_disk({str(tmp_path / "dataset")!r})
generator = ScriptedCueGenerator(lambda question, images: "x" * 1000)
for limit in (30_000, 1_000_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        generate_cues(dataset, generator, {str(tmp_path / "out")!r})
    except OSError as error:
        print(len(generator.asked), error)
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    store_full, dataset_full = result.stdout.strip().splitlines()
    assert "The disk is full" in store_full and "run the same command again" in store_full
    assert "The disk is full" in dataset_full
    written = int(store_full.split()[0]) - 1
    assert 0 < written < 40
    assert int(dataset_full.split()[0]) == 41, "only the row that could not be written is requested twice"
    generator = ScriptedCueGenerator(lambda question, images: "y")
    assert generate_cues(dataset, generator, tmp_path / "out")["cue"] == ["x" * 1000] * 40
    assert generator.asked == []


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fates=st.lists(st.sampled_from(["cue", "failure", "stop"]), min_size=1, max_size=30))
def test_any_history_ends_in_the_same_dataset(tmp_path_factory, fates):
    """Whatever fails and wherever runs stop, repeated calls with `retry_failed` give every row its cue."""
    output = tmp_path_factory.mktemp("history") / "out"
    dataset = make_dataset(4)
    fates = iter(fates)

    class Stop(Exception):
        pass

    class Fateful(ScriptedCueGenerator):
        def generate(self, requests):
            for request in requests:
                fate = next(fates, "cue")
                if fate == "stop":
                    raise Stop
                text = f"cue of {request.number}" if fate == "cue" else None
                yield ChatResponse(request.number, text, "failed" if text is None else None)

    for _ in range(200):
        try:
            result = generate_cues(dataset, Fateful(), output, retry_failed=True)
        except Stop:
            continue
        if None not in result["cue"]:
            break
    assert result["cue"] == [f"cue of {number}" for number in range(4)]


# --- the two generators


@pytest.fixture(scope="module")
def local_model():
    return make_qwen3_vl()


def ask(generator, count: int = 5, seed: int = 0) -> list[ChatResponse]:
    requests = [
        ChatRequest(i, lambda i=i: CUE_PROMPT.messages(question(i) * (i + 1), [make_image(i)]), seed + i)
        for i in range(count)
    ]
    return sorted(generator.generate(requests))


def without_end(model):
    """With random weights, texts rarely end. Here every token is an end token, so texts have one token."""
    model.generation_config.eos_token_id = list(range(model.config.text_config.vocab_size))
    return model


def test_local_model_equals_generate(local_model):
    model, processor = without_end(local_model), make_processor()
    responses = ask(TransformersGenerator(model, processor, batch_size=2, max_new_tokens=4))
    assert [response.number for response in responses] == list(range(5))
    assert responses == ask(TransformersGenerator(model, processor, batch_size=5, max_new_tokens=4))
    messages = CUE_PROMPT.messages(question(3) * 4, [make_image(3)])
    inputs = processor.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].size(1) :]
    assert responses[3].text == processor.decode(output, skip_special_tokens=True)


def test_local_model_samples_by_seed(local_model):
    generator = TransformersGenerator(without_end(local_model), make_processor(), temperature=5.0)
    assert ask(generator, seed=1) == ask(generator, seed=1)
    assert ask(generator, seed=1) != ask(generator, seed=2)


def test_local_text_without_end_is_a_failure(local_model):
    local_model.generation_config.eos_token_id = 0
    [response] = ask(TransformersGenerator(local_model, make_processor(), max_new_tokens=3), count=1)
    assert response.text is None and "max_new_tokens=3" in response.error


def test_local_model_without_end_token_uses_the_tokenizers(local_model, monkeypatch):
    model, processor = local_model, make_processor()
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(0)
    [response] = ask(TransformersGenerator(model, processor, max_new_tokens=3), count=1)
    assert "max_new_tokens=3" in response.error
    # The model's own first token ends the text
    inputs = processor.apply_chat_template(
        [CUE_PROMPT.messages(question(0), [make_image(0)])],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    token_id = model.generate(**inputs, do_sample=False, max_new_tokens=1)[0, -1].item()
    processor.tokenizer.eos_token = processor.tokenizer.convert_ids_to_tokens(token_id)
    [response] = ask(TransformersGenerator(model, processor, max_new_tokens=3), count=1)
    assert response.error is None


def test_local_model_without_any_end_token_is_refused(local_model, monkeypatch):
    processor = make_processor()
    monkeypatch.setattr(local_model.generation_config, "eos_token_id", None)
    processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="Neither the model's generation config nor its tokenizer has an end token"):
        TransformersGenerator(local_model, processor)


def test_local_model_fails_row_by_row(local_model, monkeypatch):
    """An error in a batch fails only the row that caused it; unreadable rows fail before they join a batch."""
    model = without_end(local_model)
    generator = TransformersGenerator(model, make_processor(), batch_size=4)
    original = model.generate

    def generate(**inputs):
        if (inputs["image_grid_thw"][:, 1] > 4).any():
            raise RuntimeError("too large")
        return original(**inputs)

    monkeypatch.setattr(model, "generate", generate)

    def unreadable():
        raise OSError("cannot identify image")

    requests = [
        ChatRequest(0, lambda: CUE_PROMPT.messages("a", [make_image(0)])),
        ChatRequest(1, unreadable),
        ChatRequest(2, lambda: CUE_PROMPT.messages("<|im_start|>system", [make_image(0)])),
        ChatRequest(3, lambda: CUE_PROMPT.messages("b", [make_image(0, size=(128, 128))])),
        ChatRequest(4, lambda: CUE_PROMPT.messages("c", [make_image(0)])),
    ]
    errors = {response.number: response.error for response in generator.generate(requests)}
    assert errors[0] is errors[4] is None
    assert "cannot identify" in errors[1] and "<|im_start|>" in errors[2] and "too large" in errors[3]


def test_local_model_with_an_adapter_by_name(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = without_end(make_qwen3_vl())
    model.save_pretrained(tmp_path / "base")
    make_processor().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    generator = TransformersGenerator(str(tmp_path / "base"), adapter=str(tmp_path / "adapter"))
    assert isinstance(generator.model, PeftModel)
    # names, not the paths of this machine
    assert generator.settings["model"] == "base" and generator.settings["adapter"] == "adapter"
    assert [response.error for response in ask(generator, count=2)] == [None, None]


def test_further_training_is_detected_as_another_model(tmp_path):
    model = without_end(make_qwen3_vl())
    generate_cues(make_dataset(2), TransformersGenerator(model, make_processor()), tmp_path / "out")
    assert generate_cues(make_dataset(2), TransformersGenerator(model, make_processor()), tmp_path / "out")
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(ValueError, match="weights was"):
        generate_cues(make_dataset(2), TransformersGenerator(model, make_processor()), tmp_path / "out")


def test_endpoint_gets_question_image_and_seed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with OpenAIServer(lambda payload: completion("seen")) as server:
        result = generate_cues(
            make_dataset(3), OpenAIGenerator("some/model", server.base_url, temperature=0.5), seed=10
        )
    assert result["cue"] == ["seen"] * 3
    payload = min(server.payloads, key=lambda payload: payload["seed"])
    assert payload["model"] == "some/model" and payload["seed"] == 10 and payload["temperature"] == 0.5
    image, text = payload["messages"][1]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert question(0) in text["text"]
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in json.dumps(result[0]["cue_provenance"])


def test_endpoint_concurrency_and_order():
    def reply(payload):
        time.sleep(random.uniform(0.0, 0.05))
        return completion(f"evidence for {question_of(payload)}")

    with OpenAIServer(reply) as server:
        result = generate_cues(make_dataset(40), OpenAIGenerator("m", server.base_url, concurrency=8))
    assert result["cue"] == [f"evidence for {question(i)}" for i in range(40)]
    assert 4 <= server.most_running <= 8


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_endpoint_requests_are_retried_after_transient_errors(status):
    failures = iter([True, True])

    def reply(payload):
        if next(failures, False):
            return Reply({"error": {"message": "busy"}}, status, headers={"Retry-After-Ms": "1"})
        return completion("seen")

    with OpenAIServer(reply) as server:
        assert generate_cues(make_dataset(1), OpenAIGenerator("m", server.base_url))["cue"] == ["seen"]
    assert len(server.payloads) == 3


# As vLLM 0.32 answers
VLLM_PROMPT_TOO_LONG = Reply(
    {
        "error": {
            "message": "This model's maximum context length is 4096 tokens. However, your prompt contains at least "
            "4097 input tokens, which exceeds this limit even without any output tokens. Please reduce the length of "
            "the input prompt. (parameter=input_tokens, value=4097)",
            "type": "BadRequestError",
            "param": "input_tokens",
            "code": 400,
        }
    },
    400,
)


@pytest.mark.parametrize(
    "reply, error",
    [
        (Reply("<html>Bad Gateway</html>", content_type="text/html"), "without a chat completion"),
        (Reply("not json"), "JSON"),
        (Reply({}), "without a chat completion"),
        (Reply({"choices": []}), "without a chat completion"),
        (Reply({"choices": [{}]}), "without a chat completion"),
        (Reply({"choices": [{"message": {"content": [1]}}]}), "without a chat completion"),
        (Reply([1, 2]), "without a chat completion"),
        (Reply("null"), "without a chat completion"),
        (completion(""), "empty"),
        (completion(None), "empty"),
        (completion("I cannot help with that."), "refused"),
        (completion(None, refusal="not allowed"), "refused"),
        (completion("the chord AB is labelled", finish_reason="length"), "cut at `max_new_tokens=256`"),
        (completion("the chord AB is labelled", "length", num_tokens=256), "cut at `max_new_tokens=256`"),
        (
            completion("the chord AB is labelled", "length", num_tokens=64),
            "after 64 tokens, before `max_new_tokens=256`",
        ),
        (VLLM_PROMPT_TOO_LONG, "maximum context length is 4096 tokens"),
        (Reply({"error": {"message": "no"}}, 500, headers={"Retry-After-Ms": "1"}), "500"),
    ],
)
def test_invalid_reply_of_the_endpoint_fails_the_row(reply, error):
    def reply_to(payload):
        return reply if question_of(payload) == question(1) else completion("seen")

    with OpenAIServer(reply_to) as server:
        result = generate_cues(make_dataset(3), OpenAIGenerator("m", server.base_url, max_retries=1))
    assert result["cue"] == ["seen", None, "seen"]
    assert error in result["cue_error"][1]


def test_endpoint_that_hangs_fails_the_row():
    gave_up = threading.Event()

    def reply(payload):
        if question_of(payload) == question(1):
            gave_up.wait(60)
        return completion("seen")

    with OpenAIServer(reply) as server:
        # Long enough for the others on a busy machine
        result = generate_cues(make_dataset(3), OpenAIGenerator("m", server.base_url, timeout=4.0, max_retries=0))
        gave_up.set()
    assert result["cue"] == ["seen", None, "seen"] and "timed out" in result["cue_error"][1]


@pytest.mark.slow
def test_interruption_does_not_wait_for_an_endpoint_that_hangs():
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs may ignore SIGINT
        "from PIL import Image\n"
        "from trl_vicur.cues import CUE_PROMPT, ChatRequest, OpenAIGenerator\n"
        "messages = CUE_PROMPT.messages('What?', [Image.new('RGB', (8, 8))])\n"
        "requests = (ChatRequest(number, lambda: messages) for number in range(9))\n"
        "list(OpenAIGenerator('m', sys.argv[1], concurrency=2).generate(requests))\n"
    )
    called, answer = threading.Event(), threading.Event()

    def reply(payload):
        called.set()
        answer.wait(60)
        return completion("seen")

    with OpenAIServer(reply) as server:
        with subprocess.Popen([sys.executable, "-c", script, server.base_url], stderr=subprocess.DEVNULL) as process:
            try:
                assert called.wait(60)
                process.send_signal(signal.SIGINT)
                assert process.wait(30) != 0
            finally:
                process.kill()
                answer.set()


@pytest.mark.parametrize("status", [401, 403])
def test_endpoint_that_refuses_the_key_stops_the_run(tmp_path, monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    refused = Reply({"error": {"message": "Incorrect API key provided: sk-secret"}}, status)
    good = iter(range(4))

    def reply(payload):
        return completion("seen") if next(good, None) is not None else refused

    with OpenAIServer(reply) as server, pytest.raises(GeneratorUnavailableError, match="OPENAI_API_KEY") as error:
        generate_cues(make_dataset(30), OpenAIGenerator("m", server.base_url, concurrency=2), tmp_path / "out")
    assert "sk-secret" not in str(error.value)
    assert len(server.payloads) < 10
    # Earlier replies are kept, and the next call continues
    with OpenAIServer(lambda payload: completion("later")) as server:
        result = generate_cues(make_dataset(30), OpenAIGenerator("m", server.base_url), tmp_path / "out")
    assert sorted(result["cue"]) == ["later"] * 26 + ["seen"] * 4


def test_key_is_in_no_file_and_no_message(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    echo = Reply({"error": {"message": "Your key sk-secret is not for this image" + "!" * 470 + "sk-secret"}}, 400)
    with OpenAIServer(lambda payload: echo) as server:
        result = generate_cues(make_dataset(2), OpenAIGenerator("m", server.base_url), tmp_path / "out")
    assert "[key]" in result["cue_error"][0]
    printed = capfd.readouterr()
    assert "sk-secret" not in printed.out + printed.err
    for path in (tmp_path / "out").iterdir():
        assert b"sk-s" not in path.read_bytes()


def test_unknown_model_stops_the_run():
    with OpenAIServer(lambda payload: Reply({"error": {"message": "no such model"}}, 404)) as server:
        with pytest.raises(GeneratorUnavailableError, match="no model 'm'"):
            generate_cues(make_dataset(2), OpenAIGenerator("m", server.base_url))


def test_unreachable_endpoint_stops_the_run():
    with OpenAIServer(lambda payload: completion("seen")) as server:
        base_url = server.base_url
    with pytest.raises(GeneratorUnavailableError, match="cannot be reached"):
        generate_cues(make_dataset(2), OpenAIGenerator("m", base_url, max_retries=0))


def test_endpoint_that_only_fails_stops_the_run():
    with OpenAIServer(lambda payload: Reply({"error": {"message": "out of order"}}, 400)) as server:
        with pytest.raises(GeneratorUnavailableError, match="last 32 requests have all failed.*out of order"):
            generate_cues(make_dataset(60), OpenAIGenerator("m", server.base_url, concurrency=4))
    assert len(server.payloads) < 40


def test_path_of_a_model_at_the_endpoint_is_kept_private():
    # vLLM names a model that it loads from a folder by that folder's path
    assert OpenAIGenerator("/home/me/models/eyes", "http://localhost:1/v1").settings["model"] == "eyes"


def test_generator_options_are_checked(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="OPENAI_API_KEY"):
        OpenAIGenerator("m")
    for options, message in [
        ({"concurrency": 0}, "concurrency"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ]:
        with pytest.raises(ValueError, match=f"`{message}` must"):
            OpenAIGenerator("m", "http://localhost:1/v1", **options)
    with pytest.raises(ValueError, match="`batch_size` must"):
        TransformersGenerator("m", batch_size=0)
    with pytest.raises(ValueError, match="`processing_class` must"):
        TransformersGenerator(make_qwen3_vl())
