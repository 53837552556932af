"""Quantities in text: numbers in any notation, expressions, times, dates and ratios, and whether two are the same."""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from .expressions import EXPRESSION, NUMBER, evaluate
from .number_words import ROMAN_NUMERAL, number_words_to_digits, read_roman_numeral, skip_fill
from .units import UNIT_AFTER, convert, read_unit


# Parsing an expression takes milliseconds, so longer ones, and more than this many per text, are not parsed
MAX_EXPRESSION_CHARS = 80
MAX_EXPRESSIONS = 50

MONTHS: Sequence[str] = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
MONTH = rf"(?:{'|'.join(MONTHS)})[a-z]{{0,6}}\.?"
DAY = r"\d{1,2}(?:st|nd|rd|th)?"
DATE = rf"\b(?:{DAY}(?: of)? {MONTH},? \d{{4}}|{MONTH} {DAY},? \d{{4}}|\d{{4}}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{{4}})\b"
COLONS = r"(?<![\w.:])\d{1,4}(?::\d{1,4}){1,2}(?![:\d])"
QUANTITY = re.compile(rf"(?P<date>{DATE})|(?P<colons>{COLONS})|(?P<expression>{EXPRESSION})")
# "3-7", "4 × 6": two quantities, not a difference or a product
RANGE_OR_FORMAT = re.compile(rf"({NUMBER})\s{{0,30}}[-×]\s{{0,30}}({NUMBER})")
DECADE = re.compile(r"\d{3}0s\b")
# Words that mark an integer as rounded
HEDGE = re.compile(r"(?:\b(?:about|around|approximately|approx\.?|roughly|nearly|almost|close to)|[≈~])\s?$", re.I)


class Quantity(NamedTuple):
    """
    A quantity at `text[start:end]`.

    Args:
        value (`Fraction`, `float` or `tuple[int, ...]`):
            Its value, exact if the text is exact. A time, date or ratio is the tuple of its parts. An expression with
            variables has its value at one point, see [`evaluate`].
        start, end (`int`):
            Its span, including its unit.
        unit (`str`, *optional*):
            Its unit, in pint's notation; `"count"` for a bare number of things. For a tuple its kind (`"date"`,
            `"ratio"`, `"time"`, or `"time of day"` if it is known to be before or after noon).
        decimals (`int`, *optional*):
            Number of digits after the decimal point; for an integer that the text calls approximate, minus its number
            of trailing zeros. `None` if the value is exact.
        variables (`frozenset[str]`, *optional*):
            Names of its variables.
    """

    value: Fraction | float | tuple[int, ...]
    start: int
    end: int
    unit: str | None = None
    decimals: int | None = None
    variables: frozenset[str] = frozenset()


# --- Finding quantities ---


