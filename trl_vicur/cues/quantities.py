"""Quantities in text: numbers in any notation, expressions, times, dates and ratios, and whether two are the same."""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, lru_cache
from typing import NamedTuple

import pint
from latex2sympy2_extended import latex2sympy
from text_to_num import Token, find_numbers


# Parsing an expression takes milliseconds: longer ones, and more than this many in a text, are not read
MAX_EXPRESSION_CHARS = 80
MAX_EXPRESSIONS = 50

# Characters that nobody sees, by which a number or a control token could be disguised
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
# Invisible twins of the ASCII characters, which a language model may read all the same
TAG_CHARACTERS = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
# NFKC would make "1½" to "11/2" and "º" to "o"
BEFORE_NFKC = str.maketrans({"º": "°", "˚": "°"} | {part: f" {part}" for part in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"})
LOOK_ALIKES = str.maketrans("−‐‑⁄∕·∙’‘“”", "---//⋅⋅''\"\"")
LATEX_SYMBOLS = dict(
    times="×", cdot="⋅", div="÷", pi="π", theta="θ", alpha="α", beta="β", gamma="γ", omega="ω", Omega="Ω", mu="μ",
    le="≤", leq="≤", ge="≥", geq="≥", approx="≈", angle="∠", triangle="△", degree="°", quad=" ", left="", right="",
)  # fmt: skip
LATEX_FOLDS = [
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|operatorname|mbox)\s?\{([^{}]{0,200})\}"), r"\1"),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s?(\d)\s?(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\^\s?(?:\{\s?)?\\circ(?:\s?\})?"), "°"),
    (re.compile(r"(?<=\d)(?:\\,|\{,\})(?=\d{3})"), ","),
    (re.compile(rf"\\({'|'.join(LATEX_SYMBOLS)})(?![a-zA-Z])"), lambda match: LATEX_SYMBOLS[match[1]]),
    (re.compile(r"\\[,;:!()\[\] ]|\$|\\(?=[%#&_])"), " "),
]

# Stands behind the digits of a number word up to the end of the word; white space for regular expressions
FILL_CHARACTER = "\x1f"
FILL = re.compile(f"{FILL_CHARACTER}*")
NUMBER_WORD = (
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    r"|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|billion)"
)
NUMBER_WORDS = re.compile(
    rf"\b(?>{NUMBER_WORD}(?:[\s-](?:(?:and|point)\s)?{NUMBER_WORD}){{0,20}})\b"
    r"(?![\s-](?:first|second|third|(?:four|fif|six|seven|eigh|nin)th)\b)",  # twenty-first
    re.IGNORECASE,
)
# No count: the red one, one of them, one side
PRONOUN_BEFORE = re.compile(r"\b(?:the|this|that|which|each|every|any|another|other|no|some)\s(?:\w+\s)?$", re.I)
PRONOUN_BEHIND = re.compile(r"\s(?:of|another|is|has|on|in|at|and|with|that|which|can|side|end|below|above)\b", re.I)
POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9}
MAGNITUDE = re.compile(rf"\b(\d{{1,9}}(?:\.\d{{1,9}})?) ({'|'.join(POWERS)})\b", re.IGNORECASE)
PARTS = {
    "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10,
}  # fmt: skip
FRACTION_WORDS = re.compile(rf"\b(\d{{1,2}})\x1f{{0,20}}(?:\s{{1,10}}|-)({'|'.join(PARTS)})s?\b", re.IGNORECASE)
DOZEN = re.compile(r"\b(?:a|(\d{1,4})\x1f{0,20}) dozen\b", re.IGNORECASE)
SHARE = re.compile(r"\b(\d{1,4})\x1f{0,20} (?:in|out of) (\d{1,4})(?![\w:]|\.\d)", re.IGNORECASE)
CLOCK = re.compile(r"\b(?:a )?(quarter|half) (past|to) (\d{1,2})\b|\b(\d{1,2})\x1f{0,20} o'clock\b", re.IGNORECASE)
HALF = re.compile(r"\b(?:(\d{1,5})\s{1,20}and a |\d\s{1,10}|a )?half\b", re.IGNORECASE)

