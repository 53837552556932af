"""Parse the options of a question, and find where a cue prefers one of them by its label."""

import re
from collections.abc import Iterator
from functools import lru_cache

from .number_words import ORDINALS
from .phrases import FUNCTION_WORDS, read_tokens


LABELS = ("ABCDEFGH", "abcdefgh", "123456789", ("I", "II", "III", "IV", "V", "VI"))
OPTION_START = re.compile(
    r"(?:(?<=[\s,;])|^)(?:\(([A-Ha-h1-9]|[IV]{1,3})\)|\[([A-H])\]|([A-Ha-h1-9]|[IV]{1,3})[.):](?=\s))\s?"
    r"|^([A-H])[ \t]*$",  # an option that is a figure has no text
    re.MULTILINE,
)
# "Which is it? A 4 B 5 C 6"
BARE_OPTION_START = re.compile(r"(?<=\s)([A-H])\s(?=\S)")
UNLABELLED_OPTIONS = re.compile(r"\b(?:options|choices|choose from|select from)\b.{0,20}?:", re.IGNORECASE)

OPTION_NOUN = r"(?:option|choice|answer|alternative|statement|candidate)"
# A cue may describe these by their letters, whether they are the right option or not
DESCRIBED_NOUN = (
    r"(?:figure|graph|diagram|picture|image|panel|shape|chart|plot|map|curve|net|object|animal|drawing|sketch|one)"
)
ASSERTION = r"(?:is|are|was|shows?|has|have|fits?|match(?:es)?|satisf(?:y|ies)|represents?|depicts?|gives?|contains?)"
# Words of a question that do not describe its subject
GENERAL_WORDS = FUNCTION_WORDS | frozenset(
    "which what who whose following these those one ones option options figure figures graph graphs diagram diagrams "
    "picture pictures image images shown drawn labelled marked given below above correct from by".split()
)


def split_options(question: str) -> tuple[str, dict[str, str]]:
    """Split a question into its stem and its options, keyed by label, or by number if they have no labels."""
    starts = _starts_of_options(OPTION_START.finditer(question))
    if len(starts) < 2 and (question_mark := question.find("?")) != -1:
        starts = _starts_of_options(BARE_OPTION_START.finditer(question, question_mark))
        if len(starts) < 3:
            starts = []
    if len(starts) >= 2:
        ends = [match.start() for match in starts[1:]] + [len(question)]
        texts = (question[match.end() : end].strip(" \n,;") for match, end in zip(starts, ends, strict=True))
        labels = (match[match.lastindex or 0].upper() for match in starts)
        return question[: starts[0].start()], dict(zip(labels, texts, strict=True))
    if match := UNLABELLED_OPTIONS.search(question):
        texts = filter(None, (text.strip(" '\"[]\n") for text in re.split(r"[,;\n]", question[match.end() :])))
        return question[: match.start()], {str(number): text for number, text in enumerate(texts, start=1)}
    return question, {}


def _starts_of_options(matches: Iterator[re.Match]) -> list[re.Match]:
    """The matches whose labels are consecutive: A, B, C."""
    starts: list[re.Match] = []
    for match in matches:
        if len(starts) < 6 and match[match.lastindex or 0] in [labels[len(starts)] for labels in LABELS]:
            starts.append(match)
    return starts


def find_label(label: str, labels: tuple[str, ...], cue: str, stem: str) -> Iterator[tuple[int, int]]:
    """Spans of a cue that prefer the option with this label."""
    prefers, asserts = _label_patterns(label, labels)
    yield from (match.span() for match in prefers.finditer(cue))
    asked = {token.base for token in read_tokens(stem) if token.word.lower() not in GENERAL_WORDS}
    for match in asserts.finditer(cue):
        # It prefers an option if it says about it what the question asks for: "figure B is a net of the cube"
        if any(token.base in asked for token in read_tokens(match["predicate"])):
            yield match.span("label")


@lru_cache(maxsize=1000)
def _label_patterns(label: str, labels: tuple[str, ...]) -> tuple[re.Pattern, re.Pattern]:
    """
    Patterns that find the label of an option where it cannot be the name of a point, a unit or an article: the first
    where the cue prefers the option, the second where it says something about it.
    """
    either_case = f"[{label}{label.lower()}]" if len(label) == 1 and label.isalpha() else label
    patterns = [
        rf"(?i:\b{OPTION_NOUN}s?\b(?:\s(?:is|must be|letter))?\s?[:=]?\s?)[(\['\"]?{either_case}\b",
        rf"(?i:\b(?:answer|it|letter|(?:correct|right|missing) \w+)\b.{{0,20}}?\b(?:is|be)\s|\b(?:choose|select"
        rf"|pick|go with|leaves|leaving)\s)[(\['\"]?{label}\b",
        rf"^\W{{0,3}}{label}\W{{0,3}}$|(?<!\w)(?<!\w\s)\({either_case}\)",
        rf"(?i:\b(?:fits?|match(?:es)?|it's|holds)\b.{{0,20}}?(?:\bis\b)?)\s[(\['\"]?{label}\b(?=\W*$|[.,;])",
        rf"\b{label}\b\)?\s(?:is|looks|seems|must be)\s(?:the\s)?(?:correct|right|best|true|answer)",
    ]
    if label in labels and labels.index(label) < len(ORDINALS):
        ordinal = ORDINALS[labels.index(label)] + ("|last" if label == labels[-1] else "")
        patterns.append(rf"(?i:\b(?:{ordinal})\s(?:{OPTION_NOUN}|one|graph|figure|expression)\b)")
    asserts = (
        rf"(?:(?i:\b{DESCRIBED_NOUN}s?\s|^|[.;,:]\s|\b(?:and|only|that|which)\s))\(?(?P<label>{label})\)?"
        rf"(?: and \(?[A-H]\)?)?\s{ASSERTION}\s(?P<predicate>[^.;!?,]{{1,60}})"
    )
    return re.compile("|".join(patterns)), re.compile(asserts)
