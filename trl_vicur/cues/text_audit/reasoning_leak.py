"""Does a cue contain part of the solution: a theorem, a step, a conclusion, a formula, a computed value?"""

import re
from collections.abc import Iterator, Sequence

from .expressions import EXPRESSION, is_calculation
from .number_words import number_words_to_digits, skip_fill
from .presentation import is_announced, is_presented_as_written, is_read_off_scale, sentence_around
from .quantities import find_quantities, is_same_quantity


# Everyday words that also name theorems or steps (power, law, formula, sum, product, solution, line, count) are in
# these lists only in combination with words that make them part of a solution.
THEOREMS = (
    r"theorems?|lemma|corollary|postulate|axioms?|pythag\w+|soh[- ]?cah[- ]?toa|power of (?:a|the) point"
    r"|rise over run",
    r"(?:laws?|rules?|principle|conservation) of \w+|(?:ideal gas|inverse[- ]square) law",
    r"(?:(?:co)?sine|tangent|chain|product|quotient|power|sum|lever|\w+-hand|addition|multiplication) rule",
    r"\w+(?:'s?|s') (?:(?:\w+ )?laws?|formula|rule|principle|method|equation|inequality|identity)",
    r"(?:newton|ohm|kirchhoff|hooke|snell|boyle|coulomb|faraday|heron|thales|bayes|ptolemy|pascal|archimedes)'s?",
    r"(?:area|volume|perimeter|circumference|quadratic|distance|midpoint|slope|sum|interest|lens|mirror) formula",
    r"formulas? (?:for|gives|says|states)|trigonometric (?:identit\w+|ratios?)",
    r"by (?:the )?(?:symmetry|similarity|congruence|definition|proportionality|propert\w+)",
)
# General facts about figures are premises, not observations
GENERAL_FACTS = (
    r"(?:alternate|vertical|opposite|corresponding|base|inscribed|interior|exterior|adjacent)(?: interior| exterior)? "
    r"(?:angles|sides) (?:of [\w ]{1,30} )?are (?:always )?(?:equal|congruent|supplementary|complementary)",
    r"angles? (?:of|in) (?:a|any|every) \w+ (?:always )?(?:sum|add|is|are)|(?:sums?|adds?|adding) (?:up )?to",
    r"always (?:has|have|is|are|equals?|adds?)|in (?:the same|direct|inverse) proportion",
    r"the (?:squares?|square root|sum|product|quotient) of|the difference between|(?:are"
    r"|is) (?:inversely )?proportional",
    r"(?:distance|rise|mass|force|work|change|opposite|adjacent|side) over (?:the )?(?:time|run|volume|area|mass"
    r"|hypotenuse)",
    r"(?:length|base|width|height|rate|speed|mass|time|radius|area|price|number|side|voltage|current) (?:times"
    r"|multiplied by|divided by) (?:the |its )?\w+",
    r"half (?:of )?(?:the|its) (?:base|product|sum|perimeter|central|arc|difference|diameter|intercepted)",
    r"(?:tangents?|radii|chords|diagonals|medians) (?:from|of|to|in) (?:an?|any|every|one|the same) [^.;!?]{1,40}?"
    r"(?:equal|bisect|perpendicular|congruent)",
    r"(?:equals|is) (?:\w+ ){1,3}?(?:times(?! as\b)|divided by|multiplied by) (?:the )?[a-z]+",
)
STEP_VERB = (
    r"(?:add|subtract|multiply|divide|compute|calculate|solve|determine|compare|apply|substitute|plug|simplify"
    r"|rearrange|convert|evaluate|estimate|deduce|infer|recall|remember|consider|observe|use|find (?:the|x|out)"
    r"|count (?:the|all|how|up|both)|sum (?:up|the|all)|set (?:up|the|both)|take (?:the|half|all)"
    r"|square (?:both|the|each)|factor|let (?:\w|us)|equate|eliminate|combine|work (?:out|backwards)|read off"
    r"|(?:start|begin) (?:by|with|from)"
    r"|note that|notice that|check (?:whether|if|that|which)|draw (?:the|a)|extend the|look (?:at|for)|undo"
    r"|identify)\b(?!['\"]?\s(?:is|are|of|button|key)\b)"
)
STEP_GERUND = (
    r"(?:add|subtract|multiply|divid|summ|squar|equat|substitut|solv|simplify|comput|calculat|compar|count"
    r"|convert|tak|us|order|sort|arrang|halv|doubl|rearrang|cancell|factor|expand|isolat|plugg|insert)ing"
)
STEPS = (
    rf"(?:(?<=^)|(?<=[.!?:;\n,*-]\s)|(?<=\sand\s)|(?:first|then|next|finally|now|just|simply),?\s){STEP_VERB}",
    r"(?:we|one|you|let us) (?:needs?|must|have to|has to|should|can|could|gets?|obtain|know|find|use|want|conclude)"
    r"(?! (?:also |only )?(?:see|read|spot))|let's|to (?:find|get|obtain|compute|calculate|solve"
    r"|work out) (?:the|x|y|its)",
    r"(?:can|could|may|must|should|needs? to|has to) be (?:\w+ly )?(?:found|computed|calculated|obtained|derived"
    r"|determined|solved|deduced|concluded|added|subtracted|multiplied|divided|compared|counted)|it is (?:enough"
    r"|necessary) to",
    r"(?:using|applying|apply|via) (?:the )?(?:fact|similar\w*|propert\w+|rule|law|formula|definition|symmetry|ratios?"
    r"|proportions?|equation|sine|cosine|tangent|trigonometry|congruen\w+)|(?:key|next|first) (?:step|idea|trick) is",
    rf"(?:by|after|when) {STEP_GERUND}|(?:(?<=^)|(?<=[.!?:;,\n]\s)){STEP_GERUND} [^.!?;]{{1,60}}?(?:gives?"
    rf"|yields?|leaves?|puts?|makes?|results?|leads?|shows?|we)"
    r"|(?:(?<=^)|(?<=[.!?:;]\s))\w+ing [^.!?;,]{1,60}? (?:gives|yields|leaves|leads to|results in)"
    r"|setting [^.!?;]{1,40}?(?:equal|to zero|gives)",
)
RESULT_NOUN = (
    r"(?:total|sum|area|force|length|angle|answer|result|value|current|speed|height|volume|ratio|difference"
    r"|probability|perimeter|slope|average|mean|product|distance|hypotenuse|third|other)"
)
CONCLUSIONS = (
    # A premise and its consequence
    r"(?:(?<=^)|(?<=[.!?;]\s))(?:since|because|as the) (?!of\b)[^.!?;,]{3,80}? (?:is|are|equals?) [^.!?;,]{1,60}, \w+",
    r"(?:similar|congruent) by \w+|(?:half|a third|a quarter|double|twice) (?:of )?\d+(?:\.\d+)? (?:is|=|makes"
    r"|equals)",
    r"[∴⇒⟹]|therefore|hence|thus(?! named| far)|consequently|(?:it|this) follows|as a result|in conclusion"
    r"|impl(?:ies|ying)",
    r"because(?! of)|(?<=, )so(?! (?:that|far|called|as|on|much|many|to)\b)|(?<=, )that is,? (?:about )?-?\d+"
    r"|i\.e\.,? \W?\d+|thereby|accordingly|as a consequence|for this reason"
    r"|(?<=, )making (?:it|them|this|that|the|its)|(?<=, )(?:giving|leaving|yielding) -?\W?\d+|which leaves",
    r"if [^.;!?]{1,60}, then",
    r"(?:this|that|which|it) (?:means|shows|proves|tells us|indicates) that|which makes|meaning that|that makes \d+",
    r"(?:must|ha(?:s|ve) to) (?:\w+ ){0,2}?(?:be|equal|match|agree|sum|add|total|have|lie|hold|cover|meet|measure|cost"
    r"|weigh|contain)|must therefore|(?:gives?|yields?|results? in) (?:the \w+|us|\w{1,3} =|-?\d+)",
    rf"(?<!and )so,? (?:yes|no|we|it (?:must|is|equals)|they (?:are|must)|the (?:\w+ )?{RESULT_NOUN}"
    r"|\w{1,4} (?:=|must|equals|is (?:\d+|equal))|∠)",
)
RESULTS = (
    r"(?:the|its|their) (?:\w+ )?(?:total|sum|average|mean|median|product|remainder)(?: [^.;!?]{1,50}?)?"
    r" (?:is|are|=|equals|comes to|amounts to) -?\d+|the average of [^.;!?]{1,50}? is",
    r"(?:come|amount|add up|total|work out|sum up)s? to (?:about |exactly |just )?-?\W?\d+",
    r"on average[^.;!?]{0,30}? is",
    r"an? (?:difference|total|product|gap|surplus|remainder) of -?\W?\d+|leaves? an? remainder"
    r"|(?:shared|divided|split) (?:equally |evenly )?among",
    r"(?:in total|altogether|combined),? (?:\w+ ){0,4}\d+|the (?:average|difference|total) is|\d+ (?:minus|plus"
    r"|times) \w+",
    r"\d+(?:\.\d+)?\s{1,20}(?:\w+ )?(?:more|less|fewer|greater|higher|lower|larger|longer|shorter|older|younger)"
    r" (?:\w+ ){0,3}than",
)
RESULT = "states the result of a calculation"
WORDINGS = [
    (kind, re.compile(rf"(?<!\w)(?:{'|'.join(wordings)})(?!\w)", re.IGNORECASE))
    for kind, wordings in (
        ("names a theorem, law or formula", THEOREMS),
        ("states a general fact", GENERAL_FACTS),
        ("gives a step of the solution", STEPS),
        ("draws a conclusion", CONCLUSIONS),
        (RESULT, RESULTS),
    )
]
# A portrait of Newton does not name a law
DEPICTED = re.compile(r"\b(?:portrait|bust|statue|picture|poster|photo|name) of (?:\w+ )?$", re.IGNORECASE)
# "The match ended 3-1" is not a difference
SCORE = re.compile(r"\b(?:scores?|match|game|won|wins?|lead|ended|beat|drew)\b", re.IGNORECASE)
QUOTATION = re.compile(r"(?<![\w'])'[^'\n]{1,200}'(?!\w)|\"[^\"\n]{1,200}\"")
EXPRESSIONS = re.compile(EXPRESSION)
VARIABLE = re.compile(r"(?<![a-zA-Z\\])[a-zA-Zα-ορ-ω](?![a-zA-Z])")
RANGE = re.compile(r"(\d+(?:\.\d+)?)\s?-\s?(\d+(?:\.\d+)?)")
# "a 3 × 4 grid" is a format, not a product
FORMAT = re.compile(r"\s?-?(?:grid|table|matrix|array|board|pixels?|squares?|blocks?|rows?|checkerboard|tiles?)\b")
# If the labels are unknown, "AB = 2x" may be a label, and "the curve y = x^2" the name of a curve
READING = re.compile(r"(?:\b[A-Z∠△]{2,4}|\b(?:curve|line|graph|parabola|function|circle)\s(?:of\s)?\S{1,4})\s?=\s?$")
# Formulas without an operator between numbers: words, functions, products of letters (F = ma), degrees
OTHER_FORMULAS = re.compile(
    r"\b[a-zA-Zθ]{2,} ?(?:=|equals) ?(?:\d+(?:/\d+)? ?[×*]? ?)?[a-z]{2,} ?[-+*/×⋅÷] ?[a-z]{2,}|\b(?:sin|cos|tan|log"
    r"|ln)\s?\S{1,8}\s?=|\b\d?π[rd]\b|\b[A-Z] ?= ?(?:[a-z]{2}|[A-Z]{2}|nRT)(?![a-zA-Z])"
    r"|\d° ?[-+] ?\d+|\bequals? \d?\("
)
STATED = re.compile(
    r"(?:\b(?:is|equals?|measures?|covers?|comes to|amounts to|has an? (?:\w+ )?(?:area|length|width|height"
    r"|radius) of)\s(?:about |approximately |exactly )?|=\s?)$"
)


