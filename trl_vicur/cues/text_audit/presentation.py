"""How does a cue present part of its text: as the answer, as written in the image, or as read off a scale?"""

import re


# Length of the text before and after a span that is searched, in characters
CONTEXT_CHARS = 160

# The cue presents something as the answer
ANNOUNCED_BEFORE = re.compile(
    r"(?:\b(?:answers?|(?:final )?result|response)\b[^.!?;]{0,30}?(?:\b(?:is|are|be|equals)\b|[:=])"
    r"|\b(?:correct|right) (?:answer|option|choice|one|value|statement)\b.{0,15}?(?:\bis\b|:)|\bmust (?:be|equal)\b"
    r"|\bboxed\b|####|<answer>)[^.!?;,]{0,25}$|\banswer $"
    r"|\b(?:(?:sought|wanted|requested|required|desired) \w+|asked (?:about|for))"
    r" ?(?:is|are|=|:) ?$",
    re.IGNORECASE,
)
ANNOUNCED_AFTER = re.compile(
    r"[^.!?;,]{0,25}?\b(?:is|are|was|as|be|fits)\s(?:\w+\s){0,2}"
    r"(?:correct\b|right (?:answer|one|choice|option)|(?:final )?answer\b)"
    r"|\s(?:as )?the (?:final |correct |right )?(?:result|answer|solution|response)\b",
    re.IGNORECASE,
)
# The cue presents something as written in the image …
WRITTEN_BEFORE = re.compile(
    r"\b(?:label(?:l?ed|l?ing|s)?|mark(?:ed|ing|s(?! the))?|reads?|reading|written(?! by)|inscri(?:bed|ptions?)"
    r"|annotated|numbered|caption(?:s|ed)?|titled?|headed|headings?|tag(?:ged)?|text|words?|says|lists?|bears(?= $)"
    r"|bearing|stamped|engraved(?! by)|(?<!the )(?<!a )(?:painted(?! by)|print(?:ed|s)?(?! in $))|displays?"
    r"|displayed|shows?(?= ?(?:the (?:number|value|text|word|letter)|['\"\d]))|number(?! of))\b",
    re.IGNORECASE,
)
WRITTEN_AFTER = re.compile(
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
    r"\b(?:(?:reach|point|read|show|indicat|stand|end|ris|extend|climb|fall|drop|com|lie|stop|settl|rest|sit|align|touch"
    r"|peak|meet|cross|go|run|start|stretch|hover)\w*|level with)\b",
    re.IGNORECASE,
)
# … unless another statement begins in between: "AB is labelled 12 and BC is 5"
NEW_STATEMENT = re.compile(
    r"\b(?:is|are|was|were|has|have|equals?|measures?|costs?|weighs?|needs?|takes?|lasts?|would|so|which"
    r"|with probability)\b|\band\b.*=",
    re.IGNORECASE,
)


def sentence_around(text: str, start: int, end: int) -> tuple[str, str]:
    """The text before and after `text[start:end]` in its sentence, up to `CONTEXT_CHARS` characters each."""
    before = re.split(r"[.!?;]\s|\n", text[max(0, start - CONTEXT_CHARS) : start])[-1]
    after = re.split(r"[.!?;](?:\s|$)|\n", text[end : end + CONTEXT_CHARS])[0]
    return before, after


def is_announced(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is presented as the answer."""
    before = text[max(0, start - CONTEXT_CHARS) : start]
    if text[start].isdigit() and before.endswith("solution is "):  # "the solution is blue" may be about a flask
        return True
    return bool(ANNOUNCED_BEFORE.search(before) or ANNOUNCED_AFTER.match(sentence_around(text, start, end)[1]))


def governs(verb: re.Pattern, before: str) -> bool:
    """Whether the last match of `verb` refers to the text after `before`: no other statement begins in between."""
    matches = list(verb.finditer(before))
    return bool(matches) and not NEW_STATEMENT.search(before[matches[-1].end() :])


def is_presented_as_written(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is presented as something written in the image: "labelled 12", "reads '12'"."""
    before, after = sentence_around(text, start, end)
    is_quoted = before.endswith(("'", '"')) and after.lstrip(" .,").startswith(("'", '"'))
    return is_quoted or governs(WRITTEN_BEFORE, before) or WRITTEN_AFTER.match(after) is not None


def is_read_off_scale(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is presented as read off an axis, scale or dial: "the needle points to 30"."""
    before, after = sentence_around(text, start, end)
    return governs(READ_OFF, before.rpartition(":")[2]) and SCALE.search(f"{before} {after}") is not None
