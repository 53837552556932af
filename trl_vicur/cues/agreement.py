"""Do two cues say the same thing? Compares their words, numbers and labels, ignoring order and wording."""

import math
import re
import unicodedata
from decimal import Decimal


SAME_MEANING = 0.5  # smallest F1 of two cues with the same meaning

# Whole numbers and words; single characters of scripts without spaces
TOKEN = re.compile(
    r"(?:(?<![\w)\]])-)?\d+(?:,\d{3})*(?:\.\d+)?|[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])[^\W\d_])+\d*"
)
# An article before a word, where a sentence begins; "point A is" names a label
LEADING_ARTICLE = re.compile(r"(?<!\w )(?<!, )\bA(?= [a-z])")
# Words that only connect other words, or only announce what can be seen
FUNCTION_WORDS = frozenset(
    """a an the this that these those there it its they them their he she his her is are was were be been being has
    have had do does and or but with without of in on at to from by for as into onto than then so also which who whose
    where while both each one image picture photo figure diagram show shows shown showing display displays displayed
    see seen visible appear appears depict depicts depicted contain contains label labels labelled labeled mark marks
    marked write written read reads say says name named call called value colour color shape locate located position
    positioned place placed""".split()
)
SYNONYMS = {
    "center": "centre",
    "middle": "centre",
    "gray": "grey",
    "upper": "top",
    "lower": "bottom",
    "beneath": "below",
    "underneath": "below",
    "under": "below",
} | {
    word: str(number)
    for number, word in enumerate("two three four five six seven eight nine ten eleven twelve".split(), start=2)
}
# Words that contradict each other when said of the same thing, as numbers and labels do
ALTERNATIVES = frozenset(
    """red orange yellow green blue purple violet pink brown black white grey gold silver cyan teal magenta
    left right top bottom centre above below inside outside
    circle square rectangle triangle pentagon hexagon octagon oval ellipse star cube sphere cone cylinder""".split()
)


def content_tokens(text: str) -> frozenset[str]:
    """
    The content of a cue: its content words in lower case and singular, numbers in one notation (12, 12.0, twelve), and
    labels (AB, x1, O) as written.
    """
    text = " ".join(unicodedata.normalize("NFKC", text.replace("−", "-")).split())
    tokens = set()
    for token in TOKEN.findall(LEADING_ARTICLE.sub("", text)):
        if token[-1].isdigit() and token.lstrip("-")[0].isdigit():
            tokens.add(f"{Decimal(token.replace(',', '')).normalize():f}")
            continue
        if token.isupper() or token[-1].isdigit():
            tokens.add(token)
            continue
        folded = token.casefold()
        word = SYNONYMS.get(folded) or folded
        if word in FUNCTION_WORDS:
            continue
        is_plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
        tokens.add(word[:-1] if is_plural else word)
    return frozenset(tokens)


def agreement(first: frozenset[str], second: frozenset[str]) -> float:
    """
    How much two cues agree: F1 of their [`content_tokens`], between 0 and 1.

    Content that only one of them has lowers the score; the order and wording of sentences do not matter. Embedding or
    fluency metrics would rate "AB is 5" as close to "AB is 6", although the 5 is the point of the cue.
    """
    if not first and not second:
        return 1.0
    return 2 * len(first & second) / (len(first) + len(second))


def same_meaning(first: frozenset[str], second: frozenset[str]) -> bool:
    """
    Whether two cues mean the same; used instead of the entailment model of semantic entropy. They do if most of their
    content is the same and they do not contradict each other: at most one of them has numbers, labels, colours, places
    or shapes that the other lacks.
    """
    contradict = any(map(_is_value, first - second)) and any(map(_is_value, second - first))
    return not contradict and agreement(first, second) >= SAME_MEANING


def _is_value(token: str) -> bool:
    return token in ALTERNATIVES or token.isupper() or token[-1].isdigit()


def semantic_entropy(samples: list[frozenset[str]]) -> float:
    """
    *Semantic entropy* of samples, in nats: the entropy over their meanings, not their wordings (Kuhn et al. 2023,
    arXiv 2302.09664, Algorithm 1, with equal weights). A sample joins the first cluster whose first sample has the
    [`same_meaning`].

    It is `0` if all samples mean the same and `log(len(samples))` if no two do. With few samples it is low; with a
    single one it is always `0`.
    """
    meanings: list[list[frozenset[str]]] = []
    for sample in samples:
        for meaning in meanings:
            if same_meaning(meaning[0], sample):
                meaning.append(sample)
                break
        else:
            meanings.append([sample])
    shares = [len(meaning) / len(samples) for meaning in meanings]
    return sum(-share * math.log(share) for share in shares)
