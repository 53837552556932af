"""Generators without a model: a function of the test returns the replies."""

from openai_server import question_of

from trl_vicur.generation import ChatResponse


class ScriptedGenerator:
    """Answers `reply(number, messages)` to each request, and is interrupted before request `die_at`."""

    def __init__(self, reply, die_at=None, **settings):
        self.settings = {"generator": "scripted", "temperature": 1.0, **settings}
        self.reply = reply
        self.die_at = die_at
        self.requests = []

    def generate(self, requests):
        for request in requests:
            if len(self.requests) == self.die_at:
                raise KeyboardInterrupt
            self.requests.append(request)
            try:
                yield ChatResponse(request.number, self.reply(request.number, request.messages()))
            except ValueError as error:
                yield ChatResponse(request.number, None, str(error))


def fail(number, messages):
    raise ValueError("It failed.")


def text_of(messages):
    return messages[-1]["content"][-1]["text"]


class ScriptedCueGenerator:
    """Answers `reply(question, images)` to each request; an exception in `reply` fails the row."""

    def __init__(self, reply=lambda question, images: f"evidence for {question}", **settings):
        self.settings = {"generator": "scripted", "model": "m", "temperature": 0.0, **settings}
        self.reply = reply
        self.asked = []

    def generate(self, requests):
        for request in requests:
            try:
                messages = request.messages()
                images = [block["image"] for block in messages[-1]["content"] if block["type"] == "image"]
                question = question_of({"messages": messages})
                self.asked.append(request.number)
                yield ChatResponse(request.number, self.reply(question, images))
            except Exception as error:
                yield ChatResponse(request.number, None, str(error))
