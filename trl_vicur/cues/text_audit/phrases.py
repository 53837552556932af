"""Does a text contain a phrase, in any inflection and word order?"""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from .number_words import ORDINALS, ROMAN_NUMERAL, read_roman_numeral


WORD = re.compile(r"(?:[A-Za-z]\.){2,}|\w+(?:'\w+)?")
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\b(?:Dr|Mr|Ms|St))(?<!\bMrs)[.!?;]['\")]?\s|\n")
ARTICLES = frozenset("a an the An The".split())
# Words that add nothing to an answer, such as "they are" in "They are playing soccer"
FUNCTION_WORDS = ARTICLES | frozenset(
    "it its they he she is are was were be been being does do did has have and or of in on at to with for as that "
    "this there".split()
)
NEGATIONS = frozenset("not never isn't aren't doesn't don't no neither nor without".split())
# Names that are also ordinary words
KEEPS_CASE = frozenset({"May", "March"})
CALENDAR = {
    name[:3]: name.lower()
    for name in (
        "January February March April June July August September October November December Monday Tuesday Wednesday "
        "Thursday Friday"
    ).split()
} | {"Sept": "september", "Tues": "tuesday", "Thurs": "thursday"}
IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "teeth": "tooth",
    "geese": "goose", "mice": "mouse", "oxen": "ox", "dice": "die", "vertices": "vertex", "axes": "axis",
    "radii": "radius", "nuclei": "nucleus", "bacteria": "bacterium", "mitochondria": "mitochondrion", "lay": "lie",
    "lying": "lie", "ran": "run", "fell": "fall", "rose": "rise", "grew": "grow", "shrank": "shrink", "held": "hold",
    "sat": "sit", "stood": "stand", "went": "go", "ate": "eat", "wore": "wear", "rode": "ride", "threw": "throw",
}  # fmt: skip
NO_ENDING = frozenset(
    "evening morning building painting wedding ceiling during nothing something anything everything hundred".split()
)
# "What type of triangle is it?" is answered by "equilateral"
CATEGORY = re.compile(r"\b(?:what|which|whose|(?:kind|type|sort)s? of)\s((?:[\w-]+\s)?[\w-]+)", re.IGNORECASE)
ASKS_FOR_A_NAME = re.compile(r"\b(?:names?|called|who|whom|whose)\b", re.IGNORECASE)
ROMAN = re.compile(ROMAN_NUMERAL)


class Token(NamedTuple):
    """A word at `text[start:end]`, its index among the words, and the index of its sentence."""

    base: str
    word: str
    start: int
    end: int
    position: int
    sentence: int


class Phrase(NamedTuple):
    """
    The words that express a text.

    Args:
        bases (`frozenset[str]`):
            The base forms of its words, which may be in any order.
        window (`int`):
            All of them must be within this many consecutive words.
        company (`frozenset[str]`, *optional*):
            Base forms that must be somewhere in the same sentence.
        exact_word (`str`, *optional*):
            A word whose case must match.
    """

    bases: frozenset[str]
    window: int
    company: frozenset[str] = frozenset()
    exact_word: str | None = None


@lru_cache(maxsize=100_000)
def base_form(word: str) -> str:
    """The same form for "increases", "increased" and "increasing"; "mouse" and "mice"; "second", "2nd" and "II"."""
    if word in CALENDAR:
        return CALENDAR[word]
    if ROMAN.fullmatch(word):
        return f"{read_roman_numeral(word)}th"
    word = word.replace(".", "").lower()
    if word in ORDINALS:
        return f"{ORDINALS.index(word) + 1}th"
    if match := re.fullmatch(r"(\d+)(?:st|nd|rd|th)", word):
        return f"{match[1]}th"
    word = word.removesuffix("'s")
    if word in IRREGULAR:
        word = IRREGULAR[word]
    if len(word) <= 3 or not word.isascii() or word in NO_ENDING:
        return word
    for ending, replacement, min_length in (
        ("ves", "f", 2), ("ies", "y", 2), ("ily", "y", 3), ("ation", "", 5), ("ating", "", 5), ("ated", "", 5),
        ("ates", "", 5), ("ate", "", 5), ("ing", "", 3), ("ed", "", 3), ("sses", "ss", 1), ("es", "", 3),
        ("ly", "", 4),
    ):  # fmt: skip
        if word.endswith(ending) and len(word) - len(ending) >= min_length:
            word = word[: -len(ending)] + replacement
            break
    else:
        if word.endswith("s") and not word.endswith(("ss", "us", "is")):
            word = word[:-1]
    word = word.removesuffix("e")
    if len(word) > 3 and word[-1] == word[-2]:  # running, falling
        word = word[:-1]
    return word.removesuffix("y") + "i" if word.endswith("y") else word


