"""
Does a cue state the answer?

1. Parse the answer into its meanings: quantities, the label of an option, a phrase, a yes or no.
2. Find every mention of a meaning in the cue.
3. Excuse a mention if the value is known to be in the image, or if the cue says so.
4. Return the strongest verdict.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from .options import find_label, split_options
from .phrases import Phrase, base_form, find_phrase, make_phrase, read_tokens
from .presentation import is_announced, is_presented_as_written, is_read_off_scale
from .quantities import Quantity, find_other_readings, find_quantities, is_same_quantity
from .units import UNIT_WORD, read_unit


# Attributes that are directly visible, not those that must be inferred from marks (isosceles, rhombus, parallel).
COLOUR_OR_SHAPE = (
    r"(?:(?:dark|light|bright|pale)[ -])?(?:red|orange|yellow|green|blue|purple|violet|pink|brown|black|white|gr[ea]y"
    r"|gold(?:en)?|silver|beige|turquoise|cyan|magenta|navy|maroon|teal|tan|cream|circ(?:le|ular)|round|square"
    r"|rectang(?:le|ular)|triang(?:le|ular)|oval|ellipse|star|diamond|heart|cross|arrow|pentagon|hexagon|octagon|cube"
    r"|sphere|cylinder|cone|pyramid|crescent|ring|dot)s?"
)
PLACE = (
    r"(?:left|right|top|bottom|upper|lower|middle|cent(?:er|re)|above|below|behind|front|inside|outside|between|under"
    r"|over|beneath|beside|next|near|corner|side|edge|half|north|south|east|west|foreground|background"
    r"|(?:left|right)-hand)"
)
# "dark blue", "red and white", "left", "in the upper right corner", "left of the tree"
VISIBLE_ATTRIBUTE = re.compile(
    rf"(?:an? |the )?{COLOUR_OR_SHAPE}(?:(?:,| and)? {COLOUR_OR_SHAPE})*"
    rf"|(?:(?:in|on|at|to|the)\s)*{PLACE}(?:[\s-]{PLACE})*(?:\s(?:of|to|the|a)\b.*)?",
    re.IGNORECASE,
)

# A number that is a name ("Figure 12"), unless the question asks for that name
NAMED = re.compile(
    r"\b(figure|fig|panel|question|problem|exercise|step|stage|table|image|picture|page|part|example|diagram|graph"
    r"|chart|class|room|route|bus|line|row|column|grade|level|chapter|station|platform|player|lane|track|angle"
    r"|∠)\.?\s?$",
    re.IGNORECASE,
)
# "two lines" does not state "2", unless the question asks for a count
COUNTED = re.compile(r"\s(?!(?:unit|dollar|cent|euro|pound|time)s?\b)([a-z]+(?:\s[a-z]+)?s)\b")
ASKS_FOR_A_COUNT = re.compile(r"\bhow many|\bnumber of|\bcount", re.IGNORECASE)

# "increasing, decreasing or constant"
ALTERNATIVES = re.compile(r"(?:[\w-]+,\s){0,6}[\w-]+,?\sor\s(?:an?\s|the\s)?[\w-]+")

FINAL_ANSWER = re.compile(
    r"boxed\s?\{(.+)\}|####\s?(.+)|<answer>(.+?)</answer>|\banswer(?: is|:)\s(.+)", re.IGNORECASE
)
# Words that an answer may contain besides its quantities; an answer with other words is a text
FILLERS = frozenset("and or about units approximately is equals to by from between x y z n".split())
ASKS_FOR_A_DATE = re.compile(r"\b(?:when|dates?|days?)\b", re.IGNORECASE)
# "No apples are left" answers "How many apples are left?" with 0
NONE_OF = re.compile(r"\b(?:no|none of the|not a single|not one)\s((?:[\w-]+\s){0,2}[\w-]+)", re.IGNORECASE)
HOW_MANY = re.compile(r"\bhow many\s((?:[\w-]+\s){0,2}[\w-]+)", re.IGNORECASE)
ROMAN_LABEL = re.compile(r"(?:IX|IV|VI{0,3}|I{1,3}|X)")
VERDICTS = {"yes": "yes", "no": "no", "true": "yes", "false": "no", "correct": "yes", "incorrect": "no"}
VERDICT = re.compile(
    r"(?:(?:^|[.;:!?,(\n]\s?|\b(?:so|and|hence|thus|therefore|answer|is|it's)\s)\W{0,3}\b(yes|no)\b"
    r"|(?:^|[.;:]\s|\b(?:statement|claim|it|this|that|which|answer)\s(?:\w+\s){0,3}?is\s)\W{0,3}(true|false|correct"
    r"|incorrect)\b)"
    r"(?=\W{0,3}(?:[,.;:!)\n]|$))",
    re.IGNORECASE,
)
AUXILIARY = re.compile(
    r"\b(?:(?:does|do|did|can|could|will|would)(?P<not>n't| not|not)?\s(?:\w+ly\s)?(?P<verb>[\w-]+)"
    r"|(?:they|it|he|she) (?:is|are|does|do|did)(?P<negated>n't| not)?(?=[.!]))",
    re.IGNORECASE,
)
EXISTENCE = re.compile(r"\b(?:is|are) there (?:an?|any)\s([\w-]+)", re.IGNORECASE)
YES_NO_QUESTION = re.compile(
    r"\b(?:is|are|was|were)\b[^?.\n]{3,200}?\b([\w-]+)(?:\s(?:to|with|of) [^?.\n]{1,40})?\?", re.IGNORECASE
)


class Answer(NamedTuple):
    """
    The meanings of an answer. A cue that expresses any of them states the answer.

    Args:
        quantities (`list[list[Quantity]]`):
            Possible readings; each is one quantity, or several that must be stated together.
        labels (`list[str]`):
            The label of its option, and the option's text if the text is also a label: "(B) II".
        phrase (`Phrase`, *optional*):
            Its words, or those of the option.
        is_visible_attribute (`bool`):
            Whether the words name a colour, a shape or a place.
        verdict (`str`, *optional*):
            `"yes"` or `"no"`.
    """

    quantities: list[list[Quantity]]
    labels: list[str]
    phrase: Phrase | None
    is_visible_attribute: bool
    verdict: str | None


class Mention(NamedTuple):
    """A part of a cue, `cue[start:end]`, that expresses one of the answer's meanings."""

    start: int
    end: int
    meaning: Literal["quantity", "label", "phrase", "verdict"]


