"""Find mathematical expressions in text, and evaluate them."""

import math
import re
from fractions import Fraction
from functools import lru_cache

import sympy
from latex2sympy2_extended import latex2sympy

from .units import UNIT


# All repetitions are bounded or possessive, so matching time is linear in the length of the text
NUMBER = r"(?>(?:(?:\d{1,3}(?:,\d{3}){1,6}(?![\d,])|\d+)(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,2}(?!\w))?)"
GROUP = r"\s?\{(?:[^{}]|\{[^{}]{0,40}\}){1,60}\}"
ATOM = (
    rf"(?:\\frac{GROUP}{GROUP}|\\sqrt(?:\[\d\])?{GROUP}|√\s?(?:\d+|\([^()]{{1,40}}\))|\d{{1,4}}\s\d{{1,3}}/\d{{1,3}}\b"
    rf"|{NUMBER}|π|[a-zA-Zα-ω](?![a-zA-Z]))"
)
OPERATOR = r"\s{0,30}(?:[-+*/^×⋅÷]|plus|minus|times|divided by)\s{0,30}"
# Implicit products: 2π, 3√5, 2(x + 1), 2x, but not 2m
SIDE_BY_SIDE = rf"(?:\s?(?=\\frac|\\sqrt|√|π)|(?=\()|(?<=[\dπ)}}])(?!{UNIT})(?=[a-zA-Zα-ω]))"
PIECE = rf"[({{]{{0,3}}-?{ATOM}[)}}]{{0,3}}"
EXPRESSION = (
    rf"(?<![\w\\./^_])(?>(?:(?:minus|negative)\s|-)?{PIECE}(?:(?:{OPERATOR}-?|{SIDE_BY_SIDE}){PIECE}){{0,20}})"
    r"(?!(?:st|nd|rd|th)\b|:\d)"
)

SCIENTIFIC = re.compile(r"(?<=\d)\s?[×⋅*]\s?10\s?\^\s?\{?-?\d+\}?")
# A step of a solution, whereas 24/2, 3^2 and 2√36 are just notations of a number
CALCULATION = re.compile(r"[\d)}]\s*(?:[-+×⋅*÷]|plus|minus|times|divided by)\s*[-\d({\\√π]")
IRRATIONAL_OR_VARIABLE = re.compile(r"√|\\sqrt|π|(?<![a-zA-Z\\])[a-zA-Zα-ω](?![a-zA-Z])")
POWER_TOWER = re.compile(r"\^\s?[({]?-?(?:\d{3,}|[\w.]*\s?\^)|\d{16,}")  # 10^10^10
# Rewrite notations that latex2sympy cannot parse; a whole number before a fraction is a mixed number, not a product
TO_LATEX = [
    (re.compile(r"^(?:minus|negative)\s"), "-"), (re.compile("[×⋅]|times"), "*"), (re.compile("÷|divided by"), "/"),
    (re.compile("plus"), "+"), (re.compile("minus"), "-"),
    (re.compile(r"√\s?(?:(\d+)|\(([^()]*)\))"), r"\\sqrt{\1\2}"),
    (re.compile(r"(?<![\d.^)}])(\d+)\s?(\\frac\{\d+\}\{\d+\})"), r"(\1+\2)"),
    (re.compile(r"(\d+)\s(\d+/\d+)"), r"(\1+\2)"), (re.compile(r"\^(-?\d+)"), r"^{\1}"),
]  # fmt: skip


def is_calculation(expression: str) -> bool:
    """Whether an expression is a calculation (8 + 4), not a notation of one number (24/2, 3.0 × 10^8)."""
    return CALCULATION.search(SCIENTIFIC.sub("", expression)) is not None


@lru_cache(maxsize=10_000)
def evaluate(expression: str) -> tuple[Fraction | float, frozenset[str]] | None:
    """
    Value and variables of an expression; `None` for a calculation, and if the expression cannot be parsed.

    An expression with variables is evaluated at one point, with a logarithm as the value of each variable: two
    different expressions practically never have the same value there. Comparing the values takes microseconds;
    simplifying the difference of the expressions may take seconds.
    """
    for opening, closing in ("()", "{}"):  # unbalanced brackets belong to the text around the expression
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
    if POWER_TOWER.search(expression):
        return None
    for pattern, latex in TO_LATEX:
        expression = pattern.sub(latex, expression)
    try:
        parsed = latex2sympy(expression, is_real=True, convert_degrees=False, normalization_config=None)
        if not isinstance(parsed, sympy.Expr):  # a relation, a set, a matrix
            return None
        variables = {symbol: math.log(sum(map(ord, str(symbol))) + 1) for symbol in parsed.free_symbols}
        if isinstance(parsed, sympy.Rational):
            return Fraction(int(parsed.p), int(parsed.q)), frozenset()
        value = float(parsed.subs(variables.items()).evalf(15, maxn=50))
    except Exception:  # the parser raises many types of error for text that is not an expression
        return None
    return (value, frozenset(map(str, variables))) if math.isfinite(value) else None
