"""Vision-language models that answer chat requests: one loaded here, or one behind an OpenAI-compatible endpoint."""

import base64
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from PIL import Image

from ..data.rows import control_token_pattern, message_texts, shorten
from ..hub.names import naming_model
from .end_tokens import end_token_ids


if TYPE_CHECKING:
    from openai.types.chat import ChatCompletion
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin


@dataclass(frozen=True)
class ChatRequest:
    """
    A conversation to be continued.

    Args:
        number (`int`):
            What the response is filed under, as a rule the dataset row's number.
        messages (`Callable[[], list[dict]]`):
            Returns the conversation, in blocks of `{"type": "text", "text": str}` and
            `{"type": "image", "image": PIL.Image.Image}`. It is called where and when the generator needs it, so that
            images are decoded side by side and only a few are in memory; an error that it raises fails this request
            only.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the sampling.
    """

    number: int
    messages: Callable[[], list[dict[str, Any]]]
    seed: int = 0


class ChatResponse(NamedTuple):
    """The text that continues the conversation, or the error why there is none."""

    number: int
    text: str | None
    error: str | None = None


class Generator(Protocol):
    """
    What generates cues.

    Attributes:
        settings (`dict[str, Any]`):
            What its texts depend on, without secrets, hosts and paths: recorded with every text.
    """

    settings: dict[str, Any]

    def generate(self, requests: Iterable[ChatRequest]) -> Iterator[ChatResponse]:
        """
        Answer requests, in whatever order they get done. Requests are drawn as they are needed.

        Raises:
            [`GeneratorUnavailableError`]: If no request can succeed.
        """
        ...


class GeneratorUnavailableError(RuntimeError):
    """The generator cannot answer any request, so that going on would only fail one row after the other."""


