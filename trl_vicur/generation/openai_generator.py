"""Generate with a vision-language model at an OpenAI-compatible endpoint."""

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
    from openai.types.chat import ChatCompletion, ChatCompletionMessageParam


class OpenAIGenerator:
    """
    Generates with a model at an OpenAI-compatible chat endpoint (vLLM, SGLang, a hosted API), with many concurrent
    requests. Requests that fail with 408, 409, 429, 5xx or a lost connection are retried with exponential back-off.

    The endpoint's defaults apply to all other sampling options. For example, vLLM reads `top_k` and
    `repetition_penalty` from the model's `generation_config.json`, unless it is started with
    `--generation-config vllm`.

    The key is read only from the environment variable `OPENAI_API_KEY`. Endpoints without keys do not need it.

    Args:
        model (`str`):
            Name of the model at the endpoint.
        base_url (`str`, *optional*):
            Address of the endpoint, e.g. `"http://localhost:8000/v1"`. Defaults to OpenAI's own.
        concurrency (`int`, *optional*, defaults to `16`):
            Number of concurrent requests.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds to wait for a response before a request counts as lost.
        max_retries (`int`, *optional*, defaults to `5`):
            How often to retry a request.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a text, in tokens. A request fails if its text is cut at this length.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.

    Raises:
        `ValueError`: If an option is out of range, or OpenAI's own endpoint is used without a key.
        `ModuleNotFoundError`: If the extra `cues` is not installed.
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
                "endpoint, or give the address of your own, e.g. `base_url='http://localhost:8000/v1'`."
            )
        # The client requires a key; endpoints without keys ignore it
        self._client = OpenAI(api_key=self._key or "none", base_url=base_url, timeout=timeout, max_retries=max_retries)
        self.concurrency = concurrency
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
        # With a dead or misconfigured endpoint, all remaining rows would fail
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
            # After an error, still wait for running requests, because they may cost money
            if unavailable is None:
                for request in islice(requests, self.concurrency - num_running):
                    # Daemon threads, so that Ctrl-C does not wait for an endpoint that hangs
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
        """The response, and whether the endpoint failed."""
        import openai

        try:
            messages = to_openai(request.messages())
        except Exception as error:
            return ChatResponse(request.number, None, describe_error(error)), False
        try:
            completion = self._client.chat.completions.create(
                model=self._model,
                messages=messages,
                seed=request.seed,
                max_completion_tokens=self.settings["max_new_tokens"],
                temperature=self.settings["temperature"],
                top_p=self.settings["top_p"],
            )
            return self._read(request.number, completion), False
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            raise GeneratorUnavailableError(
                f"The endpoint refuses the key ({self._describe(error)}). Set the environment variable OPENAI_API_KEY."
            ) from None  # the client's error may quote the key
        except openai.NotFoundError as error:
            raise GeneratorUnavailableError(
                f"The endpoint has no model {self._model!r}, or is not a chat endpoint ({self._describe(error)}). "
                "Check `model` and `base_url`, which usually ends in /v1."
            ) from None
        except openai.APIConnectionError as error:
            if not isinstance(error, openai.APITimeoutError):
                raise GeneratorUnavailableError(
                    f"The endpoint cannot be reached ({self._describe(error.__cause__ or error)}). Check `base_url` "
                    "and whether the server is running."
                ) from None
            return ChatResponse(request.number, None, self._describe(error)), True
        except Exception as error:
            return ChatResponse(request.number, None, self._describe(error)), True

    def _read(self, number: int, completion: "ChatCompletion") -> ChatResponse:
        try:
            choice = completion.choices[0]
            text, refusal = choice.message.content or "", choice.message.refusal
            is_cut = choice.finish_reason == "length"
            num_tokens = getattr(completion.usage, "completion_tokens", None)
            text.strip()
        except (AttributeError, IndexError, TypeError):  # the client does not validate responses
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


def to_openai(messages: list[dict[str, Any]]) -> "list[ChatCompletionMessageParam]":
    """The messages in OpenAI's format, with images as data URLs."""
    converted: list[Any] = [
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
    return converted


def _data_url(image: Image.Image) -> str:
    # A photo is several times as large in PNG as in JPEG
    image_format = "JPEG" if image.format == "JPEG" else "PNG"
    buffer = BytesIO()
    image.convert("RGB").save(buffer, image_format, quality=95)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