def find_reasoning_leak(cue: str, question: str, visible_text: Sequence[str] = ()) -> list[str]:
    """
    Find parts of the solution in a cue. All texts must be folded by [`fold_text`].

    Args:
        cue (`str`):
            The cue.
        question (`str`):
            The question.
        visible_text (`Sequence[str]`, *optional*, defaults to `()`):
            Texts in the image; empty if they are unknown.

    Returns:
        `list[str]`: One sentence for each kind, which quotes its first match; empty if there is none.
    """

    def hide_if_written(match: re.Match) -> str:
        return " " * len(match[0]) if is_presented_as_written(cue, match.start(), match.end()) else match[0]

    description = QUOTATION.sub(hide_if_written, cue)
    in_digits = number_words_to_digits(description)
    labels, shown = " ; ".join(visible_text), " ; ".join([*visible_text, question])
    reasons = []
    for kind, wording in WORDINGS:
        found = (
            description[match.start() : skip_fill(in_digits, match.end())].strip()
            for match in wording.finditer(in_digits if kind == RESULT else description)
            if not DEPICTED.search(description[max(0, match.start() - 40) : match.start()])
        )
        if piece := next((piece for piece in found if piece.lower() not in labels.lower()), None):
            reasons.append(f"the cue {kind}: {piece!r}")
    if piece := next(find_formulas(cue, shown, bool(visible_text)), None):
        reasons.append(f"the cue holds the formula or calculation {piece!r}, and no label is known to show it")
    if visible_text and (piece := next(find_computed_values(cue, shown), None)):
        reasons.append(f"the cue states the value {piece!r}, and no label shows it")
    return reasons


