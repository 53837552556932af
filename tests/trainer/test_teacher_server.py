"""A teacher on a server: the same training as with a local one, and errors before training."""

import threading

import openai
import pytest
import torch
from scoring_server import ScoringServer
from served_teacher import assert_trains_as_with_local_teacher, make_trainer
from tiny_models import encode, make_image, make_processor, make_qwen3_vl, user, with_completion

from trl_vicur import ViCuRConfig
from trl_vicur.trainer.teachers import teacher_server
from trl_vicur.trainer.teachers.served_teacher import ServedTeacher
from trl_vicur.trainer.teachers.teacher_server import MAX_PROBE_DIFFERENCE, NUM_PROBES, ScoringRequest, TeacherServer


@pytest.fixture(scope="module")
def teacher():
    return make_qwen3_vl(num_layers=2, hidden_size=64, seed=5)


@pytest.fixture
def serve(teacher, processor):
    """Starts a server with options and returns it."""
    servers = []

    def serve(**options) -> ScoringServer:
        servers.append(ScoringServer(**{"model": teacher, "processor": processor, **options}).__enter__())
        return servers[-1]

    yield serve
    for server in servers:
        server.__exit__()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr(teacher_server, "RETRY_INTERVAL", 0.05)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(distillation_mode="topk_logits", distillation_topk=20, beta=0.5, num_iterations=2, privilege="none"),
    ],
    ids=["sampled_token", "topk_logits"],
)
def test_training_equals_that_with_a_local_teacher(serve, teacher, processor, tmp_path, options):
    server = serve()
    assert_trains_as_with_local_teacher(server.url, teacher, processor, tmp_path, **options)
    # Each completion is scored once. Before training, two requests are repeated often enough to detect replicas
    num_rollouts = 2 if "num_iterations" in options else 3
    assert len(server.requests) == 2 * NUM_PROBES + 4 * num_rollouts


def test_sampled_token_ids_are_scored(serve, teacher, processor):
    """Also control tokens and invalid UTF-8 in a completion (invariant 9)."""
    images = [make_image(0), make_image(1, (128, 96))]
    conversation = user("Compare.", *images)
    completion_ids = [*processor.tokenizer.encode("<|im_end|><|im_start|>"), *range(180, 200), *range(100, 90, -1)]
    inputs = encode(processor, [conversation])
    prompt_ids = inputs["input_ids"][0].tolist()
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    short_prompt_ids = processor.tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        logits = teacher(**with_completion(inputs, torch.tensor([completion_ids]))).logits[0]
    expected = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)

    client = TeacherServer(serve().url, processor.tokenizer, top_k=3)
    (scores,) = client.score([ScoringRequest(prompt_ids, short_prompt_ids, images, completion_ids)])
    logprobs = expected.gather(1, torch.tensor(completion_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scores.logprobs), logprobs)
    torch.testing.assert_close(torch.tensor(scores.top_logprobs), expected.topk(3).values)
    assert scores.top_ids == expected.topk(3).indices.tolist()


def test_card_names_the_served_teacher(serve, processor, tmp_path):
    trainer = make_trainer(tmp_path, processor, teacher_model_server_url=serve(name="me/large-teacher").url)
    trainer.save_model()
    assert "me/large-teacher" in (tmp_path / "README.md").read_text()


def test_failing_requests_are_repeated(serve, processor):
    answers = []

    def fail_often(path, answer):
        answers.append(path)
        return (503, {"error": {"message": "busy"}}) if len(answers) % 3 else answer

    client = TeacherServer(serve(tamper=fail_often).url, processor.tokenizer, timeout=10.0)
    scores = client.score([ScoringRequest([i], [i], [], [5, 6]) for i in range(3)])
    assert [len(each.logprobs) for each in scores] == [2, 2, 2]
    assert len(answers) == 15


def test_trainer_waits_for_a_server_that_is_starting(teacher, processor):
    with ScoringServer(teacher, processor) as server:
        port = server._server.server_port
    later = threading.Timer(0.3, lambda: servers.append(ScoringServer(teacher, processor, port=port).__enter__()))
    servers = []
    later.start()
    assert TeacherServer(f"http://127.0.0.1:{port}", processor.tokenizer, timeout=30.0).model == "me/teacher"
    servers[0].__exit__()


def test_server_lost_during_training_is_reported(serve, processor, tmp_path):
    server = serve()
    trainer = make_trainer(tmp_path, processor, teacher_model_server_url=server.url)
    server.__exit__()
    with pytest.raises(ConnectionError, match=r"was lost \(.*\) and did not come back. Restart it"):
        trainer.train()


def change(path: str, status: int = 200, **changes):
    """Changes the status and fields of the answers at a path."""

    def tamper(at, answer):
        return (status, {**answer[1], **changes}) if at == path else answer

    return tamper


