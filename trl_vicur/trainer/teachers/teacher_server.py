"""Client of a vLLM server that serves the teacher and scores the student's completions."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.data_utils import prepare_multimodal_messages
from trl.generation.vllm_client import pil_to_base64

from ...data.rows import shorten
from ...extras import needs_extra
from ..checks.thinking import MESSAGES, ThinkingMode, thinking_mode, warn_about_thinking_teacher
from ..vicur_config import ViCuRConfig


if TYPE_CHECKING:
    import openai


CONCURRENCY = 64  # requests in flight, per process
RETRY_INTERVAL = 2.0  # seconds
PROBE_SIZES = (64, 1024)  # side of a square image, in pixels
PROBE_COMPLETION = "The image shows one colour and nothing else."
NUM_PROBES = 8  # at once, so that a load balancer spreads them over all replicas
# Nats. bfloat16 logits between 16 and 32 are 0.125 apart, and rounding depends on what else is in the batch
MAX_PROBE_DIFFERENCE = 0.5


class ScoringRequest(NamedTuple):
    """
    A completion to score, and the teacher's prompt before it.

    Args:
        prompt_ids (`list[int]`):
            Token ids of the teacher's prompt, with all visual tokens.
        short_prompt_ids (`list[int]`):
            The same with one placeholder per image. The server expands each into the image's visual tokens itself.
        images (`list[PIL.Image.Image]`):
            The prompt's images, in order.
        completion_ids (`list[int]`):
            Token ids to score.
    """

    prompt_ids: list[int]
    short_prompt_ids: list[int]
    images: list[Image.Image]
    completion_ids: list[int]


class CompletionScores(NamedTuple):
    """
    The teacher's scores of a completion.

    Args:
        logprobs (`list[float]`):
            Log-probability (in nats) of each token.
        top_ids (`list[list[int]]`):
            Ids of the `top_k` most likely tokens at each position, most likely first; empty if `top_k` is 0.
        top_logprobs (`list[list[float]]`):
            Their log-probabilities.
    """

    logprobs: list[float]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


class TeacherServer:
    """
    Client of `vllm serve MODEL --enable-scale-out`, vLLM 0.31 or later.

    Prompts and completions are sent and returned as token ids, never as text. Requests that fail with 408, 409, 429,
    5xx or a lost connection are retried with exponential back-off. If the server needs a key, set the environment
    variable `OPENAI_API_KEY`.

    Args:
        url (`str`):
            Address of the server, e.g. `"http://localhost:8000"`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The student's tokenizer, which the teacher must share.
        top_k (`int`, *optional*, defaults to `0`):
            Number of most likely tokens to return at each position, besides the sampled one.
        model (`str`, *optional*):
            The model that the server must serve. By default, any model is accepted.
        timeout (`float`, *optional*, defaults to `0.0`):
            Seconds to wait for a server that is still starting.

    Raises:
        `ConnectionError`: If there is no server at the address.
        `ValueError`: If the server has another model, or one with another vocabulary.
    """

    def __init__(
        self,
        url: str,
        tokenizer: PreTrainedTokenizerBase,
        top_k: int = 0,
        model: str | None = None,
        timeout: float = 0.0,
    ):
        with needs_extra("openai", "A teacher server"):
            import openai

        self.url = url.rstrip("/")
        self.top_k = top_k
        key = os.environ.get("OPENAI_API_KEY") or "none"  # the client requires one
        self._client = openai.OpenAI(base_url=self.url, api_key=key, max_retries=5)
        served = {each["id"]: each["max_model_len"] for each in self._wait(timeout)["data"]}
        self.model = model or next(iter(served))
        if self.model not in served:
            raise ValueError(
                f"The teacher's server at {self.url} serves {list(served)}, not the teacher model {model!r}. Start it "
                "with that model (or with `--served-model-name`), or leave out the teacher's name."
            )
        # vLLM must generate at least one token after the scored ones
        self.max_length = served[self.model] - 1
        self._check_vocabulary(tokenizer)

    @classmethod
    def from_config(cls, args: ViCuRConfig, processing_class: ProcessorMixin, model: str | None) -> "TeacherServer":
        """
        Connect to the server at `args.teacher_model_server_url` and probe it: it scores a prompt with a small image
        and one with a large image several times each. So refused requests and replicas that differ raise before
        training.

        Warns if the server's chat template puts the teacher in a different thinking mode than the student.

        Args:
            args ([`ViCuRConfig`]):
                Training configuration.
            processing_class ([`~transformers.ProcessorMixin`]):
                Processor of the student.
            model (`str`, *optional*):
                The model that the server must serve.

        Raises:
            `ConnectionError`: As in the constructor and [`TeacherServer.score`].
            `ValueError`: As in these, or if the server's answers to the same request differ by more than rounding.
        """
        tokenizer = processing_class.tokenizer
        top_k = args.distillation_topk if args.distillation_mode == "topk_logits" else 0
        assert args.teacher_model_server_url is not None
        server = cls(args.teacher_model_server_url, tokenizer, top_k, model, args.vllm_server_timeout)
        chat_template_kwargs = args.chat_template_kwargs or {}
        assert isinstance(chat_template_kwargs, dict)  # the configuration parses JSON strings
        completion_ids = tokenizer(PROBE_COMPLETION, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        for size in PROBE_SIZES:
            image = Image.new("RGB", (size, size))
            conversation = prepare_multimodal_messages([{"role": "user", "content": "-"}], images=[image])
            template: dict[str, Any] = {"add_generation_prompt": True, **chat_template_kwargs}
            inputs: Any = processing_class.apply_chat_template(
                [conversation], tokenize=True, return_dict=True, **template
            )
            text = processing_class.apply_chat_template(conversation, tokenize=False, **template)
            short_prompt_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            prompt_ids = list(inputs["input_ids"][0])
            if len(prompt_ids) + len(completion_ids) <= server.max_length:
                server._probe(ScoringRequest(prompt_ids, short_prompt_ids, [image], completion_ids))
        mode = server._thinking_mode(tokenizer, chat_template_kwargs)
        warn_about_thinking_teacher(server.model, mode, processing_class, args)
        return server

    def _probe(self, request: ScoringRequest) -> None:
        """Send the same request several times at once, and check that the scores differ only by rounding."""
        answers = self.score([request] * NUM_PROBES)
        numbers = [[*answer.logprobs, *chain(*answer.top_logprobs)] for answer in answers]
        difference = max(max(same) - min(same) for same in zip(*numbers, strict=True))
        if difference > MAX_PROBE_DIFFERENCE:
            raise ValueError(
                f"`teacher_model_server_url={self.url!r}` scored the same request {NUM_PROBES} times with "
                f"log-probabilities that differ by up to {difference:.2f} nats, expected at most "
                f"{MAX_PROBE_DIFFERENCE} from rounding. Several replicas probably share this address and serve "
                "different weights: serve the same model on all of them, or give the address of one."
            )

    def _thinking_mode(
        self, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any] | None
    ) -> ThinkingMode | None:
        """Thinking mode that the server's own chat template selects; `None` if it has no chat template."""
        import openai

        def render(**variables: Any) -> str:
            body = {"model": self.model, "messages": MESSAGES, "chat_template_kwargs": variables}
            answer: Any = self._client.post("/tokenize", body=body, cast_to=object)
            return str(tokenizer.decode(answer["tokens"]))

        try:
            return thinking_mode(render, chat_template_kwargs)
        except openai.BadRequestError:
            return None

    def _wait(self, timeout: float) -> dict[str, Any]:
        """Wait until the server is up, and return its list of models."""
        import openai

        deadline = time.monotonic() + timeout
        client = self._client.with_options(max_retries=0, timeout=60.0)
        while True:
            try:
                models: Any = client.get("/v1/models", cast_to=object)
                return models
            except (openai.APIConnectionError, openai.InternalServerError) as error:
                if time.monotonic() >= deadline:
                    raise ConnectionError(
                        f"The teacher's server at {self.url} cannot be reached ({error.__cause__ or error}) after "
                        f"{timeout:.0f} seconds. Start it with `vllm serve MODEL --enable-scale-out`, check "
                        "`teacher_model_server_url`, or raise `vllm_server_timeout`."
                    ) from error
                time.sleep(min(RETRY_INTERVAL, timeout))
            except openai.APIStatusError as error:
                raise self._refusal("/v1/models", error) from error

    def _check_vocabulary(self, tokenizer: PreTrainedTokenizerBase) -> None:
        token_ids = list(range(len(tokenizer)))
        theirs = self._post("/detokenize", {"model": self.model, "tokens": token_ids})["prompt"]
        ours = str(tokenizer.decode(token_ids))
        if theirs != ours:
            same = os.path.commonprefix([ours, theirs])
            raise ValueError(
                f"{self.model!r} at the teacher's server {self.url} has a different vocabulary than the student: "
                f"after {len(same)} characters, its tokens continue with {shorten(theirs[len(same) :])}, the "
                f"student's with {shorten(ours[len(same) :])}. Serve a model with the student's tokenizer."
            )

    def score(self, requests: list[ScoringRequest]) -> list[CompletionScores]:
        """
        Score completions, with up to 64 requests in flight.

        Args:
            requests (`list[ScoringRequest]`):
                The completions with their prompts.

        Returns:
            `list[CompletionScores]`: In the same order.

        Raises:
            `ConnectionError`: If the connection is lost and does not come back.
            `ValueError`: If the server refuses a request, or tokenizes a prompt differently than the trainer.
        """
        with ThreadPoolExecutor(max_workers=CONCURRENCY) as executor:
            return list(executor.map(self._score, requests))

    def _score(self, request: ScoringRequest) -> CompletionScores:
        images = [f"data:image/png;base64,{pil_to_base64(image)}" for image in request.images]
        path = "/inference/v1/generate"
        answer = self._post(
            path,
            {
                "model": self.model,
                "token_ids": request.short_prompt_ids + request.completion_ids,
                "content_parts": [{"type": "image_url", "url": image} for image in images],
                "return_token_ids": True,
                "sampling_params": {"max_tokens": 1, "prompt_logprobs": self.top_k, "detokenize": False},
            },
        )
        try:
            scored_ids, logprobs = answer["prompt_token_ids"], answer["prompt_logprobs"]
            if scored_ids == request.prompt_ids + request.completion_ids:
                return self._read(request.completion_ids, logprobs[len(request.prompt_ids) :])
            num_tokens = len(scored_ids)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"The teacher's server at {self.url} answered {path} with {shorten(answer)}, without the "
                "log-probabilities and token ids of the prompt. It must be vLLM 0.31 or later."
            ) from error
        raise ValueError(
            f"The teacher's server at {self.url} turns a prompt with {len(images)} image(s) into {num_tokens} tokens, "
            f"which differ from the {len(request.prompt_ids + request.completion_ids)} tokens of the student's "
            f"processor. Serve {self.model!r} with the student's processor settings (`--mm-processor-kwargs`, e.g. "
            "its pixel limits), or a model of the same family."
        )

    def _read(self, completion_ids: list[int], positions: list[dict[str, dict[str, float]]]) -> CompletionScores:
        """Read the token's own and the top log-probabilities from vLLM's `{token id: {"logprob": float, …}}`."""
        logprobs = [
            position[str(token_id)]["logprob"] for token_id, position in zip(completion_ids, positions, strict=True)
        ]
        tops = []
        for position in positions:
            entries = sorted(((-entry["logprob"], int(token_id)) for token_id, entry in position.items()))
            tops.append(entries[: self.top_k])
        return CompletionScores(
            logprobs,
            [[token_id for _, token_id in top] for top in tops],
            [[-negative for negative, _ in top] for top in tops],
        )

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        import openai

        try:
            answer: Any = self._client.post(path, body=body, cast_to=object)
            return answer
        except openai.APIStatusError as error:
            raise self._refusal(path, error) from error
        except openai.APIConnectionError as error:
            raise ConnectionError(
                f"The teacher's server at {self.url} was lost ({error.__cause__ or error}) and did not come back. "
                "Restart it, and resume training from the last checkpoint."
            ) from error

    def _refusal(self, path: str, error: "openai.APIStatusError") -> ValueError:
        fixes = {
            400: f"Start it with `--max-logprobs {self.top_k}` or more, and a `--max-model-len` that fits prompt and "
            "completion.",
            401: "Set the environment variable OPENAI_API_KEY to its key.",
            404: "Start it as `vllm serve MODEL --enable-scale-out`, and give the address without `/v1`.",
        }
        return ValueError(
            f"The teacher's server at {self.url} answered {path} with {error.status_code}: {shorten(error.body)}. "
            + fixes.get(error.status_code, "See its log for details.")
        )