# Units are an explicit list, because pint also reads "a" as years, "bar" as a pressure and "in" as inches
UNIT_SYMBOL = (
    r"(?:[kcmdnμ]?m|[km]?g|m?[Ll]|m?s|k?N|[km]?J|[kM]?W|kWh|[mk]?V|m?A|[kM]?Ω|[kMG]?Hz|k?Pa|k?cal|mol|K|h|ft|yd|mi|lbs?"
    r"|oz|mph|kph|psi|min|hrs?|sec|rad|deg|cc|in(?=\s?[,;)]|\.?\s?$))"
)
UNIT_WORD = (
    r"(?i:(?:milli|centi|deci|kilo|nano|micro)?(?:met(?:er|re)|gram|lit(?:er|re)|second|watt|volt|ampere|ohm|joule"
    r"|newton|pascal|mole)s?|inch(?:es)?|foot|feet|yards?|miles?|pounds?|ounces?|tons?|minutes?|hours?|days?|weeks?"
    r"|years?|radians?|degrees? (?:celsius|fahrenheit)|degrees?|percent|per cent|calories?|hertz|kelvins?)"
)
SIMPLE_UNIT = rf"(?:{UNIT_WORD}|{UNIT_SYMBOL})(?![a-zA-Z])(?:\^?\{{?[23]\}}?(?!\d)|\s(?:squared|cubed))?"
UNIT = rf"(?:°\s?[CF]\b|[°%]|(?:(?:square|sq|cubic)\.?\s)?{SIMPLE_UNIT}(?:(?:\s?/\s?|\sper\s){SIMPLE_UNIT})?)"
UNIT_BEHIND = re.compile(rf"(?:\s{{0,30}}|-)({UNIT})")
PINT_NAMES = {
    "°": "degree", "deg": "degree", "%": "percent", "per cent": "percent", "°c": "degC", "°f": "degF",
    "degree celsius": "degC", "degrees celsius": "degC", "degree fahrenheit": "degF", "degrees fahrenheit": "degF",
}  # fmt: skip

# All repetitions are bounded or possessive: the work grows with the length of the text, whatever stands in it
NUMBER = r"(?>(?:(?:\d{1,3}(?:,\d{3}){1,6}(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,2}(?!\w))?)"
GROUP = r"\s?\{(?:[^{}]|\{[^{}]{0,40}\}){1,60}\}"
ATOM = (
    rf"(?:\\frac{GROUP}{GROUP}|\\sqrt(?:\[\d\])?{GROUP}|√\s?(?:\d+|\([^()]{{1,40}}\))|\d{{1,4}}\s\d{{1,3}}/\d{{1,3}}\b"
    rf"|{NUMBER}|π|[a-zA-Zα-ω](?![a-zA-Z]))"
)
OPERATOR = r"\s{0,30}(?:[-+*/^×⋅÷]|plus|minus|times|divided by)\s{0,30}"
# Side by side: 2π, 3√5, 2(x + 1), 2x, but not 2m
SIDE_BY_SIDE = rf"(?:\s?(?=\\frac|\\sqrt|√|π)|(?=\()|(?<=[\dπ)}}])(?!{UNIT})(?=[a-zA-Zα-ω]))"
PIECE = rf"[({{]{{0,3}}{ATOM}[)}}]{{0,3}}"
EXPRESSION = (
    rf"(?<![\w\\./^_])(?>(?:(?:minus|negative)\s|-)?{PIECE}(?:(?:{OPERATOR}-?|{SIDE_BY_SIDE}){PIECE}){{0,20}})"
    r"(?!(?:st|nd|rd|th)\b|:\d)"
)
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
MONTH = rf"(?:{'|'.join(MONTHS)})[a-z]{{0,6}}\.?"
DAY = r"\d{1,2}(?:st|nd|rd|th)?"
DATE = rf"\b(?:{DAY}(?: of)? {MONTH},? \d{{4}}|{MONTH} {DAY},? \d{{4}}|\d{{4}}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{{4}})\b"
COLONS = r"(?<![\w.:])\d{1,4}(?::\d{1,4}){1,2}(?![:\d])"
QUANTITY = re.compile(rf"(?P<date>{DATE})|(?P<colons>{COLONS})|(?P<expression>{EXPRESSION})")
RATIO_WORDS = re.compile(r"(?<![\w.])(\d{1,4})\s{1,10}(?:to|:)\s(\d{1,4})(?![\w:]|\.\d)")
RANGE = re.compile(rf"({NUMBER})\s{{0,30}}-\s{{0,30}}({NUMBER})")
# What makes an integer a rounded one
HEDGE = re.compile(r"(?:\b(?:about|around|approximately|approx\.?|roughly|nearly|almost|close to)|[≈~])\s?$", re.I)

