"""Could the student find the evidence by itself? Cues that are sampled from image and question alone tell."""

import math
import re
import unicodedata
from decimal import Decimal
from functools import partial
from itertools import groupby
from pathlib import Path

from datasets import Dataset, Value
from tqdm.auto import tqdm

from ..data.columns import check_columns, check_dataset, find_image_column, find_question_column, set_column
from ..data.dataset_digest import dataset_digest
from ..generation import ChatRequest, Generator
from ..generation.response_store import open_store
from .audit_summary import mean_of_columns
from .generate import check_cue, read_messages
from .prompts import CUE_PROMPT, CuePrompt


STORE_NAME = "recoverability.sqlite"
SAME_MEANING = 0.5  # smallest F1 of two cues of one meaning

# Numbers are taken whole; words of scripts without spaces by the character
TOKEN = re.compile(
    r"(?:(?<![\w)\]])-)?\d+(?:,\d{3})*(?:\.\d+)?|[\u3040-\u30ff\u3400-\u9fff]|(?:(?![\u3040-\u30ff\u3400-\u9fff])[^\W\d_])+\d*"
)
# An article before a word, where a sentence begins; "point A is" names a label
LEADING_ARTICLE = re.compile(r"(?<!\w )(?<!, )\bA(?= [a-z])")
# Words that hold a sentence together, or only announce what is seen
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
# Words that exclude each other where they are said of the same thing, as numbers and labels do
ALTERNATIVES = frozenset(
    """red orange yellow green blue purple violet pink brown black white grey gold silver cyan teal magenta
    left right top bottom centre above below inside outside
    circle square rectangle triangle pentagon hexagon octagon oval ellipse star cube sphere cone cylinder""".split()
)