@lru_cache(maxsize=32)
def find_quantities(text: str) -> tuple[Quantity, ...]:
    """
    Find all quantities in a text, in order. A number within another quantity (12 in 1.12, 2 in 2x + 10) does not
    count, and neither does the value of a calculation (8 + 4).

    Args:
        text (`str`):
            The text, folded by [`fold_text`].
    """
    text = number_words_to_digits(text)
    quantities: list[Quantity] = []
    num_parsed = position = 0
    while match := QUANTITY.search(text, position):
        start, position = match.span()
        if match["date"]:
            date = read_date(match[0])
            # Also add the year alone, because a date states it
            quantities += [Quantity(date, start, position, "date"), Quantity(Fraction(date[0]), start, position)]
            continue
        if match["expression"] and (
            not re.search(r"\d|π|\w.*[-+*/^×⋅÷].*\w", match[0]) or len(match[0]) > MAX_EXPRESSION_CHARS
        ):
            continue
        decade = DECADE.match(text, position - 4) if position >= 4 else None
        unit_match = None if decade else UNIT_AFTER.match(text, position)
        if text[position : position + 1].isalpha() and not unit_match and not decade:
            continue
        unit = read_unit(unit_match[1]) if unit_match else None
        end = unit_match.end() if unit_match else position
        if match["colons"]:
            parts = tuple(map(int, match[0].split(":")))
            if unit in ("hour", "minute") and len(parts) == 2:
                quantities.append(Quantity(parts[0] + Fraction(parts[1], 60), start, end, unit))
            else:
                quantities.append(Quantity(parts, start, position))
                continue
        else:
            number = match[0].strip("-(){} ")
            num_parsed += not re.fullmatch(NUMBER, number)
            evaluated = evaluate(match[0].strip()) if num_parsed <= MAX_EXPRESSIONS else None
            if evaluated is not None:
                decimals = count_decimals(number, text[max(0, start - 16) : start])
                quantities.append(Quantity(evaluated[0], start, end, unit, decimals, evaluated[1]))
            elif limits := RANGE_OR_FORMAT.fullmatch(match[0].strip("(){}[] ")):
                quantities += [
                    Quantity(Fraction(limit.replace(",", "")), start, end, unit) for limit in limits.groups()
                ]
        position = end  # the m of 3 m is not a variable
    compounds = add_up_compounds(quantities, text)
    return tuple(quantity._replace(end=skip_fill(text, quantity.end)) for quantity in compounds)


def add_up_compounds(quantities: list[Quantity], text: str) -> Iterator[Quantity]:
    """Merge adjacent pairs whose second has a smaller unit, such as 2 h 15 min or 5 ft 3 in."""
    previous = None
    for quantity in quantities:
        if previous is not None and previous.unit is None and quantity.unit == "money_cent":  # $7 and 50 cents
            previous = previous._replace(unit="money")
        if previous is not None and previous.unit and quantity.unit and previous.unit != quantity.unit:
            if previous.unit == "hour" and quantity.unit == "meter":  # 2h 15m
                quantity = quantity._replace(unit="minute")
            if combined := add_up(previous, quantity, text[previous.end : quantity.start]):
                previous = combined
                continue
        if previous is not None:
            yield previous
        previous = quantity
    if previous is not None:
        yield previous


def add_up(large: Quantity, small: Quantity, text_between: str) -> Quantity | None:
    """Add two adjacent quantities if the second has a smaller unit; otherwise return `None`."""
    if isinstance(large.value, tuple) or isinstance(small.value, tuple) or not large.unit or not small.unit:
        return None
    if not re.fullmatch(r"[\s\x1f]{0,30}(?:,|and)?\s{0,30}", text_between):
        return None
    part = convert(1.0, small.unit, large.unit)
    if part is None or part >= 1:
        return None
    value = large.value + small.value * Fraction(part).limit_denominator(10**6)
    return large._replace(value=value, end=small.end)


def read_date(text: str) -> tuple[int, int, int]:
    """Year, month and day."""
    numbers = list(map(int, re.findall(r"\d+", text)))
    if month := re.search(MONTH, text):
        day, year = numbers
        return year, MONTHS.index(month[0][:3]) + 1, day
    return (numbers[0], numbers[1], numbers[2]) if text[:4].isdigit() else (numbers[2], numbers[1], numbers[0])


def count_decimals(number: str, before: str) -> int | None:
    """Digits after the decimal point of a plain number; for an integer after "about", minus its trailing zeros."""
    if re.fullmatch(r"[\d,]*\.\d+", number):
        return len(number.partition(".")[2])
    if re.fullmatch(r"[\d,]+", number) and HEDGE.search(before):
        digits = number.replace(",", "")
        return -min(len(digits) - len(digits.rstrip("0")), max(0, len(digits) - 2))
    return None


# --- Other readings of the same text ---


