"""
Does a cue state the answer?

1. The answer is read into its meanings: quantities, the label of an option, a phrase, a verdict.
2. Every mention of one of them in the cue is found.
3. Something may excuse a mention: the value is known, or said, to stand in the image.
4. The strongest verdict wins.
"""

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from .quantities import Quantity, find_quantities, is_same_quantity


# Text around a mention that is searched for what announces or excuses it, in characters
CONTEXT_CHARS = 160

# The cue presents something as the answer
ANNOUNCED_BEFORE = re.compile(
    r"(?:\banswers?\b[^.!?;]{0,30}?(?:\b(?:is|are|be|equals)\b|[:=])|\b(?:correct|right) (?:answer|option|choice|one"
    r"|value|statement)\b.{0,15}?(?:\bis\b|:)|\bmust (?:be|equal)\b|\bboxed\b|####|<answer>)[^.!?;,]{0,25}$"
    r"|\banswer $",
    re.IGNORECASE,
)
ANNOUNCED_BEHIND = re.compile(
    r"[^.!?;,]{0,25}?\b(?:is|are|was|as|be|fits)\s(?:\w+\s){0,2}"
    r"(?:correct\b|right (?:answer|one|choice|option)|(?:final )?answer\b)",
    re.IGNORECASE,
)
# The cue presents something as written in the image …
WRITTEN_BEFORE = re.compile(
    r"\b(?:label(?:l?ed|l?ing|s)?|mark(?:ed|s|ing)?|reads?|reading|written|print(?:ed|s)?|inscribed|annotated"
    r"|numbered|caption(?:s|ed)?|titled?|headed|tag(?:ged)?|text|words?|says|lists?|bears?|bearing|carr(?:y|ies)"
    r"|stamped|engraved|painted|displays?|displayed|shows?(?= ?(?:the (?:number|value|text|word|letter)|['\"\d]))"
    r"|number(?! of))\b",
    re.IGNORECASE,
)
WRITTEN_BEHIND = re.compile(
    r"['\")\]]*\s(?:\w+\s)?(?:(?:is|are)\s)?(?:printed|written|shown|displayed|stamped|engraved|painted|appears)\b",
    re.I,
)
# … or as read off a scale …
SCALE = re.compile(
    r"\b(?:ax[ei]s|[xy]-axis|scales?|dials?|needle|pointer|gauge|ruler|protractor|\w*meter|clock|watch|hands?|ticks?"
    r"|gridlines?|graduations?|number line|beaker|cylinder|syringe|grid)\b",
    re.IGNORECASE,
)
READ_OFF = re.compile(
    r"\b(?:reach|point|read|show|indicat|stand|end|ris|extend|climb|fall|drop|com|lie|stop|settl|rest|sit|align|touch"
    r"|peak|meet|cross|go|run|start|stretch|hover)\w*\b",
    re.IGNORECASE,
)
# … but another statement may begin in between: "AB is labelled 12 and BC is 5"
NEW_STATEMENT = re.compile(r"\b(?:is|are|was|were|has|have|equals?|measures?|so|which)\b|\band\b.*=", re.IGNORECASE)

# Attributes that are seen directly. What has to be concluded from marks (isosceles, rhombus, parallel) is not here.
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
# "two lines" is no "2", unless the question asks for a count
COUNTED = re.compile(r"\s(?!(?:unit|dollar|cent|euro|pound)s?\b)[a-z]+(?:\s[a-z]+)?s\b")
ASKS_FOR_A_COUNT = re.compile(r"\bhow many|\bnumber of|\bcount", re.IGNORECASE)

LABELS = ("ABCDEFGH", "abcdefgh", "123456789", ("I", "II", "III", "IV", "V", "VI"))
OPTION_START = re.compile(r"(?:(?<=[\s,;])|^)(?:\(([A-Ha-h1-9]|[IV]{1,3})\)|\[([A-H])\]|([A-Ha-h1-9])[.):](?=\s))\s?")
UNLABELLED_OPTIONS = re.compile(r"\b(?:options|choices|choose from|select from)\b.{0,20}?:", re.IGNORECASE)
# "increasing, decreasing or constant"
ALTERNATIVES = re.compile(r"(?:[\w-]+,\s){0,6}[\w-]+,?\sor\s(?:an?\s|the\s)?[\w-]+")
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth".split()
OPTION_NOUN = r"(?:option|choice|answer|alternative|statement|candidate)"

