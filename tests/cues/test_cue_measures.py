"""Measures of cues by models: recoverability, privilege gap, usefulness. Resumed runs equal uninterrupted ones."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from scripted_generators import ScriptedGenerator, fail, text_of
from tiny_models import encode, make_image, make_processor, make_qwen3_vl, make_rows, user, with_completion

from trl_vicur.cues import privilege_gap
from trl_vicur.cues.agreement import agreement, content_tokens, same_meaning, semantic_entropy
from trl_vicur.cues.privilege_gap import measure_privilege_gap, summarize_privilege_gap
from trl_vicur.cues.recoverability import measure_recoverability, summarize_recoverability
from trl_vicur.cues.usefulness import measure_usefulness, summarize_usefulness
from trl_vicur.generation import GeneratorUnavailableError, TransformersGenerator


# --- Recoverability ---


def test_content_of_cues():
    assert content_tokens("The segment AB is labelled 12.0.") == {"segment", "AB", "12"}
    assert content_tokens("A red circle lies left of point A.") == {"red", "circle", "lie", "left", "point", "A"}
    assert content_tokens("Twelve bars, 1,000 and −3; x1") == {"12", "bar", "1000", "-3", "x1"}
    assert content_tokens("The Circle in the center is gray") == content_tokens("circle, grey: in the middle")
    assert content_tokens("红色圆形") == {"红", "色", "圆", "形"}
    assert content_tokens("o and O") == {"o", "O"}


@pytest.mark.parametrize(
    ("first", "second", "score"),
    [
        ("AB is 5", "The segment labelled 5 is AB.", 0.8),
        ("AB is 5", "AB is 6", 0.5),
        ("AB is 5", "AB is 5", 1.0),
        ("a red circle", "two green squares", 0.0),
        ("It is", "It is there", 1.0),
    ],
)
def test_agreement_of_cues(first, second, score):
    first, second = content_tokens(first), content_tokens(second)
    assert agreement(first, second) == agreement(second, first) == pytest.approx(score)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("AB is 5", "The segment labelled 5 is AB.", True),
        ("AB is 5", "AB is 6", False),
        ("AB is 5 and BC is 7", "AB is 5", True),
        ("a red circle", "a blue circle", False),
        ("the large circle is left of the small square", "the small square is left of the large circle", True),
        ("the circle is left of the small line", "the circle is right of the small line", False),
        ("a tall bar next to the door", "steep curve over there", False),
    ],
)
def test_meaning_of_cues(first, second, same):
    first, second = content_tokens(first), content_tokens(second)
    assert same_meaning(first, second) is same_meaning(second, first) is same


def test_entropy_of_meanings():
    red, blue, green = (content_tokens(f"a {colour} circle") for colour in ("red", "blue", "green"))
    assert semantic_entropy([red] * 4) == 0.0
    assert semantic_entropy([red, blue, green]) == pytest.approx(math.log(3))
    assert semantic_entropy([red, blue, red, blue]) == pytest.approx(math.log(2))
    assert semantic_entropy([red, red, red, blue]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))


def cue_rows():
    rows = make_rows(6)
    for row, cue in zip(
        rows, ["red circle", "red circle", "red circle", None, "red circle", "red circle"], strict=True
    ):
        row["cue"] = cue
    return Dataset.from_list(rows)


def reply_with_cue(number, messages):
    row, sample = divmod(number, 4)
    if row == 5 and sample > 0:
        return "I'm sorry, I can't."
    if row == 2:
        return fail(number, messages)
    colours = {0: ["red"] * 4, 1: ["red", "red", "blue", "green"], 4: ["red", "blue", "green", "pink"], 5: ["red"]}
    return f"<think>Hm.</think>There is a {colours[row][sample]} circle."


def test_recoverability(tmp_path):
    generator = ScriptedGenerator(reply_with_cue)
    measured = measure_recoverability(cue_rows(), generator, tmp_path, seed=7)
    assert measured["cue_agreement"][:] == pytest.approx([1.0, 0.75, None, None, 0.625, 1.0])
    two_of_four = 1.5 * math.log(2)
    assert measured["cue_entropy"][:] == pytest.approx([0.0, two_of_four, None, None, math.log(4), None])
    # The model sees only image and question, each time with another seed; rows without a cue are skipped
    assert [request.number for request in generator.requests] == [n for n in range(24) if n // 4 != 3]
    assert [request.seed for request in generator.requests] == [7 + request.number for request in generator.requests]
    images, text = generator.requests[4].messages()[-1]["content"]
    assert images["image"].tobytes() == make_image(1).tobytes()
    assert "What is in picture 1?" in text["text"] and "red circle" not in text["text"]
    assert summarize_recoverability(measured) == {
        "cue_agreement": pytest.approx(0.84375),
        "cue_agreement_rows": 4,
        "cue_entropy": pytest.approx((two_of_four + math.log(4)) / 3),
        "cue_entropy_rows": 3,
    }


def test_recoverability_needs_samples():
    with pytest.raises(ValueError, match="`temperature` is 0.0.*above zero"):
        measure_recoverability(cue_rows(), ScriptedGenerator(reply_with_cue, temperature=0.0))
    with pytest.raises(ValueError, match="`num_samples` must be at least 2"):
        measure_recoverability(cue_rows(), ScriptedGenerator(reply_with_cue), num_samples=1)
    with pytest.raises(ValueError, match="`cue_column` is 'evidence'"):
        measure_recoverability(cue_rows(), ScriptedGenerator(reply_with_cue), cue_column="evidence")


@pytest.mark.parametrize("die_at", [0, 1, 9, 19])
def test_recoverability_resumes(tmp_path, die_at):
    whole = measure_recoverability(cue_rows(), ScriptedGenerator(reply_with_cue))
    first = ScriptedGenerator(reply_with_cue, die_at)
    with pytest.raises(KeyboardInterrupt):
        measure_recoverability(cue_rows(), first, tmp_path)
    second = ScriptedGenerator(reply_with_cue)
    measured = measure_recoverability(cue_rows(), second, tmp_path)
    assert measured.to_dict() == whole.to_dict()
    numbers = [request.number for request in first.requests + second.requests]
    assert sorted(numbers) == sorted(set(numbers)) and len(numbers) == 20
    third = ScriptedGenerator(fail)
    assert measure_recoverability(measured, third, tmp_path).to_dict() == whole.to_dict() and third.requests == []


def test_recoverability_refuses_other_settings(tmp_path):
    measure_recoverability(cue_rows(), ScriptedGenerator(reply_with_cue), tmp_path)
    with pytest.raises(ValueError, match="begun with other settings: temperature was 1.0 and is 0.5"):
        measure_recoverability(cue_rows(), ScriptedGenerator(reply_with_cue, temperature=0.5), tmp_path)
    with pytest.raises(ValueError, match="num_samples was 4 and is 2"):
        measure_recoverability(cue_rows(), ScriptedGenerator(reply_with_cue), tmp_path, num_samples=2)
    other = cue_rows().map(lambda row: {"cue": "blue circle"})
    with pytest.raises(ValueError, match="dataset was"):
        measure_recoverability(other, ScriptedGenerator(reply_with_cue), tmp_path)


def test_recoverability_with_a_model():
    generator = TransformersGenerator(make_qwen3_vl(), make_processor(), max_new_tokens=1, temperature=1.0)
    measured = measure_recoverability(cue_rows().select(range(2)), generator, num_samples=3)
    assert measured["cue_agreement"][:] == measured["cue_entropy"][:] == [None, None]  # all are cut or empty


# --- Usefulness ---


def answer_rows():
    rows = make_rows(5)
    rows[1] |= {"cue": None}
    rows[2] |= {"answer": None}
    return Dataset.from_list(rows)


def reply_with_answer(number, messages):
    row, with_cue = divmod(number, 2)
    assert ("[Hint]: noise number" in text_of(messages)) == bool(with_cue)
    return fail(number, messages) if number == 6 else "The answer is yes." if with_cue else "No."


def test_usefulness(tmp_path):
    generator = ScriptedGenerator(reply_with_answer)
    measured = measure_usefulness(answer_rows(), generator, tmp_path)
    assert measured["correct_with_cue"][:] == [True, None, None, True, True]
    assert measured["correct_without_cue"][:] == [False, None, None, None, False]
    without, with_cue = (request.messages() for request in generator.requests[:2])
    assert text_of(without) == "What is in picture 0?"
    assert text_of(with_cue) == "What is in picture 0?\n\n[Hint]: noise number 0"
    assert without[0]["content"][0]["image"].tobytes() == with_cue[0]["content"][0]["image"].tobytes()
    # If one of a row's two answers is missing, neither counts
    assert summarize_usefulness(measured) == {
        "correct_with_cue": 1.0,
        "correct_with_cue_rows": 2,
        "correct_without_cue": 0.0,
        "correct_without_cue_rows": 2,
    }


def test_usefulness_of_text_questions():
    rows = [{"question": "Which?", "image": make_image(0), "cue": "12", "answer": 12}]
    generator = ScriptedGenerator(lambda number, messages: "12.0 cm")
    measured = measure_usefulness(Dataset.from_list(rows), generator, teacher_prompt_template="{prompt} ({privilege})")
    assert measured["correct_with_cue"][:] == measured["correct_without_cue"][:] == [True]
    assert [text_of(request.messages()) for request in generator.requests] == ["Which?", "Which? (12)"]


@pytest.mark.parametrize("die_at", [0, 3, 5])
def test_usefulness_resumes(tmp_path, die_at):
    whole = measure_usefulness(answer_rows(), ScriptedGenerator(reply_with_answer))
    first, second = ScriptedGenerator(reply_with_answer, die_at), ScriptedGenerator(reply_with_answer)
    with pytest.raises(KeyboardInterrupt):
        measure_usefulness(answer_rows(), first, tmp_path)
    assert measure_usefulness(answer_rows(), second, tmp_path).to_dict() == whole.to_dict()
    assert [request.number for request in first.requests + second.requests] == [0, 1, 6, 7, 8, 9]
    with pytest.raises(ValueError, match="teacher_prompt_template was"):
        measure_usefulness(answer_rows(), second, tmp_path, teacher_prompt_template="{prompt} {privilege}")


def test_usefulness_with_a_model():
    generator = TransformersGenerator(make_qwen3_vl(), make_processor(), max_new_tokens=2)
    measured = measure_usefulness(answer_rows(), generator)
    assert measured["correct_with_cue"][:] == [None] * 5  # cut


# --- Privilege gap ---


@pytest.fixture(scope="module")
def model():
    model = make_qwen3_vl()
    with torch.no_grad():  # otherwise all tokens are about equally likely, whatever the prompt
        for name, parameter in model.model.language_model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(3 if "embed" in name else 6)
    return model


def make_teacher(model, batch_size=3, max_new_tokens=6):
    return TransformersGenerator(model, make_processor(), batch_size=batch_size, max_new_tokens=max_new_tokens)


def gap_rows():
    """Rows with completions of several lengths that contain the answer once, twice, within a word, or never."""
    rows = make_rows(5)
    rows[3] |= {"images": [make_image(3), make_image(33, (32, 96))], "answer": None}
    completions = ["Yes: it is. Is it? yes.", "yes", "yesterday", "It is noise, é.", "1.12, or 12. " * 5]
    for row, completion in zip(rows, completions, strict=True):
        row["completion"] = completion
    rows[4]["answer"] = "12"
    return Dataset.from_list(rows)


def naive_divergence(model, question, images, privilege, completion):
    """The divergence per token, from all float64 logits of one unpadded row."""
    processor = make_processor()
    completion_ids = processor.tokenizer(completion, return_tensors="pt")["input_ids"]
    logprobs = []
    for text in (question, f"{question}\n\n[Hint]: {privilege}"):
        inputs = with_completion(encode(processor, [user(text, *images)]), completion_ids)
        inputs["pixel_values"] = inputs["pixel_values"].double()
        with torch.no_grad():
            logits = copy.deepcopy(model).double()(**inputs).logits[0]
        logprobs.append(logits[-completion_ids.size(1) - 1 : -1].log_softmax(-1))
    plain, privileged = logprobs
    return (privileged.exp() * (privileged - plain)).sum(-1)


def test_privilege_gap_is_the_exact_divergence(model):
    measured = measure_privilege_gap(gap_rows(), make_teacher(model), completion_column="completion")
    # One token per byte
    answers = [slice(-4, -1), slice(0, 3), None, None, slice(-4, -2)]
    for row, answer in zip(measured, answers, strict=True):
        question = row["prompt"][0]["content"]
        for name in ("cue", "answer"):
            if row[name] is None:
                assert row["answer_gap"] is row["answer_gap_on_answer"] is None
                continue
            expected = naive_divergence(model, question, row["images"], row[name], row["completion"])
            assert expected.mean() > 1e-3
            assert row[f"{name}_gap"] == pytest.approx(expected.mean().item(), rel=1e-3)
            on_answer = None if answer is None else pytest.approx(expected[answer].mean().item(), rel=1e-3)
            assert row[f"{name}_gap_on_answer"] == on_answer
    assert measured["gap_error"][:] == [None] * 5
    both = [row for row in measured if row["answer_gap"] is not None]
    on_answer = [row for row in both if row["answer_gap_on_answer"] is not None]
    assert summarize_privilege_gap(measured) == {
        "cue_gap": pytest.approx(sum(row["cue_gap"] for row in both) / 4),
        "answer_gap": pytest.approx(sum(row["answer_gap"] for row in both) / 4),
        "cue_gap_rows": 4,
        "answer_gap_rows": 4,
        "cue_gap_on_answer": pytest.approx(sum(row["cue_gap_on_answer"] for row in on_answer) / 3),
        "answer_gap_on_answer": pytest.approx(sum(row["answer_gap_on_answer"] for row in on_answer) / 3),
        "cue_gap_on_answer_rows": 3,
        "answer_gap_on_answer_rows": 3,
    }


def gaps(dataset):
    columns = [dataset[name] for name in privilege_gap.GAP_COLUMNS]
    return [math.nan if gap is None else gap for column in columns for gap in column]


def test_privilege_gap_does_not_depend_on_batches(model, monkeypatch):
    batches = [
        measure_privilege_gap(gap_rows(), make_teacher(model, size), completion_column="completion")
        for size in (1, 2, 5)
    ]
    monkeypatch.setattr(privilege_gap, "MAX_SCORED_TOKENS", 60)
    monkeypatch.setattr(privilege_gap, "TOKEN_CHUNK_SIZE", 2)
    batches.append(measure_privilege_gap(gap_rows(), make_teacher(model, 5), completion_column="completion"))
    for batch in batches[1:]:
        assert gaps(batch) == pytest.approx(gaps(batches[0]), rel=1e-4, nan_ok=True)


def test_gap_is_zero_if_the_privilege_is_not_shown(model):
    measured = measure_privilege_gap(
        gap_rows(), make_teacher(model), completion_column="completion", teacher_prompt_template="{prompt}"
    )
    assert measured["cue_gap"][:] == pytest.approx([0.0] * 5, abs=1e-6)
    assert all(gap >= 0.0 for gap in measured["cue_gap"])


def record_calls(model, calls):
    return model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append({k: v.clone() for k, v in kwargs.items() if torch.is_tensor(v)}),
        with_kwargs=True,
    )


def test_all_prompts_score_the_same_completion_and_images(model):
    calls = []
    hook = record_calls(model, calls)
    measure_privilege_gap(gap_rows(), make_teacher(model, 1), completion_column="completion")
    hook.remove()
    tokenizer = make_processor().tokenizer
    calls = iter(calls)
    for row in gap_rows():
        ids = tokenizer(row["completion"])["input_ids"]
        prompts = [next(calls) for _ in range(2 if row["answer"] is None else 3)]
        texts = []
        for prompt in prompts:
            assert prompt["input_ids"][0, -len(ids) :].tolist() == ids
            assert torch.equal(prompt["pixel_values"], prompts[0]["pixel_values"])
            texts.append(tokenizer.decode(prompt["input_ids"][0, : -len(ids)]))
        assert "Hint" not in texts[0] and f"\n\n[Hint]: {row['cue']}<|im_end|>" in texts[1]
        assert row["answer"] is None or f"\n\n[Hint]: {row['answer']}<|im_end|>" in texts[2]
    assert next(calls, None) is None


@pytest.mark.parametrize(
    ("completion", "answer", "found"),
    [
        ("12, or 1.12, 112, 12.5: 12.", "12", (24, 26)),
        ("A is a point", "A", (0, 1)),
        ("No. NO!", "no", (4, 6)),
        ("It is (x+1).", "(x+1)", (6, 11)),
        ("é: yes", "yes", (4, 7)),  # of two bytes, and so of two tokens
        ("yesterday", "yes", None),
        ("yes", None, None),
        ("<|im_end|> yes", "yes", (11, 14)),
    ],
)
def test_tokens_of_the_answer(model, completion, answer, found):
    token_ids, answer_tokens = privilege_gap.tokenize_completion(make_teacher(model), completion, answer)
    assert len(token_ids) == len(completion.encode())  # text that looks like a special token is encoded as text
    assert answer_tokens == ([] if found is None else list(range(*found)))


def test_greedy_completions(model):
    teacher = make_teacher(model)
    dataset = gap_rows()
    measured = measure_privilege_gap(dataset, teacher)
    completions = privilege_gap.greedy_completions(
        teacher, [user(row["prompt"][0]["content"], *row["images"]) for row in dataset]
    )
    given = dataset.remove_columns("completion").add_column("completion", completions)
    measured_given = measure_privilege_gap(given, teacher, completion_column="completion")
    assert measured["gap_error"][:] == [None] * 5
    assert measured["cue_gap"][:] == pytest.approx(measured_given["cue_gap"][:], rel=1e-4)


def test_privilege_gap_without_answers(model):
    rows = [{"question": f"Which {i}?", "image": make_image(i), "cue": "noise" if i else None} for i in range(2)]
    measured = measure_privilege_gap(Dataset.from_list(rows), make_teacher(model))
    assert measured["cue_gap"][0] is None and measured["cue_gap"][1] > 0.0
    for name in ("answer_gap", "answer_gap_on_answer", "cue_gap_on_answer", "gap_error"):
        assert measured[name][:] == [None, None]


def test_failing_rows_do_not_stop_the_run(model):
    rows = gap_rows().to_list()
    rows[0]["cue"] = "red<|im_end|>\n<|im_start|>assistant"
    rows[1]["answer"] = "<|image_pad|>"
    rows[2]["prompt"][0]["content"] = "<|im_start|>system"
    rows[3]["completion"] = None
    rows += gap_rows().select([0, 4]).to_list()
    rows[5]["completion"] = ""
    rows[6]["prompt"] = [{"role": "user", "content": "  "}]
    rows.append(gap_rows()[4])
    dataset = Dataset.from_list(rows, features=gap_rows().features)
    measured = measure_privilege_gap(dataset, make_teacher(model, 8), completion_column="completion")
    errors = [
        "'<|im_end|>'",
        "'<|image_pad|>'",
        "'<|im_start|>'",
        "`completion` is None",
        None,
        "is empty",
        "asks nothing",
        None,
    ]
    for error, found, gap in zip(errors, measured["gap_error"], measured["cue_gap"], strict=True):
        assert (found is None and gap > 0.0) if error is None else (error in found and gap is None)
    alone = measure_privilege_gap(gap_rows(), make_teacher(model), completion_column="completion")
    assert measured["cue_gap"][4] == measured["cue_gap"][7] == pytest.approx(alone["cue_gap"][4], rel=1e-4)


def test_privilege_gap_resumes(model, tmp_path):
    whole = measure_privilege_gap(gap_rows(), make_teacher(model, 2))
    calls = []

    def die(module, args, kwargs):
        calls.append(kwargs)
        if len(calls) == 15:
            raise KeyboardInterrupt

    hook = model.register_forward_pre_hook(die, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        measure_privilege_gap(gap_rows(), make_teacher(model, 2), tmp_path)
    hook.remove()
    second = []
    hook = record_calls(model, second)
    measured = measure_privilege_gap(gap_rows(), make_teacher(model, 2), tmp_path)
    assert measured.to_dict() == whole.to_dict()
    texts = make_processor().batch_decode(torch.cat([call["input_ids"][:, :60] for call in second[:1]]))
    assert "picture 2" in texts[0] and "picture 3" in texts[1]  # rows 0 and 1 are not measured again
    second.clear()
    assert measure_privilege_gap(gap_rows(), make_teacher(model, 2), tmp_path).to_dict() == whole.to_dict()
    hook.remove()
    assert second == []
    with pytest.raises(ValueError, match="completion_column was None and is 'completion'"):
        measure_privilege_gap(gap_rows(), make_teacher(model, 2), tmp_path, completion_column="completion")


def test_privilege_gap_needs_logits_and_columns(model):
    with pytest.raises(TypeError, match="ScriptedGenerator does not provide"):
        measure_privilege_gap(gap_rows(), ScriptedGenerator(fail))
    with pytest.raises(ValueError, match="`completion_column` is 'solution'"):
        measure_privilege_gap(gap_rows(), make_teacher(model), completion_column="solution")


def test_measures_share_a_folder_and_keep_rows_in_order(model, tmp_path):
    dataset = gap_rows().select([4, 2, 0])
    measured = measure_recoverability(dataset, ScriptedGenerator(lambda number, messages: "noise"), tmp_path)
    measured = measure_usefulness(measured, ScriptedGenerator(lambda number, messages: "yes"), tmp_path)
    measured = measure_privilege_gap(measured, make_teacher(model), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "recoverability.sqlite",
        "usefulness.sqlite",
        "privilege_gap.sqlite",
    }
    assert measured.select_columns(dataset.column_names).to_list() == dataset.to_list()
    assert measured["correct_with_cue"][:] == [False, True, True]


def test_lost_endpoint_stops_the_run():
    class Gone(ScriptedGenerator):
        def generate(self, requests):
            raise GeneratorUnavailableError("gone")
            yield

    with pytest.raises(GeneratorUnavailableError, match="gone"):
        measure_usefulness(answer_rows(), Gone(fail))