def read_clock(match: re.Match) -> Quantity | None:
    """Quarter past three, twenty to eight, nine o'clock."""
    if match["oclock"]:
        return Quantity((int(match["oclock"]), 0), *match.span(), "time")
    hour, named = int(match["hour"]), {"quarter": 15, "half": 30, "1/2": 30}
    minutes = named.get(match["minutes"].lower()) or int(match["minutes"])
    if not 1 <= hour <= 12 or not 0 < minutes < 60:
        return None
    if match["side"].lower() in ("past", "after"):
        return Quantity((hour, minutes), *match.span(), "time")
    return Quantity(((hour - 2) % 12 + 1, 60 - minutes), *match.span(), "time")


def read_time_of_day(match: re.Match) -> Quantity | None:
    """7 p.m., 3:45 pm, noon."""
    if match["name"]:
        return Quantity((12 if match["name"].lower() != "midnight" else 0, 0), *match.span(), "time of day")
    hour, minutes = int(match["hour"]), int(match["minutes"] or 0)
    if not 1 <= hour <= 12 or minutes >= 60:
        return None
    return Quantity((hour % 12 + 12 * (match["half"].lower() == "p"), minutes), *match.span(), "time of day")


def read_day(match: re.Match) -> Quantity:
    """December 24, the 24th of December: month and day."""
    month = MONTHS.index((match["month"] or match["month_after"])[:3]) + 1
    return Quantity((month, int(match["day_after"] or match["day"])), *match.span(), "date")


def read_ratio(match: re.Match) -> Quantity:
    """2 to 3, 16 by 9, two cats for every five dogs."""
    first, second = filter(None, match.groups())
    return Quantity((int(first), int(second)), *match.span(), "ratio")


def read_below_zero(match: re.Match) -> Quantity:
    """Seven degrees below zero."""
    unit = read_unit(match[2]) if match[2] else None
    return Quantity(-Fraction(match[1].replace(",", "")), *match.span(), unit)


def number(value: Callable[[re.Match], Fraction | int], unit: str | None = None) -> Callable[[re.Match], Quantity]:
    return lambda match: Quantity(Fraction(value(match)), *match.span(), unit)


def swapped(match: re.Match) -> Quantity | None:
    """03/05/2022, month first."""
    month, day, year = int(match[1]), int(match[2]), match[3]
    if month > 12 or day > 31:
        return None
    return Quantity((int(year), month, day) if year else (month, day), *match.span(), "date")