FINAL_ANSWER = re.compile(
    r"boxed\s?\{(.+)\}|####\s?(.+)|<answer>(.+?)</answer>|\banswer(?: is|:)\s(.+)", re.IGNORECASE
)
# Words that may stand in an answer beside its quantities; with more others, it is a text
FILLERS = frozenset("and or about units approximately is equals to x y z n".split())
PHRASE_FILLERS = frozenset("a an the it they".split())
# Names of months that are also other words
CASE_SENSITIVE = frozenset({"May", "March"})
VERDICTS = {"yes": "yes", "no": "no", "true": "yes", "false": "no", "correct": "yes", "incorrect": "no"}
VERDICT = re.compile(
    r"(?:(?:^|[.;:!?,(\n]\s?|\b(?:so|hence|thus|therefore|answer|is|it's)\s)\W{0,3}\b(yes|no)\b"
    r"|(?:^|[.;:]\s|\b(?:statement|claim|it|this|that|answer)\s(?:\w+\s){0,3}?is\s)\W{0,3}(true|false|correct"
    r"|incorrect)\b)"
    r"(?=\W{0,3}(?:[,.;:!)\n]|$))",
    re.IGNORECASE,
)
YES_NO_QUESTION = re.compile(
    r"\b(?:is|are|was|were)\b[^?.\n]{3,200}?\b([\w-]+)(?:\s(?:to|with|of) [^?.\n]{1,40})?\?", re.IGNORECASE
)


class Answer(NamedTuple):
    """The meanings of an answer: what would state it in a cue."""

    quantities: list[Quantity]
    label: str | None
    phrase: re.Pattern | None
    is_visible_attribute: bool
    verdict: str | None


class Mention(NamedTuple):
    """A place in a cue, `cue[start:end]`, that states the answer by one of its meanings."""

    start: int
    end: int
    meaning: Literal["quantity", "label", "phrase", "verdict"]


