"""What a vision-language model is asked and answers, and the interface of what asks it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol


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
    An id on the Hub as it is; of a folder only its name, because paths are nobody else's business. vLLM names a model
    that it loads from a folder by the whole path, on its own machine.
    """
    path = Path(name)
    return path.resolve().name if path.exists() or path.is_absolute() else name


def describe_error(error: BaseException, secret: str | None = None) -> str:
    text = f"{type(error).__name__}: {error}"
    if secret:
        text = text.replace(secret, "[key]")
    return text if len(text) <= 500 else f"{text[:500]}…"
