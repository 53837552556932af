"""Collect responses about the rows of a dataset. Each is on disk as soon as it arrives, so a run can be resumed."""

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
    Add the responses that the store lacks.

    Args:
        store ([`ResponseStore`]):
            Where responses go, one by one. Numbers that it already has are skipped.
        numbers (`Sequence[int]`):
            The numbers that responses are filed under.
        respond (`Callable[[Iterable[int]], Iterable[ChatResponse]]`):
            Gets the numbers that are left and yields a response to each, in any order.
        description (`str`):
            Label of the progress bar.
        unit (`str`, *optional*, defaults to `"row"`):
            What the progress bar counts.
        seed (`Callable[[int], int]`, *optional*):
            The seed that a number was sampled with, stored with its response.
        retry_failed (`bool`, *optional*, defaults to `False`):
            Whether to replace errors of earlier runs, too.

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
    Have a generator answer the requests that the store has no response to. See [`collect`].

    Args:
        generator ([`Generator`]):
            The model.
        messages (`Callable[[int], list[dict]]`):
            The conversation of a number. An error that it raises fails this number only.
        seed (`Callable[[int], int]`, *optional*):
            Seed of the sampling; by default the number itself.
        check (`Callable[[ChatResponse], ChatResponse]`, *optional*):
            Returns the response to store: the same, or an error.
    """

    def respond(pending: Iterable[int]) -> Iterable[ChatResponse]:
        requests = (ChatRequest(number, partial(messages, number), seed(number)) for number in pending)
        return map(check, generator.generate(requests))

    collect(store, numbers, respond, description, unit, seed, retry_failed)
