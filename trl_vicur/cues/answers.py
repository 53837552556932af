"""Does the final answer of a completion match the reference answer?"""

import logging
import math
import re
import unicodedata
from collections.abc import Iterator
from decimal import Decimal
from itertools import islice
from typing import TypeGuard

import sympy
from sympy.core.numbers import ImaginaryUnit
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom

from ..extras import needs_extra
from .cue_text import THINKING


with needs_extra("cues", "Checking answers"):
    from math_verify import LatexExtractionConfig, parse, verify

    from .text_audit.number_words import FILL_CHARACTER, number_words_to_digits


# math-verify warns when called without its time limit, which uses signals and so works only in the main thread. We
# filter out slow expressions instead: see `_is_cheap`.
logging.getLogger("math_verify").setLevel(logging.ERROR)

# --- Where a completion states its answer ---
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
# "The answer is 12", "**Final answer:** 12", "the answer to the question would be 12"; "#### 12" as in GSM8K
ANNOUNCEMENT = re.compile(
    r"(?:\banswer\b(?! choices| options)[^.\n:=]{0,60}?(?:\b(?:is|be)\b:?|[:=])|^####)[\s*_]*",
    re.IGNORECASE | re.MULTILINE,
)
# The full stop of "B. 12 cm" does not end a sentence
SENTENCE_END = re.compile(r"(?<!\b[A-Z])[.!?]+(?=[\s*]|\Z)|\n")
EXPLANATION = re.compile(r",?\s(?:because|since|as|which|where)\b.*", re.DOTALL)
YES_OR_NO = re.compile(r"(?:yes|no|true|false)\b", re.IGNORECASE)
# Between a subject and its predicate
COPULA = re.compile(
    r"\b(?:is|are|was|were|be|becomes?|equals?|shows?|says|reads|measures|contains)\b|(?<=\w)['’]s\b|:\s|[=≈]",
    re.IGNORECASE,
)

# --- Options ---
OPTION = re.compile(r"\(([A-Za-z])\)[.:]?|([A-Z])[.):]?|([a-z])[.):]")
OPTION_WITH_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(.+)", re.DOTALL)
# "B", "(b)", "B. 12 cm", "Option B is right" at the beginning; but not the article of "A triangle"
LEADING_OPTION = re.compile(r"(?:(?i:option|choice)\s+)?(?:\(([A-Za-z])\)|([A-Za-z])\Z|([A-Z])[.):,]|([B-HJ-Z])\s)")
# "option B", "choice (d)", "option b"; but not the article of "the only option a student has"
NAMED_OPTION = re.compile(
    r"\b(?i:option|choice)\s+(?:\(([A-Za-z])\)|([A-Zb-z])\b|(a)(?=\s*(?:[.,;:!?]|\Z|(?:is|as|because)\b)))"
)
# A capital that stands alone and is neither an article nor "I", or any letter in parentheses
LONE_LETTER = re.compile(r"(?<![\w'’-])(?:(?!A\s+[a-z]|I\b)([A-Z])|\(([A-Za-z])\))(?![\w'’-])")
NEGATION = re.compile(r"\b(?:not|no|never|neither|nor|cannot)\b|n['’]t\b", re.IGNORECASE)

