"""Fold text into one notation for what looks or means the same. All audit checks read folded text."""

import re
import unicodedata


# Invisible characters, which could disguise a number or a control token
INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
# Invisible twins of the ASCII characters, which a language model may still read
TAG_CHARACTERS = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
# NFKC would turn "1½" into "11/2" and "º" into "o"
BEFORE_NFKC = str.maketrans({"º": "°", "˚": "°"} | {part: f" {part}" for part in "¼½¾⅐⅑⅒⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞"})
LOOK_ALIKES = str.maketrans("−‐‑⁄∕·∙’‘“”", "---//⋅⋅''\"\"")
EN_DASH = re.compile(r"(?<=\d)\s?–\s?(?=\d)|–(?=\d)")
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
    (re.compile(r"-\s?\\?\$(?=\d)"), "-"),
    (re.compile(r"\\[,;:!()\[\] ]|\$|\\(?=[%#&_])"), " "),
]
NOTATIONS = [
    (re.compile(r"(?<=\d)(\s?)pi\b"), r"\1π"),
    (re.compile(r"\bsqrt\s?(?=\()"), "√"),
    (re.compile(r"(?<=\d)(\s?)[xX](\s?)(?=\d)"), r"\1×\2"),
    (re.compile(r"\b([a-zA-Z]) (?:(squared)|cubed)\b"), lambda match: f"{match[1]}^{2 if match[2] else 3}"),
    # 1.299,00
    (
        re.compile(r"(?<![\d.,])\d{1,3}(?:\.\d{3}){1,4},\d\d(?!\d)"),
        lambda match: match[0].translate(str.maketrans(".,", ",.")),
    ),
]


def fold_text(text: str) -> str:
    """
    Fold the text into one notation for what looks or means the same: no invisible characters, no full-width forms, no
    LaTeX markup around plain symbols.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁻⁺]+", lambda match: "^" + match[0].translate(SUPERSCRIPTS), text)
        text = unicodedata.normalize("NFKC", text.translate(TAG_CHARACTERS).translate(BEFORE_NFKC))
        text = EN_DASH.sub("-", INVISIBLE.sub("", text.translate(LOOK_ALIKES)))
    if any(character in text for character in "\\${"):
        for pattern, replacement in LATEX_FOLDS:
            text = pattern.sub(replacement, text)
    for pattern, replacement in NOTATIONS:
        text = pattern.sub(replacement, text)
    return text
