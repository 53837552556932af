"""Numbers written as words: "seventy-two", "three quarters of a million", "one in four", "half a dozen"."""

import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from text_to_num import Token, find_numbers


# Pads digits to the length of the words that they replace; matches \s in regular expressions
FILL_CHARACTER = "\x1f"

ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth "
    "fifteenth sixteenth seventeenth eighteenth nineteenth twentieth"
).split()
PARTS = {ordinal: number for number, ordinal in enumerate(ORDINALS, start=1) if number > 2} | {"quarter": 4}
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}

# At least two letters: a single letter is usually a name
ROMAN_NUMERAL = r"(?=[MDCLXVI]{2,15}\b)M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})(?<=[A-Z])\b"
ROMAN_DIGITS = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}

NUMBER_WORD = (
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:thir|four|fif|six|seven|eigh|nine)teen"
    rf"|(?:twen|thir|for|fif|six|seven|eigh|nine)t(?:y|ies)|{'|'.join(POWERS)})\b"
)
NUMBER_WORDS = re.compile(
    rf"\b(?>{NUMBER_WORD}(?:[\s-](?:(?:and|point)\s)?{NUMBER_WORD}){{0,20}})"
    rf"(?!(?<=ty)[\s-](?:{'|'.join(ORDINALS[:9])})\b)",  # twenty-first
    re.IGNORECASE,
)
# Not a count: the red one, one of them, one side; but one in four is
PRONOUN_BEFORE = re.compile(r"\b(?:the|this|that|which|each|every|any|another|other|no|some)\s(?:\w+\s)?$", re.I)
PRONOUN_AFTER = re.compile(
    rf"\s(?!(?:in|out of) (?:\d|{NUMBER_WORD}))"
    r"(?:of|another|is|has|on|in|at|and|with|that|which|can|side|end|below|above)\b",
    re.IGNORECASE,
)

# The following patterns match digits that already replaced number words
DIGITS = r"\b(\d{1,4})\x1f{0,20}"
MAGNITUDE = re.compile(rf"\b(\d{{1,9}}(?:\.\d{{1,9}})?) ({'|'.join(POWERS)})\b", re.IGNORECASE)
SINGLE = re.compile(r"\ba single\b", re.IGNORECASE)
DOZENS = re.compile(rf"(?:{DIGITS}|\b(half a|a)) (?:dozen\b|(score) of(?! \d))", re.IGNORECASE)
SHARE = re.compile(rf"{DIGITS} (?:in|out of) (\d{{1,4}})(?![\w:]|\.\d)", re.IGNORECASE)
FRACTION = re.compile(
    rf"{DIGITS}(?:\s{{1,10}}|-)({'|'.join(PARTS)})s?\b|\ba ({'|'.join(PARTS)})(?= of\b|[.,;]|$)", re.IGNORECASE
)
PART_OF_A_POWER = re.compile(r"\b(\d{1,3}/[1-9]\d{0,2})\x1f{0,20} of a (10{2,12})\b", re.IGNORECASE)
HALF = re.compile(r"\b(?:(\d{1,5})\s{1,20}and a |\d\s{1,10}|a )?half\b", re.IGNORECASE)
MIXED = re.compile(rf"{DIGITS} and (\d{{1,2}}/\d{{1,2}})\b", re.IGNORECASE)


class Word(Token):
    """A word as a text2num token."""

    def __init__(self, match: re.Match):
        self.match = match

    def text(self) -> str:
        word = self.match[0].lower()
        return word[:-3] + "y" if word.endswith("ies") else word  # the nineteen-fifties


def read_words(run: re.Match) -> str:
    """Convert a run of number words, which may be several numbers ("eighteen seventy-four"), to digits."""
    before, after = run.string[max(0, run.start() - 30) : run.start()], run.string[run.end() : run.end() + 20]
    if run[0].lower() == "one" and (PRONOUN_BEFORE.search(before) or PRONOUN_AFTER.match(after)):
        return run[0]
    words, result = list(re.finditer(r"\w+|-", run[0])), run[0]
    for number in find_numbers([Word(word) for word in words], "en", threshold=0):
        start, end = words[number.start].start(), words[number.end - 1].end()
        result = result[:start] + number.text.ljust(end - start, FILL_CHARACTER) + result[end:]
    return result.replace("-", " ")  # between two numbers, it is not a minus


def read_dozens(match: re.Match) -> str:
    size = 20 if match[3] else 12
    return str(size // 2 if (match[2] or "").lower() == "half a" else size * int(match[1] or 1))


# The order matters: later patterns match the digits that earlier ones produced
READERS: list[tuple[re.Pattern, Callable[[re.Match], str]]] = [
    (MAGNITUDE, lambda match: str(int(Fraction(match[1]) * 10 ** POWERS[match[2].lower()]))),
    (NUMBER_WORDS, read_words),
    (SINGLE, lambda match: "1"),
    (DOZENS, read_dozens),
    (SHARE, lambda match: f"{match[1]}/{match[2]}"),
    (FRACTION, lambda match: f"{match[1] or 1}/{PARTS[(match[2] or match[3]).lower()]}"),
    (PART_OF_A_POWER, lambda match: str(int(Fraction(match[1]) * int(match[2])))),
    (HALF, lambda match: f"{match[1]}.5" if match[1] else "1/2"),
    (MIXED, lambda match: f"{match[1]} {match[2]}"),
]


@lru_cache(maxsize=32)
def number_words_to_digits(text: str) -> str:
    """Replace number words with digits, padded with `FILL_CHARACTER` so that all positions stay the same."""
    for pattern, read in READERS:
        text = pattern.sub(lambda match, read=read: _fill_up(read(match), match[0]), text)
    return text


def skip_fill(text: str, position: int) -> int:
    """Return the position after any fill characters that start at `position`."""
    while text.startswith(FILL_CHARACTER, position):
        position += 1
    return position


def read_roman_numeral(numeral: str) -> int:
    digits = [ROMAN_DIGITS[letter] for letter in numeral]
    return sum(-digit if digit < after else digit for digit, after in zip(digits, [*digits[1:], 0], strict=True))


def _fill_up(digits: str, words: str) -> str:
    return digits.ljust(len(words), FILL_CHARACTER) if len(digits) <= len(words) else words