class TransformersGenerator:
    """
    Generates with a model in this process, in batches.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            An image-text-to-text model, or its id or folder.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            Its processor; loaded with the model if that is given by name.
        adapter (`str`, *optional*):
            A PEFT adapter of the model, by id or folder.
        revision (`str`, *optional*):
            Revision of the model on the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type that the model is loaded in.
        batch_size (`int`, *optional*, defaults to `8`):
            Requests per batch.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Longest text, in tokens. A text that reaches it is a failure, since its end is missing.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; `0.0` is greedy. Each batch is sampled with its first request's seed, so samples
            depend on the batch size.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.

    Raises:
        `ValueError`: If an option is out of its range, if a loaded model comes without its processor, or if neither
            the model nor its tokenizer has an end token.
        `OSError`: If there is no such model.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel",
        processing_class: "ProcessorMixin | None" = None,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForImageTextToText, AutoProcessor

        _check_sampling(max_new_tokens, temperature, top_p)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        name = model if isinstance(model, str) else model.config._name_or_path
        if isinstance(model, str):
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
            with naming_model(name):
                processing_class = processing_class or AutoProcessor.from_pretrained(model, revision=revision)
                model = AutoModelForImageTextToText.from_pretrained(model, revision=revision, dtype=dtype).to(device)
        elif processing_class is None:
            raise ValueError(
                "`processing_class` must be given with a loaded model; only with a name it is loaded too."
            )
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        self.model = model.eval()
        self.processing_class = processing_class
        self.batch_size = batch_size
        self._control_token = control_token_pattern(processing_class)
        self.end_ids = end_token_ids(model, processing_class.tokenizer)
        self._generation = {
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature > 0.0,
            "eos_token_id": self.end_ids,
        }
        if temperature > 0.0:
            self._generation |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
        self.settings = {
            "generator": "transformers",
            "model": _public_name(name),
            "adapter": None if adapter is None else _public_name(adapter),
            "revision": getattr(model.config, "_commit_hash", None) or revision,
            "weights": _weights_digest(model),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }

    def generate(self, requests: Iterable[ChatRequest]) -> Iterator[ChatResponse]:
        """See [`Generator.generate`]. A batch that fails is tried again request by request."""
        import torch

        requests = iter(requests)
        while batch := list(islice(requests, self.batch_size)):
            readable, conversations = [], []
            for request in batch:
                try:
                    conversations.append(self._read(request))
                    readable.append(request)
                except Exception as error:
                    yield ChatResponse(request.number, None, _describe(error))
            if not readable:
                continue
            try:
                yield from self._complete(readable, conversations)
            except torch.OutOfMemoryError as error:
                raise GeneratorUnavailableError(
                    f"Out of memory in a batch of {len(readable)}. Lower `batch_size={self.batch_size}`."
                ) from error
            except Exception as error:
                if len(readable) == 1:
                    yield ChatResponse(readable[0].number, None, _describe(error))
                    continue
                for request, conversation in zip(readable, conversations, strict=True):
                    try:
                        yield from self._complete([request], [conversation])
                    except Exception as single_error:
                        yield ChatResponse(request.number, None, _describe(single_error))

    def refuse_control_tokens(self, texts: Iterable[str]) -> None:
        """
        Raises:
            `ValueError`: If the tokenizer would read a special token out of a text.
        """
        for text in texts:
            if found := self._control_token.search(text):
                raise ValueError(f"The text contains the control token {found.group()!r}: {shorten(text)}.")

    def encode(self, conversations: list[list[dict[str, Any]]]) -> "BatchFeature":
        """Model inputs of conversations, left-padded, on the model's device and in its data type."""
        return self.processing_class.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        ).to(self.model.device, self.model.dtype)

    def _read(self, request: ChatRequest) -> list[dict[str, Any]]:
        messages = request.messages()
        self.refuse_control_tokens(message_texts(messages))
        return messages

    def _complete(self, requests: list[ChatRequest], conversations: list[list[dict]]) -> list[ChatResponse]:
        import torch

        inputs = self.encode(conversations)
        if self._generation["do_sample"]:
            torch.manual_seed(requests[0].seed)
        with torch.no_grad():
            output_ids = self.model.generate(**inputs, **self._generation)
        completion_ids = output_ids[:, inputs["input_ids"].size(1) :]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        ended = torch.isin(completion_ids, completion_ids.new_tensor(self.end_ids)).any(1).tolist()
        return [
            ChatResponse(request.number, text) if has_ended else _cut(request.number, self.settings)
            for request, text, has_ended in zip(requests, texts, ended, strict=True)
        ]


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
        from openai import OpenAI

        _check_sampling(max_new_tokens, temperature, top_p)
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
            "model": _public_name(model),
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
            return ChatResponse(request.number, None, _describe(error)), False
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
        return _cut(number, self.settings)

    def _describe(self, error: BaseException) -> str:
        return _describe(error, secret=self._key)


def _check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if temperature < 0.0:
        raise ValueError(f"`temperature` must not be negative, got {temperature}.")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")


def _cut(number: int, settings: dict[str, Any]) -> ChatResponse:
    return ChatResponse(number, None, f"The text was cut at `max_new_tokens={settings['max_new_tokens']}`.")


def _public_name(name: str) -> str:
    """
    An id on the Hub as it is; of a folder only its name, because paths are nobody else's business. vLLM names a model
    that it loads from a folder by the whole path, on its own machine.
    """
    path = Path(name)
    return path.resolve().name if path.exists() or path.is_absolute() else name


def _weights_digest(model: "PreTrainedModel") -> str:
    """A digest of some elements of every weight: a model that was trained on keeps its name, but is another one."""
    import torch

    hasher = hashlib.blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        elements = weight.flatten()[:: max(1, weight.numel() // 64)]
        hasher.update(name.encode() + elements.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return hasher.hexdigest()


def _describe(error: BaseException, secret: str | None = None) -> str:
    text = f"{type(error).__name__}: {error}"
    if secret:
        text = text.replace(secret, "[key]")
    return text if len(text) <= 500 else f"{text[:500]}…"


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