# --- Words and mathematics ---
FUNCTION_WORDS = frozenset(
    "a an the is are was were it its s this that there so therefore thus in on at of to".split()
)
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?%?(?![\w/^.:]*\d)")
FORMULA = re.compile(r"\$([^$]+)\$")
# After a number: a word, or a symbol with or without a space; not "x" and "\pi"
UNIT = re.compile(
    r"(?<=[\d)}])(?:\s*(?:°\s*[CF]?|\^\{?\\circ\}?|(?:[cdkmµ]?m|[km]?g|m?l|km/h|s|ft|in)(?:\^?\{?[23]\}?)?)"
    r"|\s+(?!pi\b)(?:square |cubic )?[A-Za-z]{2,}(?:(?:/| per )[A-Za-z]+)?(?:\^?\{?[23]\}?)?)\Z"
)
# Words do not occur in expressions, whose letters are single symbols and whose LaTeX commands have a backslash
PLAIN_WORD = re.compile(r"(?<![\\A-Za-z])(?!and\b)[A-Za-z]{3,}")
# A range, a date, a telephone number: not a difference or a quotient
RANGE = re.compile(r"\d+(?:[/.]\d+)*(?:[-–]\d+(?:[/.]\d+)*)+|\d+(?:/\d+){2,}")
LATEX_TEXT = re.compile(r"\\(?:text\w*|math\w+|boxed)\s*\{([^{}]*)\}")
# Unicode normalization would turn "²" into a plain 2
AS_LATEX = {
    "−": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "π": r"\pi ",
    "²": "^{2}",
    "³": "^{3}",
    "≤": r"\leq ",
    "≥": r"\geq ",
    "∞": r"\infty ",
    "±": r"\pm ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∩": r"\cap ",
}
MAX_EXPRESSION_LENGTH = 100  # characters
# LaTeX commands that are safe to parse. SymPy evaluates some others during parsing (binomials, the Gamma function), or
# needs minutes to simplify them (sines, logarithms)
COMMANDS = frozenset(
    """frac dfrac tfrac sqrt pi times cdot div pm circ angle degree leq geq le ge neq ne approx infty cup cap alpha
    beta theta phi lambda mu omega""".split()
)
MAX_EXPRESSION_SIZE = 60  # nodes of its tree
PERCENT = sympy.UnevaluatedExpr(sympy.Rational(1, 100))  # math-verify's reading of "%"
ARITHMETIC = (
    *(sympy.Add, sympy.Mul, sympy.Pow, sympy.Number, sympy.NumberSymbol, sympy.Symbol, ImaginaryUnit),
    sympy.UnevaluatedExpr,
)
# "x ∈ [0, 1]" means "[0, 1]"
MEMBER_OF = re.compile(r"\A\s*[A-Za-z]\s*\\in(?![A-Za-z])")
# A decimal with at least this many significant digits may be rounded; one with fewer is exact
ROUNDED_DIGITS = 6
COLLECTIONS = (sympy.Tuple, sympy.Set, sympy.And, Relational, BooleanAtom)


def is_correct(completion: str, answer: str) -> bool:
    r"""
    Whether the final answer of a completion is the reference answer.

    The final answer is the text of the last `<answer>` tag, of the last `\boxed{}`, or after the last "the answer is";
    without any of these, it is the last sentence, or an option or a yes or no at the start of the completion. The
    comparison depends on the reference answer:

    - an option's letter: the final answer must name this option, and no other;
    - mathematics: it must have the same value, even if tiny; a decimal with six or more significant digits may be
      rounded, and 50 % equals 50 and 0.5. [math-verify](https://github.com/huggingface/Math-Verify) compares the
      expressions and, as usual, ignores units. Expressions that could take long to compare are compared as text;
    - other text: its words, or those after its last "is", "shows", …, must be the same, ignoring articles and other
      function words.

    Args:
        completion (`str`):
            The completion, with or without a thinking block before it.
        answer (`str`):
            The reference answer.

    Returns:
        `bool`: Whether it is correct; `False` if there is no final answer.
    """
    answer = _clean(answer)
    completion = THINKING.sub("", completion).strip()
    if not answer or completion.startswith("<think>"):
        return False
    return any(_matches(final, answer) for final in _final_answers(completion))


def _final_answers(completion: str) -> list[str]:
    """Find candidates for the final answer."""
    tagged = ANSWER_TAG.findall(completion)
    if tagged:
        completion = tagged[-1]
    if (boxed := _last_boxed(completion)) is not None:
        return [_clean(boxed)]
    if tagged:
        return [_clean(completion)]
    if announcements := list(ANNOUNCEMENT.finditer(completion)):
        line = completion[announcements[-1].end() :].partition("\n")[0]
        return [_clean(EXPLANATION.sub("", text)) for text in (line, SENTENCE_END.split(line)[0])]
    sentences = [text for text in map(_clean, SENTENCE_END.split(completion)) if text]
    if not sentences:
        return []
    finals = [EXPLANATION.sub("", sentences[-1])]
    # "B. Because …" and "Yes. The circle …"
    if leading := LEADING_OPTION.match(sentences[0]) or YES_OR_NO.match(sentences[0]):
        finals.append(leading[0].strip())
    return finals