def find_answer_leak(
    cue: str, question: str, answer: str, visible_text: Sequence[str] = ()
) -> tuple[Literal["none", "possible", "leak"], list[str]]:
    """
    Whether a cue states the answer. All texts as [`fold_text`] returns them.

    Args:
        cue (`str`):
            The cue.
        question (`str`):
            The question, with its options.
        answer (`str`):
            The reference answer.
        visible_text (`Sequence[str]`, *optional*, defaults to `()`):
            Texts that the image carries; empty where they are unknown.

    Returns:
        `tuple[str, list[str]]`: `"leak"` if the cue states it, `"possible"` if it does but the value may be there to
            be seen, `"none"` otherwise; and what was found.
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


# --- 1. The answer's meanings ---


def split_options(question: str) -> tuple[str, dict[str, str]]:
    """The question without its options, and the options by label, or by number where they have no labels."""
    starts: list[re.Match] = []
    for match in OPTION_START.finditer(question):
        if len(starts) < 6 and match[match.lastindex] in [labels[len(starts)] for labels in LABELS]:
            starts.append(match)
    if len(starts) >= 2:
        ends = [match.start() for match in starts[1:]] + [len(question)]
        texts = (question[match.end() : end].strip(" \n,;") for match, end in zip(starts, ends, strict=True))
        labels = (match[match.lastindex].upper() for match in starts)
        return question[: starts[0].start()], dict(zip(labels, texts, strict=True))
    if match := UNLABELLED_OPTIONS.search(question):
        texts = filter(None, (text.strip(" '\"[]\n") for text in re.split(r"[,;\n]", question[match.end() :])))
        return question[: match.start()], {str(number): text for number, text in enumerate(texts, start=1)}
    return question, {}


def read_answer(answer: str, stem: str, options: dict[str, str]) -> Answer:
    """What would state the answer in a cue; of an option its label and its text."""
    if match := FINAL_ANSWER.search(answer):
        answer = match[match.lastindex]
    text = answer.strip(" \n.")
    labelled = re.fullmatch(r"(?:option |choice )?[(\[]?([A-H1-9]|[IV]{1,3})(?:[)\].:]+\s?(.*))?", text, re.I | re.S)
    label = None
    if labelled and (labelled[1].upper() in options or not options and labelled[1] in LABELS[0]):
        label = labelled[1].upper()
        text = labelled[2] or options.get(label, "")
    elif options:
        label = next((label for label, option in options.items() if option.lower() == text.lower()), None)
    text = text.strip(" \n.")

    verdict = VERDICTS.get(text.lower().split(",")[0])
    unit = asked_unit(stem)
    quantities = [each if each.unit else each._replace(unit=unit) for each in find_quantities(text)]
    rest = text
    for quantity in reversed(quantities):
        rest = rest[: quantity.start] + " " + rest[quantity.end :]
    other_words = [word for word in re.findall(r"[^\W\d_]+", rest) if word.lower() not in FILLERS]
    if len(other_words) > 2:
        quantities = []
    is_phrase = not verdict and (other_words or not quantities)
    phrase = phrase_pattern(text) if is_phrase else None
    return Answer(quantities, label, phrase, VISIBLE_ATTRIBUTE.fullmatch(text) is not None, verdict)


def asked_unit(stem: str) -> str | None:
    """The unit that the question asks for: "in centimetres", "how many minutes"."""
    asked = (
        find_quantities(f"1 {match[1]}") for match in re.finditer(r"\b(?:in|how many)\s([\w°/^ ]{1,30})", stem, re.I)
    )
    return next((quantities[0].unit for quantities in asked if quantities and quantities[0].unit), None)


@lru_cache(maxsize=10_000)
def phrase_pattern(text: str) -> re.Pattern | None:
    """Finds the words of a text one after the other, in whatever inflection, with or without articles."""
    words = [word for word in re.findall(r"\w+(?:'\w+)?", text)[:40] if word.lower() not in PHRASE_FILLERS]
    if not words:
        return None
    keeps_case = len(words) == 1 and (words[0] in CASE_SENSITIVE or len(words[0]) <= 3 and words[0].isupper())
    pattern = r"(?<![\w-])" + r"[\s\W]{1,3}(?:(?:the|an?)\s)?".join(map(_inflected, words)) + r"(?![\w-])"
    return re.compile(pattern, 0 if keeps_case else re.IGNORECASE)


def _inflected(word: str) -> str:
    """Pattern of a word: increasing, increases, increased; triangle, triangles."""
    stem = re.fullmatch(r"(\w{5,})(?:ing|ed|es)", word)
    if stem:
        return re.escape(stem[1]) + "(?:e|es|s|ed|ing)?"
    return re.escape(word[:-1] if len(word) > 3 and word.endswith("s") else word) + "s?"


# --- 2. Its mentions ---


def find_mentions(cue: str, stem: str, answer: Answer, options: dict[str, str]) -> Iterator[Mention]:
    """Every place of the cue that states the answer."""
    if answer.quantities:
        for start, end in find_same(find_quantities(cue), answer.quantities):
            name = NAMED.search(cue[max(0, start - 20) : start])
            if not name or name[1].lower() in stem.lower():
                yield Mention(start, end, "quantity")
    if answer.phrase:
        yield from (Mention(*match.span(), "phrase") for match in answer.phrase.finditer(cue))
    if answer.label:
        pattern = label_pattern(answer.label, tuple(options))
        yield from (Mention(*match.span(), "label") for match in pattern.finditer(cue))
    if answer.verdict:
        for match in VERDICT.finditer(cue):
            if VERDICTS[match[match.lastindex].lower()] == answer.verdict:
                yield Mention(*match.span(match.lastindex), "verdict")
        # "Is ABC isosceles?" is answered by "ABC is isosceles" as well
        if asked := YES_NO_QUESTION.search(stem):
            statement = rf"\b(?:is|are|was|were|looks?)\s(not\s)?(?:\w+\s){{0,2}}?{re.escape(asked[1])}\b"
            for match in re.finditer(statement, cue, re.IGNORECASE):
                if (answer.verdict == "no") == bool(match[1]):
                    yield Mention(*match.span(), "verdict")


def find_same(quantities: list[Quantity], wanted: list[Quantity]) -> Iterator[tuple[int, int]]:
    """Spans of neighbouring quantities that are the wanted ones, in this order or backwards."""
    for i in range(len(quantities) - len(wanted) + 1):
        found = quantities[i : i + len(wanted)]
        if any(all(map(is_same_quantity, order, found)) for order in (wanted, wanted[::-1])):
            yield found[0].start, found[-1].end


@lru_cache(maxsize=1000)
def label_pattern(label: str, labels: tuple[str, ...]) -> re.Pattern:
    """Finds the label of an option where it cannot be the name of a point, a unit or an article."""
    either_case = f"[{label}{label.lower()}]" if len(label) == 1 and label.isalpha() else label
    patterns = [
        rf"(?i:\b{OPTION_NOUN}s?\b(?:\s(?:is|must be|letter))?\s?:?\s?)[(\['\"]?{either_case}\b",
        rf"(?i:\b(?:answer|it|correct \w+|right \w+)\b.{{0,20}}?\b(?:is|be)\s|\b(?:choose|select"
        rf"|pick)\s)[(\['\"]?{label}\b",
        rf"^\W{{0,3}}{label}\W{{0,3}}$|(?<!\w)(?<!\w\s)\({either_case}\)",
        rf"(?i:\b(?:fits?|match(?:es)?|it's|holds)\b.{{0,20}}?(?:\bis\b)?)\s[(\['\"]?{label}\b(?=\W*$|[.,;])",
        rf"\b{label}\b\s(?:is|looks|seems|must be)\s(?:the\s)?(?:correct|right|best|true|answer)",
    ]
    if label in labels and labels.index(label) < len(ORDINALS):
        ordinal = ORDINALS[labels.index(label)] + ("|last" if label == labels[-1] else "")
        patterns.append(rf"(?i:\b(?:{ordinal})\s(?:{OPTION_NOUN}|one|graph|figure|expression)\b)")
    return re.compile("|".join(patterns))


# --- 3. What excuses a mention ---


def contains(text: str, answer: Answer) -> bool:
    """Whether a text carries the answer's value, all parts of it, or its phrase."""
    quantities = find_quantities(text) if answer.quantities else []
    has_all_parts = all(any(is_same_quantity(part, other) for other in quantities) for part in answer.quantities)
    return bool(answer.quantities and has_all_parts or answer.phrase and answer.phrase.search(text))


