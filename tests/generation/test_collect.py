"""Responses are collected once each, in any order, and errors are replaced only on request."""

import pytest

from trl_vicur.generation import ChatResponse
from trl_vicur.generation.collect import ask, collect
from trl_vicur.generation.response_store import open_store


class Echo:
    """Answers in reverse order with the text of each request; fails a request whose messages cannot be read."""

    settings = {"generator": "echo"}

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        for request in reversed(list(requests)):
            self.asked.append(request.number)
            try:
                yield ChatResponse(request.number, request.messages()[0]["content"])
            except ValueError as error:
                yield ChatResponse(request.number, None, str(error))


def messages(number):
    return [{"role": "user", "content": f"question {number}"}]


def odd_fail(number):
    if number % 2:
        raise ValueError("odd")
    return messages(number)


def test_only_missing_requests_are_sent(tmp_path):
    with open_store(tmp_path, "store.sqlite", {}) as store:
        ask(Echo(), store, [5, 1, 8], messages, "Asking", seed=lambda number: number + 100)
        generator = Echo()
        ask(generator, store, range(9), messages, "Asking")
        assert sorted(generator.asked) == [0, 2, 3, 4, 6, 7]
        assert [(number, text) for number, text, _, _ in store] == [(i, f"question {i}") for i in range(9)]
        assert {number: seed for number, _, _, seed in store if seed != number} == {5: 105, 1: 101, 8: 108}


def test_errors_are_kept_until_a_retry(tmp_path):
    with open_store(tmp_path, "store.sqlite", {}) as store:
        ask(Echo(), store, range(4), odd_fail, "Asking")
        assert store.count() == (4, 2)
        again = Echo()
        ask(again, store, range(4), messages, "Asking")
        assert again.asked == [] and store.count() == (4, 2)
        ask(again, store, range(4), messages, "Asking", retry_failed=True)
        assert sorted(again.asked) == [1, 3] and store.count() == (4, 0)


def test_checked_responses_are_stored(tmp_path):
    with open_store(tmp_path, "store.sqlite", {}) as store:
        ask(Echo(), store, [3], messages, "Asking", check=lambda response: response._replace(text="checked"))
        assert [text for _, text, _, _ in store] == ["checked"]


def test_responses_before_an_interruption_are_kept(tmp_path):
    def respond(numbers):
        yield ChatResponse(numbers[0], "first")
        raise KeyboardInterrupt

    with open_store(tmp_path, "store.sqlite", {}) as store:
        with pytest.raises(KeyboardInterrupt):
            collect(store, [4, 7], respond, "Collecting")
        assert list(store.pending([4, 7])) == [7]
    with open_store(tmp_path, "store.sqlite", {}) as store:
        assert list(store) == [(4, "first", None, None)]