FILLED = r"\x1f{0,20}"
TURNS = {"half": 180, "1/2": 180, "quarter": 90, "1/4": 90, "full": 360, "complete": 360}
SUFFIXES = {"k": 3, "m": 6, "mn": 6, "mio": 6, "b": 9, "bn": 9}
READINGS: list[tuple[re.Pattern, Callable[[re.Match], Quantity | None]]] = [
    (
        re.compile(
            rf"\b(?:a )?(?P<minutes>quarter|half|1/2|\d{{1,2}}){FILLED} (?:minutes )?(?P<side>past|after|to|till)"
            rf" (?P<hour>\d{{1,2}})\b(?!:)|\b(?P<oclock>\d{{1,2}}){FILLED} o'clock\b",
            re.IGNORECASE,
        ),
        read_clock,
    ),
    (
        re.compile(
            rf"\b(?P<hour>\d{{1,2}})(?:[:.](?P<minutes>\d\d))?{FILLED}\s?(?P<half>[ap])\.?\s?m\b"
            r"|\b(?P<name>noon|midday|midnight)\b",
            re.IGNORECASE,
        ),
        read_time_of_day,
    ),
    (
        re.compile(
            rf"\b(?P<day>\d{{1,2}})(?:st|nd|rd|th)?{FILLED}(?: of)? (?P<month>{MONTH})(?![a-z])"
            rf"|\b(?P<month_after>{MONTH}) (?P<day_after>\d{{1,2}})(?:st|nd|rd|th)?\b(?![.,:]?\d)"
        ),
        read_day,
    ),
    (re.compile(r"(?<![\d./])(\d\d?)[./](\d\d?)(?:[./](\d{4}))?(?![./]?\d)"), swapped),
    (
        re.compile(r"(?<![\d./])(?P<day>\d\d?)[./](?P<month_number>\d\d?)(?![./]?\d)"),
        lambda match: Quantity((int(match["month_number"]), int(match["day"])), *match.span(), "date"),
    ),
    (
        re.compile(
            rf"(?<![\w.])(\d{{1,4}}){FILLED}\s{{1,10}}(?:(?:is )?to|by|:)\s(\d{{1,4}})(?![\w:]|\.\d)"
            rf"|(?<![\w.])(\d{{1,4}}){FILLED}(?:\s\w+){{1,2}}\s(?:for|to) every\s(\d{{1,4}})\b"
        ),
        read_ratio,
    ),
    # Eighteen seventy-four, nineteen oh five, written in words
    (
        re.compile(r"\b(1\d|20)\x1f{1,20}[\s-](?:oh |o )?(\d\d?)\x1f{1,20}(?!\d)"),
        number(lambda match: 100 * int(match[1]) + int(match[2])),
    ),
    # Fifty-nine ninety-nine, a price
    (
        re.compile(r"\b(\d{1,2})\x1f{1,20}[\s-](\d\d)\x1f{1,20}(?!\d)"),
        number(lambda match: int(match[1]) + Fraction(int(match[2]), 100)),
    ),
    # 1 250
    (
        re.compile(r"(?<![\w.,])(?<!\d )\d{1,3}(?: \d{3}){1,3}(?![\w]|[.,:]\d| \d)"),
        number(lambda match: int(match[0].replace(" ", ""))),
    ),
    # 12.5k, 2.5M
    (
        re.compile(rf"(?<![\w.])({NUMBER})(?i:(k|m|b)|\s?(bn|mn|mio))\b"),
        number(lambda match: Fraction(match[1].replace(",", "")) * 10 ** SUFFIXES[(match[2] or match[3]).lower()]),
    ),
    # 40x
    (
        re.compile(r"(?<![\w.])(\d{1,6}(?:\.\d{1,4})?)\s?[x×](?!\w|\s?[-\d+*/=<>≤≥^(])"),
        number(lambda match: Fraction(match[1])),
    ),
    (re.compile(r"\b(?:twice|a (?:couple|pair) of)\b", re.IGNORECASE), number(lambda match: 2)),
    (re.compile(r"\bthrice\b", re.IGNORECASE), number(lambda match: 3)),
    # MDCCCLXXIV
    (re.compile(rf"\b{ROMAN_NUMERAL}"), number(lambda match: read_roman_numeral(match[0]))),
    (
        re.compile(r"\b(?:(right)|straight) angle\b(?! (?:mark|symbol|sign|square|box))", re.IGNORECASE),
        number(lambda match: 90 if match[1] else 180, "degree"),
    ),
    (
        re.compile(rf"\b(half|1/2|quarter|1/4|full|complete){FILLED}(?: of)?(?: an?)? (?:turn|rotation|revolution)\b"),
        number(lambda match: TURNS[match[1]], "degree"),
    ),
    (
        re.compile(
            rf"(?<![\w.])({NUMBER}){FILLED}(?:\s?(°\s?[CF]?|[a-z]{{1,12}}))?\sbelow\s(?:0|zero|freezing|sea level)\b",
            re.IGNORECASE,
        ),
        read_below_zero,
    ),
    # An hour and a half, a century
    (
        re.compile(
            r"\ban? (hour|day|week|fortnight|month|year|decade|century|mile|ton|kilogram"
            r"|kilomet(?:er|re)|lit(?:er|re))\b"
            r"(?: and (1/[24])\b)?"
        ),
        lambda match: Quantity(1 + Fraction(match[2] or 0), *match.span(), read_unit(match[1])),
    ),
]