SCIENTIFIC = re.compile(r"(?<=\d)\s?[×⋅*]\s?10\s?\^\s?\{?-?\d+\}?")
# A step of a solution, where 24/2, 3^2 and 2√36 are notations of a number
CALCULATION = re.compile(r"[\d)}]\s*(?:[-+×⋅*÷]|plus|minus|times|divided by)\s*[-\d({\\√π]")
IRRATIONAL_OR_VARIABLE = re.compile(r"√|\\sqrt|π|(?<![a-zA-Z\\])[a-zA-Zα-ω](?![a-zA-Z])")
# Notations that latex2sympy does not know; a whole number before a fraction makes a mixed number, not a product
TO_LATEX = [
    (re.compile(r"^(?:minus|negative)\s"), "-"), (re.compile("[×⋅]|times"), "*"), (re.compile("÷|divided by"), "/"),
    (re.compile("plus"), "+"), (re.compile("minus"), "-"),
    (re.compile(r"√\s?(?:(\d+)|\(([^()]*)\))"), r"\\sqrt{\1\2}"),
    (re.compile(r"(?<![\d.^)}])(\d+)\s?(\\frac\{\d+\}\{\d+\})"), r"(\1+\2)"),
    (re.compile(r"(\d+)\s(\d+/\d+)"), r"(\1+\2)"), (re.compile(r"\^(-?\d+)"), r"^{\1}"),
]  # fmt: skip


class Quantity(NamedTuple):
    """
    A quantity at `text[start:end]`.

    Args:
        value (`Fraction`, `float` or `tuple[int, ...]`):
            Its value, exact where the text is. A time, date or ratio is the tuple of its parts. An expression with
            variables has the value that it takes at one point, see [`evaluate`].
        start, end (`int`):
            Where it stands, its unit included.
        unit (`str`, *optional*):
            Its unit, in pint's words.
        decimals (`int`, *optional*):
            Number of digits behind the point; of an integer that is called approximate, minus its number of trailing
            zeros. `None` where the value is exact.
        variables (`frozenset[str]`, *optional*):
            Names of its variables.
    """

    value: Fraction | float | tuple[int, ...]
    start: int
    end: int
    unit: str | None = None
    decimals: int | None = None
    variables: frozenset[str] = frozenset()


class Word(Token):
    """A word as text2num reads it."""

    def __init__(self, match: re.Match):
        self.match = match

    def text(self) -> str:
        return self.match[0].lower()