def find_answer_leak(
    cue: str, question: str, answer: str, visible_text: Sequence[str] = ()
) -> tuple[Literal["none", "possible", "leak"], list[str]]:
    """
    Find out whether a cue states the answer. All texts must be folded by [`fold_text`].

    Args:
        cue (`str`):
            The cue.
        question (`str`):
            The question, with its options.
        answer (`str`):
            The reference answer.
        visible_text (`Sequence[str]`, *optional*, defaults to `()`):
            Texts in the image; empty if they are unknown.

    Returns:
        `tuple[str, list[str]]`: `"leak"` if the cue states the answer, `"possible"` if it does but the image may show
            the value, `"none"` otherwise; and the reasons.
    """
    stem, options = split_options(question)
    meanings = read_answer(answer, stem, options)
    excuse_of_value = None
    if contains(" ; ".join(visible_text), meanings):
        excuse_of_value = "a label of the image shows it"
    elif contains(ALTERNATIVES.sub(" ", stem), meanings):
        excuse_of_value = "the question says it"
    elif names_all_equally(cue, options):
        excuse_of_value = "the cue names every option"

    verdict, reasons = "none", []
    shown_answer = repr(answer.strip()[:60])
    for mention in find_mentions(cue, stem, meanings, options):
        start, end, meaning = mention
        piece = repr(cue[start:end].strip(" (){}\n"))
        if is_announced(cue, start, end):
            return "leak", [f"the cue says {piece} and announces it as the answer, which is {shown_answer}"]
        excuse = excuse_of_value if meaning in ("quantity", "phrase") else None
        excuse = excuse or find_excuse(cue, question, mention, meanings, bool(visible_text))
        if excuse is None:
            reason = (
                f"the cue says {piece}, the answer is {shown_answer}, and no label of the image is known to show it"
            )
            return "leak", [reason]
        verdict, reasons = "possible", [f"the cue says {piece}, the answer is {shown_answer}, but {excuse}"]
    return verdict, reasons


# --- 1. Meanings of the answer ---


