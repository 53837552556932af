"""Requests to a vision-language model, its responses, and the interface of a generator."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol


@dataclass(frozen=True)
class ChatRequest:
    """
    A conversation for the model to continue.

    Args:
        number (`int`):
            Number that the response is stored under, usually the number of the dataset row.
        messages (`Callable[[], list[dict]]`):
            Returns the conversation, in blocks of `{"type": "text", "text": str}` and
            `{"type": "image", "image": PIL.Image.Image}`. The generator calls it when it sends the request, possibly
            in another thread, so that images are decoded in parallel and only a few are in memory. If it raises, only
            this request fails.
        seed (`int`, *optional*, defaults to `0`):
            Seed for sampling.
    """

    number: int
    messages: Callable[[], list[dict[str, Any]]]
    seed: int = 0


class ChatResponse(NamedTuple):
    """The text that continues the conversation, or the error that prevented it."""

    number: int
    text: str | None
    error: str | None = None


class Generator(Protocol):
    """
    Interface of a generator: a model that answers chat requests.

    Attributes:
        settings (`dict[str, Any]`):
            Everything that its texts depend on, without secrets, hosts and paths. Stored with every text.
    """

    settings: dict[str, Any]

    def generate(self, requests: Iterable[ChatRequest]) -> Iterator[ChatResponse]:
        """
        Answer requests, and yield responses in the order in which they finish. Requests are read from the iterable
        only when needed.

        Raises:
            [`GeneratorUnavailableError`]: If no request can succeed.
        """
        ...


class GeneratorUnavailableError(RuntimeError):
    """The generator cannot answer any request, so continuing would only fail row after row."""


def check_sampling(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {max_new_tokens}.")
    if temperature < 0.0:
        raise ValueError(f"`temperature` must not be negative, got {temperature}.")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")


def cut_response(number: int, settings: dict[str, Any]) -> ChatResponse:
    return ChatResponse(number, None, f"The text was cut at `max_new_tokens={settings['max_new_tokens']}`.")


def public_name(name: str) -> str:
    """
    A model's name without local paths: an id on the Hub is unchanged, a folder is shortened to its last part. The
    folder may be on another machine, because vLLM by default names a model by the path that it was loaded from.
    """
    path = Path(name)
    return path.resolve().name if path.exists() or path.is_absolute() else name


def describe_error(error: BaseException, secret: str | None = None) -> str:
    text = f"{type(error).__name__}: {error}"
    if secret:
        text = text.replace(secret, "[key]")
    return text if len(text) <= 500 else f"{text[:500]}…"