def measure_recoverability(
    dataset: Dataset,
    generator: Generator,
    output: str | Path | None = None,
    num_samples: int = 4,
    prompt: CuePrompt = CUE_PROMPT,
    question_column: str | None = None,
    cue_column: str = "cue",
    seed: int = 0,
) -> Dataset:
    """
    Estimate how far a cue S follows from the student's own input X, which makes it recoverable (ViCuR, Sec. 3.1).

    Cues are sampled from the images and the question alone. Where they agree with the used cue, whoever sees the image
    finds the same evidence; where they disagree among themselves, the cue holds what the image does not settle. Their
    entropy estimates H(S | X) as *semantic entropy* does (Kuhn et al. 2023, arXiv 2302.09664): that of the shares of
    meanings, not of wordings, among the samples. Each sample joins the first meaning whose first cue it has the
    [`same_meaning`] as. With few samples the estimate is low, and it cannot exceed `log(num_samples)`.

    Each sample is on disk as soon as it is there: after an interruption, the same call goes on with what is left.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, a question and a cue.
        generator ([`Generator`]):
            What samples, with a temperature above zero. The student's own model tells what the student could find; the
            model that made the cues, how well the image determines them.
        output (`str` or `Path`, *optional*):
            Folder for the samples, in the file `recoverability.sqlite`. Without it, they are not kept.
        num_samples (`int`, *optional*, defaults to `4`):
            Samples per row, at least two.
        prompt ([`CuePrompt`], *optional*, defaults to `CUE_PROMPT`):
            What the generator is asked.
        question_column (`str`, *optional*):
            Column with the questions, strings or conversational prompts. By default `prompt` or, if there is none,
            `question`.
        cue_column (`str`, *optional*, defaults to `"cue"`):
            Column with the cues. Rows without a cue are left out.
        seed (`int`, *optional*, defaults to `0`):
            Sample `j` of row `i` has the seed `seed + i * num_samples + j`.

    Returns:
        [`~datasets.Dataset`]: The dataset with the columns

        - `cue_agreement` (`float` between 0 and 1): mean over the samples of their [`agreement`] with the cue. `None`
          where there is no cue or all samples failed.
        - `cue_entropy` (`float`, in nats): `0` where all samples have one meaning, `log(num_samples)` where no two
          have. `None` where there is no cue or fewer than two samples succeeded, of which it would always be `0`.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If a column is missing, if the generator does not sample, if `num_samples` is below two, or if
            `output` was begun with other settings or another dataset.
        [`GeneratorUnavailableError`]: If no request can succeed.
        `OSError`: If the disk is full.
    """
    check_dataset(dataset)
    check_columns(dataset, cue_column=cue_column)
    question_column = find_question_column(dataset, question_column)
    inputs = dataset.select_columns([question_column, find_image_column(dataset)])
    temperature = generator.settings["temperature"]
    if not temperature > 0.0:
        raise ValueError(
            f"The generator's `temperature` is {temperature}, so that all its samples would be the same text. Give it "
            "one above zero, e.g. `temperature=1.0`."
        )
    if num_samples < 2:
        raise ValueError(f"`num_samples` must be at least 2 to compare samples, got {num_samples}.")
    settings = {
        **generator.settings,
        "prompt_version": prompt.version,
        "prompt": [prompt.system, prompt.user],
        "num_samples": num_samples,
        "seed": seed,
        "question_column": question_column,
        "cue_column": cue_column,
        "rows": len(dataset),
        "dataset": dataset_digest(dataset.select_columns([*inputs.column_names, cue_column])),
    }
    cues = dataset.select_columns([cue_column]).with_format(None)
    has_cue = bytearray(bool((cue or "").strip()) for cue in cues[cue_column])
    agreements, entropies = [None] * len(dataset), [None] * len(dataset)
    with open_store(output, STORE_NAME, settings) as store:
        requests = (
            ChatRequest(
                number,
                partial(read_messages, inputs, number // num_samples, question_column, prompt),
                seed + number,
            )
            for number in store.pending(len(dataset) * num_samples)
            if has_cue[number // num_samples]
        )
        total, (num_done, _) = sum(has_cue) * num_samples, store.count()
        with tqdm(total=total, initial=num_done, desc="Sampling cues", unit="sample") as progress:
            for response in generator.generate(requests):
                store.add([check_cue(response)], seed + response.number)
                progress.update()
        for row, responses in groupby(store, key=lambda response: response[0] // num_samples):
            samples = [content_tokens(text) for _, text, _, _ in responses if text is not None]
            if samples:
                cue = content_tokens(cues[row][cue_column])
                agreements[row] = sum(agreement(cue, sample) for sample in samples) / len(samples)
            if len(samples) > 1:
                entropies[row] = semantic_entropy(samples)
    for name, values in (("cue_agreement", agreements), ("cue_entropy", entropies)):
        dataset = set_column(dataset, name, values, Value("float64"))
    return dataset


def summarize_recoverability(dataset: Dataset) -> dict[str, int | float]:
    """
    The means of `cue_agreement` and of `cue_entropy` (in nats) over the rows that have them, and under the same names
    with `_rows` behind, the number of these.
    """
    return mean_of_columns(dataset, ["cue_agreement"]) | mean_of_columns(dataset, ["cue_entropy"])


def content_tokens(text: str) -> frozenset[str]:
    """
    What a cue is about: its words but for function words and those that only announce, in lower case and singular;
    numbers in one notation (12, 12.0, twelve); labels (AB, x1, O) as they are written.
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
        word = token.casefold()
        word = SYNONYMS.get(word, word)
        if word in FUNCTION_WORDS:
            continue
        is_plural = len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
        tokens.add(word[:-1] if is_plural else word)
    return frozenset(tokens)


def agreement(first: frozenset[str], second: frozenset[str]) -> float:
    """
    How far two cues say the same: F1 of their [`content_tokens`], between 0 and 1.

    It counts statements that only one of them makes against both, without regard to order and wording of sentences.
    Measures of fluency or of embeddings would put "AB is 5" beside "AB is 6", where a cue is all about the 5.
    """
    if not first and not second:
        return 1.0
    return 2 * len(first & second) / (len(first) + len(second))


def same_meaning(first: frozenset[str], second: frozenset[str]) -> bool:
    """
    Whether two cues have one meaning, in place of the entailment model of semantic entropy: most of their content is
    the same, and they do not contradict each other, as where each has a number, a label, a colour, a place or a shape
    that the other lacks.
    """
    contradict = any(map(_is_value, first - second)) and any(map(_is_value, second - first))
    return not contradict and agreement(first, second) >= SAME_MEANING


def _is_value(token: str) -> bool:
    return token in ALTERNATIVES or token.isupper() or token[-1].isdigit()


def semantic_entropy(samples: list[frozenset[str]]) -> float:
    """Entropy of the meanings of samples, in nats (Kuhn et al. 2023, Algorithm 1; samples have equal weights)."""
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