def names_all_equally(cue: str, options: dict[str, str]) -> bool:
    """Whether the cue names each of the options, and all of them equally often: then it prefers none."""
    patterns = [phrase_pattern(text) for text in options.values()]
    counts = {len(pattern.findall(cue)) if pattern else 0 for pattern in patterns}
    return len(patterns) > 1 and len(counts) == 1 and counts != {0}


def find_excuse(cue: str, question: str, mention: Mention, answer: Answer, has_visible_text: bool) -> str | None:
    """Why the image may show what a mention states."""
    start, end, meaning = mention
    if meaning == "phrase" and answer.is_visible_attribute:
        return "it is an attribute that is seen directly"
    if meaning not in ("quantity", "phrase"):
        return None
    if is_read_off_scale(cue, start, end):
        return "the cue reads it off a scale"
    if not has_visible_text and is_presented_as_written(cue, start, end):
        return "the cue presents it as written in the image"
    is_word = meaning == "quantity" and cue[start:end].isalpha()
    if is_word and COUNTED.match(cue, end) and not ASKS_FOR_A_COUNT.search(question):
        return "it counts something that the question does not ask about"
    return None


def sentence_around(text: str, start: int, end: int) -> tuple[str, str]:
    """What stands before and behind `text[start:end]` in its sentence, up to `CONTEXT_CHARS` characters each."""
    before = re.split(r"[.!?;]\s|\n", text[max(0, start - CONTEXT_CHARS) : start])[-1]
    behind = re.split(r"[.!?;](?:\s|$)|\n", text[end : end + CONTEXT_CHARS])[0]
    return before, behind


def is_announced(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is presented as the answer."""
    before = text[max(0, start - CONTEXT_CHARS) : start]
    return bool(ANNOUNCED_BEFORE.search(before) or ANNOUNCED_BEHIND.match(sentence_around(text, start, end)[1]))


def governs(verb: re.Pattern, before: str) -> bool:
    """Whether the last such verb speaks of what follows `before`: no other statement begins in between."""
    matches = list(verb.finditer(before))
    return bool(matches) and not NEW_STATEMENT.search(before[matches[-1].end() :])


def is_presented_as_written(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is presented as something written in the image: "labelled 12", "reads '12'"."""
    before, behind = sentence_around(text, start, end)
    is_quoted = before.endswith(("'", '"')) and behind.lstrip(" .,").startswith(("'", '"'))
    return is_quoted or governs(WRITTEN_BEFORE, before) or WRITTEN_BEHIND.match(behind) is not None


def is_read_off_scale(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is presented as read off an axis, scale or dial: "the needle points to 30"."""
    before, behind = sentence_around(text, start, end)
    return governs(READ_OFF, before) and SCALE.search(f"{before} {behind}") is not None