@lru_cache(maxsize=32)
def find_other_readings(text: str) -> tuple[Quantity, ...]:
    """
    Readings of a text besides those that [`find_quantities`] finds: "12.5k" is an expression with a variable k, or
    12,500; "2 to 3" is two numbers, a ratio, or a time.
    """
    text = number_words_to_digits(text)
    readings = (read(match) for pattern, read in READINGS for match in pattern.finditer(text))
    return tuple(reading._replace(end=skip_fill(text, reading.end)) for reading in readings if reading is not None)


# --- Comparing quantities ---


def is_same_quantity(answer: Quantity, mention: Quantity) -> bool:
    """
    Whether a mention states the answer: the same value, in any notation and unit, or a rounded form of it. A bare
    number matches a quantity with a unit, and vice versa.
    """
    value, other = answer.value, mention.value
    if isinstance(value, tuple) or isinstance(other, tuple):
        return is_same_tuple(answer, mention) or is_same_tuple(mention, answer)
    if answer.variables != mention.variables:
        return False
    units = {answer.unit, mention.unit}
    if units == {None, "money_cent"}:  # 85 cents are 0.85, or 85
        in_cents, bare = (value, other) if answer.unit else (other, value)
        return bare in (in_cents, in_cents / 100)
    if units == {None, "degree"}:  # π/4
        degrees, bare = (value, other) if answer.unit else (other, value)
        if isinstance(bare, float) and math.isclose(math.degrees(bare), degrees):
            return True
    if answer.unit and mention.unit and len(units) == 2 and "percent" not in units:
        converted = convert(float(value), answer.unit, mention.unit)
        return converted is not None and (
            math.isclose(converted, other, rel_tol=1e-6) or is_rounded(converted, other, mention.decimals)
        )
    if value == other or isinstance(value + other, float) and math.isclose(value, other):
        return None in units or len(units) == 1
    if "percent" in units and len(units) == 2:
        percent, share = (answer, mention) if answer.unit == "percent" else (mention, answer)
        if share.unit not in (None, "count"):
            return False
        percentage, exact = (value, 100 * other) if answer.unit == "percent" else (other, 100 * value)
        # Treat a percentage as rounded to the digits that it has
        return (
            math.isclose(percentage, exact)
            or is_rounded(exact, percentage, percent.decimals or 0)
            or is_rounded(percentage, exact, None if share.decimals is None else share.decimals - 2)
        )
    return is_rounded(value, other, mention.decimals) or is_rounded(other, value, answer.decimals)


def is_same_tuple(answer: Quantity, mention: Quantity) -> bool:
    """Whether two are the same time, date or ratio; a ratio may also be a fraction, and a time a decimal (10.30)."""
    if not isinstance(answer.value, tuple):
        return False
    if not isinstance(mention.value, tuple):
        if len(answer.value) != 2 or answer.unit == "date" or mention.unit or isinstance(mention.value, float):
            return False
        first, second = answer.value
        if mention.decimals == 2:
            return answer.unit != "ratio" and mention.value == first + Fraction(second, 100)
        return mention.decimals is None and mention.value.denominator > 1 and second * mention.value == first
    if answer.value == mention.value:
        return answer.unit is None or mention.unit is None or answer.unit[:4] == mention.unit[:4]
    if {answer.unit, mention.unit} & {"date", "ratio"} or len(answer.value) != 2 or len(mention.value) != 2:
        return False
    # 3:45 may be 15:45, but 3:45 a.m. is not
    (hour, minutes), (other_hour, other_minutes) = answer.value, mention.value
    is_known = answer.unit == "time of day" or hour > 12
    is_other_known = mention.unit == "time of day" or other_hour > 12
    return minutes == other_minutes and hour % 12 == other_hour % 12 and not (is_known and is_other_known)


def is_rounded(value: Fraction | float, rounded: Fraction | float, decimals: int | None) -> bool:
    """Whether `rounded` is the value rounded to `decimals` digits. One significant digit is too little evidence."""
    if decimals is None:
        return False
    step = 10.0**-decimals
    return step <= abs(rounded) / 5 and abs(value - rounded) <= step / 2 * (1 + 1e-9)
