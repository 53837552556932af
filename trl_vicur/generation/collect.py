"""Collect responses for the rows of a dataset. Each is saved as soon as it arrives, so a run can be resumed."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from .requests import ChatRequest, ChatResponse, Generator
from .response_store import ResponseStore


def collect(
    store: ResponseStore,
    numbers: Sequence[int],
    respond: Callable[[Iterable[int]], Iterable[ChatResponse]],
    description: str,
    unit: str = "row",
    seed: Callable[[int], int] | None = None,
    retry_failed: bool = False,
) -> None:
    """
    Get the responses that are missing in the store, and save them.

    Args:
        store ([`ResponseStore`]):
            Saves responses one by one. Numbers that already have a response are skipped.
        numbers (`Sequence[int]`):
            The numbers that responses are stored under.
        respond (`Callable[[Iterable[int]], Iterable[ChatResponse]]`):
            Gets the remaining numbers and yields a response for each, in any order.
        description (`str`):
            Label of the progress bar.
        unit (`str`, *optional*, defaults to `"row"`):
            What the progress bar counts.
        seed (`Callable[[int], int]`, *optional*):
            Returns the sampling seed of a number, which is stored with its response.
        retry_failed (`bool`, *optional*, defaults to `False`):
            Whether to retry numbers that failed in earlier runs.

    Raises:
        [`GeneratorUnavailableError`]: If no request can succeed.
        `OSError`: If the disk is full.
    """
    pending = store.pending(numbers, retry_failed)
    num_failed = 0
    with tqdm(total=len(numbers), initial=len(numbers) - len(pending), desc=description, unit=unit) as progress:
        for response in respond(pending):
            store.add([response], None if seed is None else seed(response.number))
            num_failed += response.error is not None
            progress.set_postfix(failed=num_failed, refresh=False)
            progress.update()


def ask(
    generator: Generator,
    store: ResponseStore,
    numbers: Sequence[int],
    messages: Callable[[int], list[dict[str, Any]]],
    description: str,
    unit: str = "row",
    seed: Callable[[int], int] = lambda number: number,
    check: Callable[[ChatResponse], ChatResponse] = lambda response: response,
    retry_failed: bool = False,
) -> None:
    """
    Have a generator answer the requests whose responses are missing in the store. See [`collect`].

    Args:
        generator ([`Generator`]):
            The model.
        messages (`Callable[[int], list[dict]]`):
            Returns the conversation of a number. If it raises, only this number fails.
        seed (`Callable[[int], int]`, *optional*):
            Returns the sampling seed of a number; by default the number itself.
        check (`Callable[[ChatResponse], ChatResponse]`, *optional*):
            Returns the response to store: the given one, or an error.
    """

    def respond(pending: Iterable[int]) -> Iterable[ChatResponse]:
        requests = (ChatRequest(number, partial(messages, number), seed(number)) for number in pending)
        return map(check, generator.generate(requests))

    collect(store, numbers, respond, description, unit, seed, retry_failed)