def find_formulas(cue: str, shown: str, has_visible_text: bool) -> Iterator[str]:
    """Yield calculations and equations that are not labels in the image."""
    text = number_words_to_digits(cue)
    found = list(OTHER_FORMULAS.finditer(text))
    for match in EXPRESSIONS.finditer(text):
        before, after = text[max(0, match.start() - 40) : match.start()], text[match.end() : match.end() + 20]
        is_left_side, is_right_side = after.lstrip().startswith("="), before.rstrip().endswith("=")
        if VARIABLE.search(match[0]):
            is_reading = not has_visible_text and READING.search(before)
            is_formula = (is_left_side or is_right_side and not is_reading) and re.search(r"\w\W*\w", match[0])
        elif limits := RANGE.fullmatch(match[0]):
            is_formula = is_left_side or float(limits[1]) > float(limits[2]) and not SCORE.search(before)
        else:
            is_formula = is_calculation(match[0]) and not FORMAT.match(after)
            is_formula = is_formula or is_left_side and re.search(r"\d[^\d.,]+\d", match[0])
        if is_formula:
            found.append(match)
    shown = re.sub(r"[\s{}]", "", shown)
    for match in found:
        is_label = re.sub(r"[\s{}]", "", match[0]) in shown or is_presented_as_written(cue, *match.span())
        if not is_label:
            yield cue[match.start() : match.end()]


def find_computed_values(cue: str, shown: str) -> Iterator[str]:
    """Yield values that the cue states as facts but no label shows."""
    labels = find_quantities(shown)
    for quantity in find_quantities(cue):
        span = quantity.start, quantity.end
        before, _ = sentence_around(cue, *span)
        is_seen = (
            any(is_same_quantity(label, quantity) for label in labels)
            or is_read_off_scale(cue, *span)
            or quantity.value == 90
            and quantity.unit == "degree"  # by its square mark
        )
        if STATED.search(before) and not is_seen and not is_announced(cue, *span):
            yield cue[quantity.start : quantity.end]