def fold_text(text: str) -> str:
    """
    The text with one notation for what looks or means the same: no invisible characters, no full-width forms, no
    LaTeX markup around plain symbols. All checks read this form.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻⁺]+", lambda match: "^" + match[0].translate(SUPERSCRIPTS), text)
        text = unicodedata.normalize("NFKC", text.translate(TAG_CHARACTERS).translate(BEFORE_NFKC))
        text = INVISIBLE.sub("", text.translate(LOOK_ALIKES))
    if "\\" in text or "$" in text:
        for pattern, replacement in LATEX_FOLDS:
            text = pattern.sub(replacement, text)
    text = re.sub(r"(?<=\d)(\s?)pi\b", r"\1π", text)
    return re.sub(r"(?<=\d)(\s?)[xX](\s?)(?=\d)", r"\1×\2", text)


def number_words_to_digits(text: str) -> str:
    """The text with number words as digits, each filled up so that all positions stay."""

    def replace(pattern: re.Pattern, to_digits: Callable[[re.Match], str], text: str) -> str:
        def fill_up(match: re.Match) -> str:
            digits = to_digits(match)
            return digits.ljust(len(match[0]), FILL_CHARACTER) if len(digits) <= len(match[0]) else match[0]

        return pattern.sub(fill_up, text)

    def words_to_digits(run: re.Match) -> str:
        before, behind = run.string[max(0, run.start() - 30) : run.start()], run.string[run.end() : run.end() + 10]
        if run[0].lower() == "one" and (PRONOUN_BEFORE.search(before) or PRONOUN_BEHIND.match(behind)):
            return run[0]
        words, result = list(re.finditer(r"\w+|-", run[0])), run[0]
        for number in find_numbers([Word(word) for word in words], "en", threshold=0):
            start, end = words[number.start].start(), words[number.end - 1].end()
            result = result[:start] + number.text.ljust(end - start, FILL_CHARACTER) + result[end:]
        return result

    text = replace(MAGNITUDE, lambda match: str(int(Fraction(match[1]) * 10 ** POWERS[match[2].lower()])), text)
    text = replace(NUMBER_WORDS, words_to_digits, text)
    text = replace(DOZEN, lambda match: str(12 * int(match[1] or 1)), text)
    text = replace(CLOCK, read_clock, text)
    text = replace(SHARE, lambda match: f"{match[1]}/{match[2]}", text)
    text = replace(FRACTION_WORDS, lambda match: f"{match[1]}/{PARTS[match[2].lower()]}", text)
    return replace(HALF, lambda match: f"{match[1]}.5" if match[1] else "1/2", text)


def read_clock(match: re.Match) -> str:
    """The time of a match of `CLOCK`, in digits."""
    if match[4]:
        return f"{match[4]}:00"
    hour, minutes = int(match[3]), {"quarter": 15, "half": 30}[match[1].lower()]
    return f"{hour}:{minutes}" if match[2].lower() == "past" else f"{(hour - 2) % 12 + 1}:{60 - minutes}"


def find_quantities(text: str) -> list[Quantity]:
    """
    All quantities of a text, in order. A number that is a part of another quantity (12 in 1.12, 2 in 2x + 10) is none,
    and neither is the value of a calculation (8 + 4).

    Args:
        text (`str`):
            The text, as [`fold_text`] returns it.
    """
    text = number_words_to_digits(text)
    quantities: list[Quantity] = []
    num_parsed = 0
    for match in QUANTITY.finditer(text):
        start, end = match.span()
        if quantities and start < quantities[-1].end:  # the m of 3 m/s
            continue
        if match["date"]:
            date = read_date(match[0])
            # The year on its own as well: a date tells it
            quantities += [Quantity(date, start, end), Quantity(Fraction(date[0]), start, end)]
        elif match["colons"]:
            quantities.append(Quantity(tuple(map(int, match[0].split(":"))), start, end))
        elif re.search(r"\d|π|\w.*[-+*/^×⋅÷].*\w", match[0]) and len(match[0]) <= MAX_EXPRESSION_CHARS:
            unit_match = UNIT_BEHIND.match(text, end)
            if text[end : end + 1].isalpha() and not unit_match:
                continue
            unit = read_unit(unit_match[1]) if unit_match else None
            end = unit_match.end() if unit_match else end
            number = match[0].strip("-(){} ")
            num_parsed += not re.fullmatch(NUMBER, number)
            evaluated = evaluate(match[0].strip()) if num_parsed <= MAX_EXPRESSIONS else None
            if evaluated is not None:
                decimals = count_decimals(number, text[max(0, start - 16) : start])
                quantities.append(Quantity(evaluated[0], start, end, unit, decimals, evaluated[1]))
            elif limits := RANGE.fullmatch(match[0]):
                quantities += [
                    Quantity(Fraction(limit.replace(",", "")), start, end, unit) for limit in limits.groups()
                ]
    quantities = list(add_up_compounds(quantities, text))
    quantities += [Quantity((int(match[1]), int(match[2])), *match.span()) for match in RATIO_WORDS.finditer(text)]
    quantities.sort(key=lambda quantity: quantity.start)
    return [quantity._replace(end=FILL.match(text, quantity.end).end()) for quantity in quantities]


def add_up_compounds(quantities: list[Quantity], text: str) -> Iterator[Quantity]:
    """Make one quantity of two like 2 h 15 min or 5 ft 3 in: side by side, the second in a smaller unit."""
    previous = None
    for quantity in quantities:
        if previous is not None and previous.unit and quantity.unit and previous.unit != quantity.unit:
            is_side_by_side = re.fullmatch(r"[\s\x1f]{0,30}(?:,|and)?\s{0,30}", text[previous.end : quantity.start])
            part = convert(1.0, quantity.unit, previous.unit)
            if is_side_by_side and part is not None and part < 1:
                value = previous.value + quantity.value * Fraction(part).limit_denominator(10**6)
                previous = previous._replace(value=value, end=quantity.end)
                continue
        if previous is not None:
            yield previous
        previous = quantity
    if previous is not None:
        yield previous


def read_date(text: str) -> tuple[int, int, int]:
    """Year, month and day."""
    numbers = list(map(int, re.findall(r"\d+", text)))
    if month := re.search(MONTH, text):
        day, year = numbers
        return year, MONTHS.index(month[0][:3]) + 1, day
    return (numbers[0], numbers[1], numbers[2]) if text[:4].isdigit() else (numbers[2], numbers[1], numbers[0])


def count_decimals(number: str, before: str) -> int | None:
    """Digits behind the point of a plain number; of an integer, if `before` ends with "about", minus its zeros."""
    if re.fullmatch(r"[\d,]*\.\d+", number):
        return len(number.partition(".")[2])
    if re.fullmatch(r"[\d,]+", number) and HEDGE.search(before):
        digits = number.replace(",", "")
        return -min(len(digits) - len(digits.rstrip("0")), max(0, len(digits) - 2))
    return None


def is_calculation(expression: str) -> bool:
    """Whether an expression is a calculation (8 + 4) and no notation of one number (24/2, 3.0 × 10^8)."""
    return CALCULATION.search(SCIENTIFIC.sub("", expression)) is not None


@lru_cache(maxsize=10_000)
def evaluate(expression: str) -> tuple[Fraction | float, frozenset[str]] | None:
    """
    Value and variables of an expression; `None` of a calculation, and where the expression cannot be read.

    Whether two expressions with variables are the same is asked at one point, with logarithms for variables: different
    expressions do not meet there. It takes microseconds, where simplifying their difference may take seconds.
    """
    for opening, closing in ("()", "{}"):  # those of the text around it
        while expression.startswith(opening) and expression.count(opening) > expression.count(closing):
            expression = expression[1:]
        while expression.endswith(closing) and expression.count(closing) > expression.count(opening):
            expression = expression[:-1]
    try:
        return Fraction(expression.strip("(){}").replace(",", "")), frozenset()
    except (ValueError, ZeroDivisionError):
        pass
    if is_calculation(expression) and not IRRATIONAL_OR_VARIABLE.search(expression):
        return None
    if re.search(r"\^\s?[({]?-?(?:\d{3,}|[\w.]*\s?\^)|\d{16,}", expression):  # 10^10^10
        return None
    for pattern, latex in TO_LATEX:
        expression = pattern.sub(latex, expression)
    try:
        parsed = latex2sympy(expression, is_real=True, convert_degrees=False, normalization_config=None)
        variables = {symbol: math.log(sum(map(ord, symbol.name)) + 1) for symbol in parsed.free_symbols}
        if not variables and parsed.is_Rational:
            return Fraction(int(parsed.p), int(parsed.q)), frozenset()
        value = float(parsed.subs(variables).evalf(15, maxn=50))
    except Exception:  # of many kinds, where it is no expression after all
        return None
    return (value, frozenset(map(str, variables))) if math.isfinite(value) else None


@cache
def unit_registry() -> pint.UnitRegistry:
    return pint.UnitRegistry()


@lru_cache(maxsize=1000)
def read_unit(text: str) -> str | None:
    """A unit in pint's words, `"centimeter ** 2"` for `"sq cm"`; `None` where pint does not know it."""
    text = re.sub(r"[{}]", "", text).replace("° ", "°")
    text = re.sub(r"(?<=[a-z])(?=[23](?!\d))", "^", text)
    text = PINT_NAMES.get(text.lower(), text.lower() if len(text) > 5 else text)
    try:
        return str(unit_registry().parse_units(text))
    except (pint.errors.PintError, ValueError):
        return None