def _last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}`, which may contain braces."""
    start = text.rfind(r"\boxed{")
    if start == -1:
        return None
    start += len(r"\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None  # the completion was truncated


def _clean(text: str) -> str:
    """Remove Markdown, LaTeX's text and spacing commands, and trailing punctuation."""
    for symbol, latex in AS_LATEX.items():
        text = text.replace(symbol, latex)
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/")  # the fraction slash of "½"
    text = re.sub(r"\\[()\[\]]", "$", text.replace(r"\$", "").replace(r"\%", "%"))
    text = re.sub(r"\\[,;:! ]|\\(?:left|right|displaystyle)\b|[*`]|__", " ", text)
    while (shorter := LATEX_TEXT.sub(r" \1", text)) != text:
        text = shorter
    text = re.sub(r"\s+", " ", text).rstrip(" .,;:!").lstrip()
    # Strip dollar signs around the whole text or before an amount, not around a formula at the end of a sentence
    return text.strip("$ ") if FORMULA.fullmatch(text) or text.count("$") == 1 else text


def _matches(final: str, answer: str) -> bool:
    if option := OPTION.fullmatch(answer):
        return _named_option(final) == _letter(option)
    if option := OPTION_WITH_TEXT.fullmatch(answer):
        named = _named_option(final)
        return _is_same(final, option[3]) if named is None else named == (option[1] or option[2])
    with_option = OPTION_WITH_TEXT.fullmatch(final)
    return _is_same(final, answer) or (with_option is not None and _is_same(with_option[3], answer))


def _named_option(text: str) -> str | None:
    """Return the letter of the option that the text names, or `None` unless it names exactly one."""
    if leading := LEADING_OPTION.match(text):
        return _letter(leading)
    letters = set(map(_letter, NAMED_OPTION.finditer(text))) or set(map(_letter, LONE_LETTER.finditer(text)))
    return letters.pop() if len(letters) == 1 and not NEGATION.search(text) else None


def _letter(match: re.Match) -> str:
    """Return the option's letter in upper case; only one group of the match is set."""
    return next(filter(None, match.groups())).upper()


def _is_same(text: str, answer: str) -> bool:
    parts = [text]
    if copulas := list(COPULA.finditer(text)):
        parts.append(text[copulas[-1].end() :])
    if not _is_mathematics(answer):
        words = _words(answer)
        if YES_OR_NO.fullmatch(answer):
            return _words(text)[:1] == words
        return any(_words(part) == words for part in parts)
    # The only formula or the only number of a sentence
    for pattern in (FORMULA, NUMBER):
        found = pattern.findall(text)
        if len(found) == 1:
            parts += [found[0], found[0].rpartition("=")[2]]
    return any(_is_same_value(_to_latex(part), _to_latex(answer)) for part in dict.fromkeys(parts))


def _words(text: str) -> list[str]:
    words = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", _in_digits(text).casefold())
    return [word for word in words if word not in FUNCTION_WORDS] or words


def _in_digits(text: str) -> str:
    """Replace number words with digits."""
    return number_words_to_digits(text).replace(FILL_CHARACTER, "")


def _is_mathematics(answer: str) -> bool:
    value = UNIT.sub("", _in_digits(answer))
    return bool(re.search(r"[\d\\√^=+<>]", value)) and not PLAIN_WORD.search(value) and not RANGE.fullmatch(value)


def _to_latex(text: str) -> str:
    text = re.sub(r"\A\s*(?:approximately|about|around|roughly|exactly|equal to|≈|~)\s*", "", text.strip("$ "))
    text = re.sub(r"(?<=[\d)}])\s*(?:percent|per cent|pct)\b", "%", _in_digits(text).rstrip(" .,;:!"))
    text = MEMBER_OF.sub("", UNIT.sub("", text))
    text = re.sub(r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\w.])(\d+)\s+(\d+)/(\d+)", r"\1\\frac{\2}{\3}", text)
    return re.sub(r"(?<=\d)[eE]([-+]?\d+)", r"\\times 10^{\1}", text)


def _is_same_value(text: str, answer: str) -> bool:
    if re.sub(r"\s", "", text).casefold() == re.sub(r"\s", "", answer).casefold():
        return True
    expressions = []
    for latex in (answer, text):
        names = set(re.findall(r"\\([A-Za-z]+)", latex)) - COMMANDS
        if len(latex) > MAX_EXPRESSION_LENGTH or names or "!" in latex or PLAIN_WORD.search(latex):
            return False
        parsed = parse(
            f"${latex}$",
            [LatexExtractionConfig()],
            fallback_mode="no_fallback",
            parsing_timeout=None,  # pyright: ignore[reportArgumentType]  # the docstring allows `None`
        )
        if not parsed or not _is_cheap(parsed[0]):
            return False
        expressions.append(parsed[0])
    return _is_same_expression(*expressions)


