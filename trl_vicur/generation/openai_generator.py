"""A vision-language model behind an OpenAI-compatible endpoint that answers chat requests."""

import base64
import os
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..data.rows import shorten
from ..extras import needs_extra
from .requests import (
    ChatRequest,
    ChatResponse,
    GeneratorUnavailableError,
    check_sampling,
    cut_response,
    describe_error,
    public_name,
)


if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion


class OpenAIGenerator:
    """
    Generates with a model behind an OpenAI-compatible chat endpoint (vLLM, SGLang, a hosted API), many requests at a
    time. Requests that meet 408, 409, 429, 5xx or a lost connection are repeated with exponential back-off.

    What is no option here stays the endpoint's: vLLM takes `top_k` and `repetition_penalty` from the model's
    `generation_config.json`, unless it is started with `--generation-config vllm`.

    The key is read from the environment variable `OPENAI_API_KEY`, and from nowhere else; endpoints without keys need
    none.

    Args:
        model (`str`):
            Name of the model at the endpoint.
        base_url (`str`, *optional*):
            Address of the endpoint, e.g. `"http://localhost:8000/v1"`; OpenAI's own by default.
        concurrency (`int`, *optional*, defaults to `16`):
            Requests under way at a time.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for the endpoint before a request counts as lost.
        max_retries (`int`, *optional*, defaults to `5`):
            Repetitions of a request.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest text, in tokens. A text that reaches it is a failure, since its end is missing.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.

    Raises:
        `ValueError`: If an option is out of its range, or OpenAI's own endpoint is asked for without a key.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        max_retries: int = 5,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ):
        with needs_extra("cues", "An OpenAI-compatible endpoint"):
            from openai import OpenAI

        check_sampling(max_new_tokens, temperature, top_p)
        if concurrency < 1:
            raise ValueError(f"`concurrency` must be at least 1, got {concurrency}.")
        self._key = os.environ.get("OPENAI_API_KEY")
        if not self._key and base_url is None:
            raise ValueError(
                "Neither the environment variable OPENAI_API_KEY nor `base_url` is set. Export the key of OpenAI's "
                "endpoint, or name the address of your own, e.g. `base_url='http://localhost:8000/v1'`."
            )
        # The client insists on a key; endpoints without keys ignore it
        self._client = OpenAI(api_key=self._key or "none", base_url=base_url, timeout=timeout, max_retries=max_retries)
        self.concurrency = concurrency
        self._sampling = {"max_completion_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        self.settings = {
            "generator": "openai",
            "model": public_name(model),
            "adapter": None,
            "revision": None,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        self._model = model

    def generate(self, requests: Iterable[ChatRequest]) -> Iterator[ChatResponse]:
        """See [`Generator.generate`]."""
        # An endpoint that has died, or that understands no request, would fail all rows that are left
        patience = max(32, 2 * self.concurrency)
        num_failed, num_running, unavailable = 0, 0, None
        requests = iter(requests)
        outcomes = SimpleQueue()

        def run(request: ChatRequest) -> None:
            try:
                outcomes.put((*self._complete(request), None))
            except BaseException as error:
                outcomes.put((None, True, error))

        while True:
            # What is still under way at an error is waited for, because it may have been paid for
            if unavailable is None:
                for request in islice(requests, self.concurrency - num_running):
                    # Daemons, because at Ctrl-C nobody wants to wait for an endpoint that hangs
                    Thread(target=run, args=(request,), name="cues", daemon=True).start()
                    num_running += 1
            if num_running == 0:
                break
            response, endpoint_failed, error = outcomes.get()
            num_running -= 1
            if error is not None:
                unavailable = error
                continue
            yield response
            num_failed = num_failed + 1 if endpoint_failed else 0
            if num_failed == patience:
                unavailable = GeneratorUnavailableError(
                    f"The last {patience} requests have all failed, the last one with: {response.error}"
                )
        if unavailable is not None:
            raise unavailable

    def _complete(self, request: ChatRequest) -> tuple[ChatResponse, bool]:
        """The response, and whether it is the endpoint that failed."""
        import openai

        try:
            messages = to_openai(request.messages())
        except Exception as error:
            return ChatResponse(request.number, None, describe_error(error)), False
        try:
            completion = self._client.chat.completions.create(
                model=self._model, messages=messages, seed=request.seed, **self._sampling
            )
            return self._read(request.number, completion), False
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise GeneratorUnavailableError(
                f"The endpoint refuses the key ({self._describe(error)}). Set the environment variable OPENAI_API_KEY."
            ) from None  # the client's own error may quote the key
        except openai.NotFoundError as error:
            raise GeneratorUnavailableError(
                f"The endpoint has no model {self._model!r}, or is no chat endpoint ({self._describe(error)}). Check "
                "`model` and `base_url`, which mostly ends in /v1."
            ) from None
        except openai.APIConnectionError as error:
            if not isinstance(error, openai.APITimeoutError):
                raise GeneratorUnavailableError(
                    f"The endpoint cannot be reached ({self._describe(error.__cause__ or error)}). Check `base_url` "
                    "and whether its server runs."
                ) from None
            return ChatResponse(request.number, None, self._describe(error)), True
        except Exception as error:
            return ChatResponse(request.number, None, self._describe(error)), True

    def _read(self, number: int, completion: "ChatCompletion | str") -> ChatResponse:
        try:
            choice = completion.choices[0]
            text, refusal = choice.message.content or "", choice.message.refusal
            is_cut = choice.finish_reason == "length"
            num_tokens = getattr(completion.usage, "completion_tokens", None)
            text.strip()
        except (AttributeError, IndexError, TypeError):  # the client does not check what an endpoint sends
            raise ValueError(f"The endpoint answered without a chat completion: {shorten(completion)}.") from None
        if refusal:
            return ChatResponse(number, None, f"The model refused: {shorten(refusal)}.")
        if not is_cut:
            return ChatResponse(number, text)
        if num_tokens is not None and num_tokens < self.settings["max_new_tokens"]:
            error = (
                f"The endpoint cut the text after {num_tokens} tokens, before "
                f"`max_new_tokens={self.settings['max_new_tokens']}`: at its own limit, or where its context is full."
            )
            return ChatResponse(number, None, error)
        return cut_response(number, self.settings)

    def _describe(self, error: BaseException) -> str:
        return describe_error(error, secret=self._key)


def to_openai(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same messages with images as data URLs."""
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "image_url", "image_url": {"url": _data_url(block["image"])}}
                if block["type"] == "image"
                else block
                for block in message["content"]
            ],
        }
        for message in messages
    ]


def _data_url(image: Image.Image) -> str:
    # A photograph as PNG would be several times as large as the file that it came from
    image_format = "JPEG" if image.format == "JPEG" else "PNG"
    buffer = BytesIO()
    image.convert("RGB").save(buffer, image_format, quality=95)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