@lru_cache(maxsize=64)
def read_tokens(text: str) -> tuple[Token, ...]:
    """Split a text into words, without articles."""
    tokens, sentence, end = [], 0, 0
    for match in WORD.finditer(text):
        if match[0] in ARTICLES:
            continue
        sentence += SENTENCE_END.search(text, end, match.start()) is not None
        start, end = match.span()
        tokens.append(Token(base_form(match[0]), match[0], start, end, len(tokens), sentence))
    return tuple(tokens)


def make_phrase(text: str, stem: str = "") -> Phrase | None:
    """
    Make the phrase that expresses a text; `None` if the text has no words.

    Args:
        text (`str`):
            The text, an answer.
        stem (`str`, *optional*):
            The question that it answers. A cue need not repeat words of the question next to the phrase.
    """
    tokens = read_tokens(text)[:40]
    content = [token for token in tokens if token.word.lower() not in FUNCTION_WORDS] or list(tokens)
    if not content:
        return None
    if len(content) > 1 and all(token.word[0].isupper() for token in content):
        # The words of a name are adjacent
        return Phrase(frozenset(token.base for token in content), len(tokens) + 1)
    bases = frozenset(token.base for token in content)
    category = frozenset(token.base for match in CATEGORY.finditer(stem) for token in read_tokens(match[1]))
    if bases - category:
        bases -= category
    asked = frozenset(token.base for token in read_tokens(stem))
    company = bases & asked if bases - asked else frozenset()
    bases -= company
    window = 2 * len(bases) if len(bases) > 1 else 1
    words = [token.word for token in content if token.base in bases]
    is_name = words[0] in KEEPS_CASE or len(words[0]) <= 3 and words[0].isupper()
    is_name = is_name or words[0].istitle() and ASKS_FOR_A_NAME.search(stem) is not None
    return Phrase(bases, window, company, words[0] if len(words) == 1 and is_name else None)


def find_phrase(phrase: Phrase, text: str) -> Iterator[tuple[int, int]]:
    """Spans of the text that contain the phrase without negating it."""
    tokens = read_tokens(text)
    company: dict[int, set[str]] = {}
    if phrase.company:
        for token in tokens:
            company.setdefault(token.sentence, set()).add(token.base)
    last_seen: dict[str, Token] = {}
    for token in tokens:
        if token.base not in phrase.bases:
            continue
        if len(phrase.bases) == 1 and (
            phrase.exact_word not in (None, token.word.replace(".", "")) or _is_in_compound(token, text)
        ):
            continue
        last_seen[token.base] = token
        first = min(last_seen.values(), key=lambda each: each.position)
        is_together = token.position - first.position < phrase.window and first.sentence == token.sentence
        if len(last_seen) == len(phrase.bases) and is_together:
            last_seen.clear()
            before = tokens[first.position - 1] if first.position else None
            is_denied = before and before.sentence == token.sentence and before.word.lower() in NEGATIONS
            if not is_denied and company.get(token.sentence, set()) >= phrase.company:
                yield first.start, token.end


def _is_in_compound(token: Token, text: str) -> bool:
    """Whether the word is part of a compound: "apple-green", but not "left-hand"."""
    before, after = text[max(0, token.start - 1) : token.start], text[token.end : token.end + 5].lower()
    return before == "-" or after.startswith("-") and after[1:] not in ("hand", "side")