@lru_cache(maxsize=10_000)
def convert(value: float, unit: str, other_unit: str) -> float | None:
    """The value in another unit; `None` between units of different dimensions."""
    if {unit, other_unit} in ({"degree", "degree_Celsius"}, {"degree", "degree_Fahrenheit"}):
        return value  # a temperature with a bare degree sign
    if "percent" in (unit, other_unit):  # has no dimension for pint, as angles have none
        return None
    try:
        return unit_registry().convert(value, unit, other_unit)
    except pint.errors.PintError:
        return None


def is_same_quantity(answer: Quantity, mention: Quantity) -> bool:
    """
    Whether a mention states the answer: the same value, in any notation and unit, or a rounded form of it. A bare
    number states a quantity with a unit, and the other way round.
    """
    if isinstance(answer.value, tuple) or isinstance(mention.value, tuple):
        return answer.value == mention.value
    if answer.variables != mention.variables:
        return False
    value, other = answer.value, mention.value
    if answer.unit and mention.unit and answer.unit != mention.unit:
        converted = convert(float(other), mention.unit, answer.unit)
        return converted is not None and math.isclose(converted, value, rel_tol=1e-6)
    if value == other or isinstance(value + other, float) and math.isclose(value, other):
        return True
    if "percent" in (answer.unit, mention.unit) and answer.unit != mention.unit:
        percent, share = (value, other) if answer.unit == "percent" else (other, value)
        return math.isclose(percent, 100 * share)
    return is_rounded(value, mention) or is_rounded(other, answer)


def is_rounded(value: Fraction | float, rounded: Quantity) -> bool:
    """Whether `rounded` is the value, rounded to its own last digit. One significant digit alone shows nothing."""
    if rounded.decimals is None:
        return False
    step = 10.0**-rounded.decimals
    return step <= abs(rounded.value) / 5 and abs(value - rounded.value) <= step / 2 * (1 + 1e-9)