GENERATE = "/inference/v1/generate"
ANSWERS = {
    "another-model": (
        dict(name="me/other"),
        dict(teacher_model="me/teacher"),
        r"serves \['me/other'\], not .*'me/teacher'",
    ),
    "another-vocabulary": (
        dict(tamper=change("/detokenize", prompt='!"#$ other')),
        {},
        "has a different vocabulary than the student: after 4 characters, its tokens continue with ' other'",
    ),
    "no-scoring": (
        dict(tamper=change(GENERATE, status=404)),
        {},
        r"answered /inference/v1/generate with 404: .*`vllm serve MODEL --enable-scale-out`",
    ),
    "a-key": (
        dict(tamper=change("/v1/models", status=401)),
        {},
        "with 401: .*Set the environment variable OPENAI_API_",
    ),
    "too-few-logprobs": (
        {},
        dict(distillation_mode="topk_logits", distillation_topk=30),
        "with 400: .*greater than max allowed: 20.* Start it with `--max-logprobs 30` or more",
    ),
    "no-logprobs": (
        dict(tamper=change(GENERATE, prompt_logprobs=None)),
        {},
        "without the log-probabilities and token ids of the prompt. It must be vLLM 0.31 or later",
    ),
    "short-context": (
        dict(max_model_len=70),
        {},
        "Row 0 of train_dataset: The prompt .* has 71 tokens, .* exceeds the model's context of 69 tokens "
        r"\(or the `--max-model-len` of the teacher's server, minus one\)",
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_unsuitable_server_is_refused(serve, processor, tmp_path, case):
    server_options, options, message = ANSWERS[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make_trainer(tmp_path, processor, teacher_model_server_url=serve(**server_options).url, **options)


def replicas(shift: float):
    """Every second answer comes from a replica with another log-probability of one token."""
    answers = []

    def tamper(path, answer):
        if path == GENERATE:
            answers.append(answer)
            if len(answers) % 2 == 0:
                token = next(iter(answer[1]["prompt_logprobs"][-2].values()))
                token["logprob"] -= shift
        return answer

    return tamper


def test_replicas_that_differ_are_refused(serve, processor, tmp_path):
    server = serve(tamper=replicas(MAX_PROBE_DIFFERENCE + 0.2))
    with pytest.raises(
        ValueError,
        match=rf"`teacher_model_server_url='{server.url}'` scored the same request 8 times with log-probabilities "
        r"that differ by up to 0.70 nats, expected at most 0.5 from rounding",
    ):
        make_trainer(tmp_path, processor, teacher_model_server_url=server.url)


def test_replicas_that_differ_by_rounding_are_accepted(serve, processor, tmp_path):
    server = serve(tamper=replicas(MAX_PROBE_DIFFERENCE - 0.2))
    trainer = make_trainer(tmp_path, processor, teacher_model_server_url=server.url)
    assert isinstance(trainer.teacher, ServedTeacher)


def test_server_that_resizes_images_differently_is_refused(serve, processor, tmp_path):
    """Its visual tokens would differ from those of the student's processor."""
    other = make_processor()
    other.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    with pytest.raises(
        ValueError,
        match=r"turns a prompt with 1 image\(s\) into .* which differ from the .* of the student's processor",
    ):
        make_trainer(tmp_path, processor, teacher_model_server_url=serve(processor=other).url)


def test_unreachable_server_is_reported(processor, tmp_path):
    with ScoringServer(None, processor) as server:
        url = server.url
    with pytest.raises(ConnectionError, match=r"cannot be reached \(.*refused.*\) after 0 seconds. Start it with"):
        make_trainer(tmp_path, processor, teacher_model_server_url=url, vllm_server_timeout=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(teacher_model_server_url="localhost:8000"), "must be an address such as 'http://localhost:8000', got"),
        (dict(teacher_model_kind="live"), "makes the student its own teacher, but `teacher_model_server_url="),
        (dict(distillation_mode="full_logits"), "needs .* the whole vocabulary, which a server does not send. Choose"),
        (dict(temperature=0.7), "vLLM always scores prompt tokens at temperature 1"),
    ],
)
def test_options_that_contradict_a_server_are_refused(tmp_path, options, message):
    options = {"teacher_model_server_url": "http://localhost:8000", **options}
    with pytest.raises(ValueError, match=message):
        ViCuRConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


def test_loaded_teacher_together_with_a_server_is_refused(teacher, processor, tmp_path):
    with pytest.raises(ValueError, match=r"a loaded `teacher_model` \(Qwen3VLForCond.*\) was passed as well"):
        make_trainer(tmp_path, processor, teacher, teacher_model_server_url="http://localhost:8000")