def read_answer(answer: str, stem: str, options: dict[str, str]) -> Answer:
    """Parse an answer into its meanings; for an option, both its label and its text."""
    if match := FINAL_ANSWER.search(answer):
        answer = match[match.lastindex or 0]
    text = answer.strip(" \n.")
    labelled = re.fullmatch(r"(?:option |choice )?[(\[]?([A-H1-9]|[IV]{1,3})(?:[)\].:]+\s?(.*))?", text, re.I | re.S)
    labels = []
    if labelled and (labelled[1].upper() in options or not options and labelled[1] in "ABCDEFGH"):
        labels = [labelled[1].upper()]
        text = labelled[2] or options.get(labels[0], "")
    elif options:
        labels = [label for label, option in options.items() if option.lower() == text.lower()][:1]
    text = text.strip(" \n.")
    if labels and ROMAN_LABEL.fullmatch(text):
        return Answer([], [*labels, text], None, False, None)

    verdict = VERDICTS.get(text.lower().split(",")[0])
    quantities, is_text = read_quantities(text, stem)
    phrase = make_phrase(text, stem) if not verdict and (is_text or not quantities) else None
    is_name = " " in text and text.istitle()
    is_visible_attribute = not is_name and VISIBLE_ATTRIBUTE.fullmatch(text) is not None
    return Answer(quantities, labels, phrase, is_visible_attribute, verdict)


def read_quantities(text: str, stem: str) -> tuple[list[list[Quantity]], bool]:
    """The quantities that an answer may mean, and whether it also has other words."""
    unit = asked_unit(stem)
    found = [each if each.unit else each._replace(unit=unit) for each in find_quantities(text)]
    other_words = words_beside(found, text)
    ways = [found] if found and len(other_words) <= 2 else []
    for reading in find_other_readings(text):
        is_date_in_digits = reading.unit == "date" and not re.search("[A-Za-z]", text)
        if words_beside([reading], text) or is_date_in_digits and not ASKS_FOR_A_DATE.search(stem):
            continue
        # The 24 of "24 December", the 7 of "7 p.m." and the 12.5 of "12.5k" do not state it
        if other_words or any(each.variables for each in found):
            ways, other_words = [way for way in ways if way != found], []
        ways.append([reading])
    return ways, bool(other_words)


def words_beside(quantities: list[Quantity], text: str) -> list[str]:
    """The words of an answer that are not part of its quantities."""
    for quantity in reversed(quantities):
        text = text[: quantity.start] + " " + text[quantity.end :]
    return [word for word in re.findall(r"[^\W_]+", text) if word.lower() not in FILLERS and not word.isdigit()]


def asked_unit(stem: str) -> str | None:
    """The unit that the question asks for: "in centimetres", "how many minutes"; `"count"` for "how many apples"."""
    for match in re.finditer(r"\b(?:in|how many)\s([\w°/^ ]{1,30})", stem, re.IGNORECASE):
        quantities = find_quantities(f"1 {match[1]}")
        if quantities and quantities[0].unit:
            return quantities[0].unit
    if match := HOW_MANY.search(stem):
        unit = re.search(rf"\b{UNIT_WORD}\b", match[1])
        return read_unit(unit[0]) if unit else "count"
    return None


# --- 2. Mentions of the answer ---


def find_mentions(cue: str, stem: str, answer: Answer, options: dict[str, str]) -> Iterator[Mention]:
    """Every part of the cue that states the answer."""
    for wanted in answer.quantities:
        for start, end in find_same(wanted, cue):
            name = NAMED.search(cue[max(0, start - 20) : start]) if len(wanted) == 1 else None
            if not name or name[1].lower() in stem.lower():
                yield Mention(start, end, "quantity")
    if [[quantity.value for quantity in way] for way in answer.quantities] == [[0]] and (
        asked := HOW_MANY.search(stem)
    ):
        counted = {token.base for token in read_tokens(asked[1])}
        for match in NONE_OF.finditer(cue):
            if any(token.base in counted for token in read_tokens(match[1])):
                yield Mention(*match.span(), "quantity")
    if answer.phrase:
        yield from (Mention(*span, "phrase") for span in find_phrase(answer.phrase, cue))
    for label in answer.labels:
        yield from (Mention(*span, "label") for span in find_label(label, tuple(options), cue, stem))
    if answer.verdict:
        yield from (Mention(*span, "verdict") for span in find_verdict(answer.verdict, cue, stem))


