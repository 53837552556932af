"""Is a model's response a cue, or a refusal, an unfinished thought or an error page?"""

import re

from ..data.rows import shorten
from ..generation import ChatResponse


# Reasoning models write their thoughts before the reply. The thoughts are not part of the cue.
THINKING = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
# Openings of refusals, as current models phrase them
REFUSAL = re.compile(
    r"\A\W*(?:(?:i['’]m|i am|we are|we['’]re)\s+(?:very\s+|really\s+)?(?:sorry|afraid|unable|not able)\b"
    r"|(?:sorry|apologies|my apologies|unfortunately)\b"
    r"|i\s+(?:must\s+|have to\s+)?(?:can\s?not|can['’]?t|could\s?n[o'’]t|won['’]?t|will not|decline|refuse)\b"
    r"|i\s+(?:do not|don['’]?t)\s+(?:see|have)\s+(?:an?|any|the|access)\b"
    r"|as an ai\b|(?:there is )?no image (?:is|was|has been|provided|attached)\b|cannot (?:assist|help|comply))",
    re.IGNORECASE,
)
HTML = re.compile(r"\A\s*(?:<!doctype html|<html\b|<head\b|<body\b)", re.IGNORECASE)


def check_cue(response: ChatResponse) -> ChatResponse:
    """Return the response with the cue as its text, or with an error if the text is not a cue."""
    if response.text is None:
        return response
    text = THINKING.sub("", response.text).strip()
    if not text:
        error = "The generator's text is empty."
    elif text.startswith("<think>"):
        error = f"The generator did not finish thinking: {shorten(text)}."
    elif HTML.match(text):
        error = f"The generator's text is HTML: {shorten(text)}."
    elif REFUSAL.match(text):
        error = f"The generator refused: {shorten(text)}."
    elif not re.search(r"\w", text):
        error = f"The generator's text has no word: {shorten(text)}."
    else:
        return ChatResponse(response.number, text)
    return ChatResponse(response.number, None, error)