def _is_same_expression(answer: sympy.Basic, other: sympy.Basic) -> bool:
    if _is_number(answer) and _is_number(other):
        return _is_same_number(answer, other)
    # math-verify rounds decimals to six places, which makes all tiny values equal: pass exact fractions instead
    numbers = list(_numbers(answer))
    exact = {
        number: next((each for each in numbers if _is_same_number(each, number)), number) for number in _numbers(other)
    }
    other = other.xreplace(exact)
    is_linear = not answer.has(sympy.Pow) and not other.has(sympy.Pow)  # solving nonlinear relations may take long
    answer, other = (each.xreplace({number: _exact(number) for number in _numbers(each)}) for each in (answer, other))
    return verify(answer, other, numeric_precision=50, allow_set_relation_comp=is_linear, timeout_seconds=None)


def _is_number(expression: sympy.Basic) -> TypeGuard[sympy.Expr]:
    return isinstance(expression, sympy.Expr) and not expression.free_symbols


def _numbers(expression: sympy.Basic) -> Iterator[sympy.Expr]:
    """Yield the largest parts of an expression that are numbers."""
    if _is_number(expression):
        yield expression
    else:
        for part in expression.args:
            yield from _numbers(part)


def _exact(number: sympy.Expr) -> sympy.Expr:
    """Replace decimals and percentages with exact fractions."""
    return number.xreplace({each: sympy.Rational(str(each)) for each in number.atoms(sympy.Float)}).doit()


def _is_same_number(one: sympy.Expr, other: sympy.Expr) -> bool:
    """Whether two numbers are the same, or one is the other rounded to at least six significant digits."""
    if one.has(PERCENT) != other.has(PERCENT):  # 50 % is 0.5, or 50 where the question asks for a percentage
        return any(
            _is_same_number(_with_percent(one, factor), _with_percent(other, factor))
            for factor in (sympy.Rational(1, 100), sympy.Integer(1))
        )
    values = _exact(one), _exact(other)
    if values[0] == values[1]:
        return True
    difference, *sizes = (abs(sympy.N(value, 30)) for value in (values[0] - values[1], *values))
    if not all(value.is_Float or value.is_zero for value in (difference, *sizes)):
        return False  # infinite or undefined
    size = max(sizes)
    is_exact = all(value.is_Rational for value in values)
    if not is_exact and difference <= size * sympy.Rational(1, 10**20):
        return True
    decimals = [each.atoms(sympy.Float) for each in (one, other)]
    num_digits = min(max(map(_num_digits, each)) for each in decimals if each) if any(decimals) else 0
    return (
        num_digits >= ROUNDED_DIGITS
        and difference <= sympy.Rational(10) ** (math.floor(sympy.log(size, 10)) - num_digits + 1) / 2
    )


def _with_percent(number: sympy.Expr, factor: sympy.Expr) -> sympy.Expr:
    """Substitute `factor` for the number's percent sign."""
    replaced = number.xreplace({PERCENT: factor})
    assert isinstance(replaced, sympy.Expr)  # replacing one expression by another gives an expression
    return replaced


def _num_digits(decimal: sympy.Float) -> int:
    """Number of significant digits of a decimal, without trailing zeros."""
    return len(Decimal(str(decimal)).normalize().as_tuple().digits)


def _is_cheap(expression: sympy.Basic | sympy.MatrixBase) -> bool:
    """Whether the expression is arithmetic that SymPy simplifies quickly; powers of powers could take days."""
    if not isinstance(expression, sympy.Basic):
        return False  # a matrix
    nodes = list(islice(sympy.preorder_traversal(expression), MAX_EXPRESSION_SIZE + 1))
    if len(nodes) > MAX_EXPRESSION_SIZE or not all(isinstance(node, (*ARITHMETIC, *COLLECTIONS)) for node in nodes):
        return False
    exponents = [node.exp for node in nodes if isinstance(node, sympy.Pow)]
    factors = [node for exponent in exponents for node in sympy.preorder_traversal(exponent)]
    if any(factor.is_Pow or (isinstance(factor, sympy.Number) and abs(factor) > 100) for factor in factors):
        return False
    # With symbols, powers of sums are expanded: the degree is at most the product of the exponents
    symbols = {node for node in nodes if isinstance(node, sympy.Symbol)}
    degree = math.prod(max(1, abs(factor)) for factor in factors if isinstance(factor, sympy.Number))
    return not symbols or (len(symbols) <= 3 and degree <= 10 and symbols.isdisjoint(factors))