def find_same(wanted: list[Quantity], text: str) -> Iterator[tuple[int, int]]:
    """Spans of adjacent quantities that equal the wanted ones, in any order."""
    found = find_quantities(text)
    for i in range(len(found) - len(wanted) + 1):
        window = list(found[i : i + len(wanted)])
        if all(_take(quantity, window) for quantity in wanted):
            yield found[i].start, found[i + len(wanted) - 1].end
    if len(wanted) == 1:
        for reading in find_other_readings(text):
            if is_same_quantity(wanted[0], reading):
                yield reading.start, reading.end


def _take(wanted: Quantity, quantities: list[Quantity]) -> bool:
    """Remove the wanted quantity from the list; return whether it was there."""
    for index, quantity in enumerate(quantities):
        if is_same_quantity(wanted, quantity):
            del quantities[index]
            return True
    return False


def find_verdict(verdict: str, cue: str, stem: str) -> Iterator[tuple[int, int]]:
    """Spans of a cue that answer a question with yes or no."""
    for match in VERDICT.finditer(cue):
        if VERDICTS[match[match.lastindex or 0].lower()] == verdict:
            yield match.span(match.lastindex or 0)
    # "Does it light up?" is answered by "it does not light up", "they do", "there is no light"
    asked_words = {token.base for token in read_tokens(stem)}
    for match in AUXILIARY.finditer(cue):
        is_denied = bool(match["not"] or match["negated"])
        is_about_it = match["verb"] is None or base_form(match["verb"]) in asked_words
        if is_about_it and is_denied == (verdict == "no"):
            yield match.span()
    if verdict == "no" and (thing := EXISTENCE.search(stem)):
        for match in NONE_OF.finditer(cue):
            if base_form(thing[1]) in {token.base for token in read_tokens(match[1])}:
                yield match.span()
    # "Is ABC isosceles?" is answered by "ABC is isosceles" as well
    if asked := YES_NO_QUESTION.search(stem):
        statement = rf"\b(?:is|are|was|were|looks?)(n't|\snot)?\s(?:\w+\s){{0,2}}?{re.escape(asked[1])}\b"
        for match in re.finditer(statement, cue, re.IGNORECASE):
            if (verdict == "no") == bool(match[1]):
                yield match.span()


# --- 3. Excuses for a mention ---


def contains(text: str, answer: Answer) -> bool:
    """Whether a text contains the answer's value, with all of its parts, or its phrase."""
    if answer.phrase and next(find_phrase(answer.phrase, text), None):
        return True
    return any(
        all(any(is_same_quantity(part, other) for other in read(text)) for part in way)
        for read in (find_quantities, find_other_readings)
        for way in answer.quantities
    )


def names_all_equally(cue: str, options: dict[str, str]) -> bool:
    """Whether the cue names every option equally often and therefore prefers none."""
    phrases = [make_phrase(text) for text in options.values()]
    counts = {sum(1 for _ in find_phrase(phrase, cue)) if phrase else 0 for phrase in phrases}
    return len(phrases) > 1 and len(counts) == 1 and counts != {0}


def find_excuse(cue: str, question: str, mention: Mention, answer: Answer, has_visible_text: bool) -> str | None:
    """The reason why the image may show what a mention states, or `None`."""
    start, end, meaning = mention
    if meaning == "phrase" and answer.is_visible_attribute:
        return "it is an attribute that is seen directly"
    if meaning not in ("quantity", "phrase"):
        return None
    if is_read_off_scale(cue, start, end):
        return "the cue reads it off a scale"
    counted = COUNTED.match(cue, end) if meaning == "quantity" else None
    if ASKS_FOR_A_COUNT.search(question):
        # "The letter bears three stamps" is a count; a "3" in quotation marks may be printed on it
        is_count = counted is not None and cue[max(0, start - 1) : start] not in ("'", '"')
    else:
        is_count = False
        if counted and cue[start:end].isalpha() and not share_a_word(counted[1], question):
            return "it counts something that the question does not ask about"
    if not has_visible_text and not is_count and is_presented_as_written(cue, start, end):
        return "the cue presents it as written in the image"
    return None


def share_a_word(text: str, other: str) -> bool:
    return not {token.base for token in read_tokens(text)}.isdisjoint(token.base for token in read_tokens(other))
