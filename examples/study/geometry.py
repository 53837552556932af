"""
Draws geometry diagrams for visual-cue distillation, with questions, cues, answers and worked solutions.

Six kinds of figures: two crossing chords, a right triangle, an isosceles triangle with its altitude, parallel lines
with a transversal, a bar chart, a line chart. Labels are placed at random, so the model must match labels to parts of
the figure before it can calculate, in one or two steps. Two label styles:

- `"direct"`: the figure shows the values;
- `"indirect"`: the figure shows letters, whose values the question gives; charts have ticks on an axis instead of
  values on their points.

The model is taught to state the cue and the calculation: "parts 6 and 4 cross 3 and x . 6 * 4 = 24 . 24 / 3 = 8 . the
answer is 8 .". Words, letters, numbers and signs are separated by spaces, for a tiny vocabulary.
"""

import hashlib
import io
import random
import re
from functools import cache
from typing import Any, NamedTuple

from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont


IMAGE_SIZE = 128  # pixels per side: 8x8 patches of 16 pixels, merged 2x2
PATCH = 16  # each label fits in one patch, give or take a pixel, so that a tiny vision tower can read it
TOKENS_PER_SIDE = IMAGE_SIZE // (2 * PATCH)
LENGTHS = range(2, 9)
CHART_VALUES = range(2, 12)
ANGLES = range(20, 75, 5)
LETTERS = "abcdkm"
STYLES = ("direct", "indirect")
ANSWER_PATTERN = re.compile(r"the answer is (\d+) \.")

Points = tuple[tuple[float, float], ...]


class Label(NamedTuple):
    """A text in a figure: the patch that shows it, and the part of the figure that it names."""

    text: str
    column: int
    row: int
    part: str


class Figure(NamedTuple):
    """A drawing, in pixels, and a question about it."""

    lines: list[Points]
    labels: list[Label]
    question: str
    cue: str
    steps: str
    answer: int
    bars: tuple[Points, ...] = ()
    circle: Points | None = None


class Scene(NamedTuple):
    """A figure of one kind and label style."""

    kind: str
    style: str
    figure: Figure

    @property
    def completion(self) -> str:
        return self.completion_ending_in(self.figure.answer)

    def completion_ending_in(self, answer: int | str) -> str:
        """The completion that the model is taught: the scene's evidence and calculation, then the answer."""
        return f"{self.figure.cue} . {self.figure.steps} . the answer is {answer} ."

    @property
    def label_tokens(self) -> list[int]:
        """For each label, the index of the visual token (of 2x2 patches, row by row) that shows it."""
        return [label.row // 2 * TOKENS_PER_SIDE + label.column // 2 for label in self.figure.labels]


# --- The kinds of figures ---


def label_names(rng: random.Random, style: str, values: list[int]) -> tuple[list[str], list[str], str]:
    """The values' labels in the figure, the recall of each in the calculation, and their values in the question."""
    if style == "direct":
        return [str(value) for value in values], [""] * len(values), ""
    pairs = list(zip(rng.sample(LETTERS, len(values)), values, strict=True))
    told = "".join(f" {name}={value}" for name, value in rng.sample(pairs, len(pairs)))
    return [name for name, _ in pairs], [f"{name}: {value} " for name, value in pairs], told


def sentence(*parts: str) -> str:
    """The parts with a full stop, or an empty string if they are all empty."""
    text = "".join(parts)
    return f"{text}. " if text else ""


def crossing_chords(rng: random.Random, style: str) -> Figure | None:
    first, second, third = rng.choice(LENGTHS), rng.choice(LENGTHS), rng.choice(LENGTHS)
    answer, rest = divmod(first * second, third)
    if rest != 0 or answer not in range(2, 37):
        return None
    (a, b, c), recalled, told = label_names(rng, style, [first, second, third])
    is_upright = rng.random() < 0.5
    chords = [[(4, 1), (4, 6)], [(1, 3), (6, 3)]] if is_upright else [[(2, 5), (5, 2)], [(2, 2), (5, 5)]]
    rng.shuffle(chords)
    known, partly_known = (sorted(chord) for chord in chords)
    c, d = rng.sample([c, "x"], 2)
    labels = [Label(a, *known[0], "known chord"), Label(b, *known[1], "known chord")]
    labels += [Label(c, *partly_known[0], "other chord"), Label(d, *partly_known[1], "other chord")]
    lean = rng.uniform(-4, 4)
    if is_upright:
        lines = [((64 - lean, 4), (64 + lean, 124)), ((4, 64 + lean), (124, 64 - lean))]
    else:
        lines = [((22 - lean, 22), (106 + lean, 106)), ((22, 106 + lean), (106, 22 - lean))]
    product = first * second
    steps = f"{sentence(*recalled)}{first} * {second} = {product} . {product} / {third} = {answer}"
    cue = f"parts {a} and {b} cross {c} and {d}"
    return Figure(lines, labels, f"how long is x ?{told}", cue, steps, answer, circle=((4, 4), (124, 124)))


def right_triangle(rng: random.Random, style: str) -> Figure:
    angle, side = rng.choice(ANGLES), rng.choice([*ANGLES, *LENGTHS])
    (angle_name, side_name), recalled, told = label_names(rng, style, [angle, side])
    places = rng.sample([(5, 6), (1, 2)], 2)
    labels = [Label(angle_name, *places[0], "angle"), Label("x", *places[1], "angle")]
    labels.append(Label(side_name, *rng.choice([(3, 6), (1, 4)]), "side"))
    near, far = 12 + rng.uniform(-3, 3), 116 + rng.uniform(-3, 3)
    lines = [((near, far), (far, far), (near, near), (near, far))]
    lines.append(((near, far - 9), (near + 9, far - 9), (near + 9, far)))  # marks the right angle
    figure = Figure(
        lines,
        labels,
        f"how large is x ?{told}",
        f"the angle is {angle_name} and the side is {side_name}",
        f"{sentence(recalled[0])}90 - {angle} = {90 - angle}",
        90 - angle,
    )
    return flip(figure, rng.random() < 0.5, rng.random() < 0.5)


def isosceles_triangle(rng: random.Random, style: str) -> Figure:
    half, angle = rng.choice([*ANGLES, *LENGTHS]), rng.choice(ANGLES)
    (half_name, angle_name), recalled, told = label_names(rng, style, [half, angle])
    labels = [Label(half_name, rng.choice((2, 5)), 6, "half"), Label(angle_name, rng.choice((1, 6)), 6, "angle")]
    top, left, right = 12 + rng.uniform(-4, 4), 10 + rng.uniform(-3, 3), 118 + rng.uniform(-3, 3)
    middle = (left + right) / 2
    lines = [((left, 114), (right, 114), (middle, top), (left, 114)), ((middle, top), (middle, 114))]
    if rng.random() < 0.5:
        question, answer = "how long is the base ?", 2 * half
        steps = f"{sentence(recalled[0])}2 * {half} = {answer}"
    else:
        question, answer = "how large is the apex ?", 180 - 2 * angle
        steps = f"{sentence(recalled[1])}2 * {angle} = {2 * angle} . 180 - {2 * angle} = {answer}"
    cue = f"the half is {half_name} and the angle is {angle_name}"
    return flip(Figure(lines, labels, question + told, cue, steps, answer), False, rng.random() < 0.5)


def parallel_lines(rng: random.Random, style: str) -> Figure:
    angle = rng.choice(ANGLES)
    (name,), recalled, told = label_names(rng, style, [angle])
    # The transversal leans to the right
    corners = {
        "upper": {"narrow": [(6, 1), (3, 2)], "wide": [(3, 1), (6, 2)]},
        "lower": {"narrow": [(4, 5), (1, 6)], "wide": [(1, 5), (4, 6)]},
    }
    here, there = rng.sample(sorted(corners), 2)
    width = rng.choice(("narrow", "wide"))
    labels = [Label(name, *rng.choice(corners[here]["narrow"]), "narrow")]
    labels.append(Label("x", *rng.choice(corners[there][width]), width))
    lean = rng.uniform(-3, 3)
    lines = [((4, 32), (124, 32)), ((4, 96), (124, 96)), ((90 + lean, 4), (38 - lean, 124))]
    if width == "narrow":
        steps, answer = f"x = {angle}", angle
    else:
        steps, answer = f"180 - {angle} = {180 - angle}", 180 - angle
    steps = sentence(recalled[0]) + steps
    cue = f"angle {name} is narrow and x is {width}"
    figure = Figure(lines, labels, f"how large is x ?{told}", cue, steps, answer)
    return flip(figure, rng.random() < 0.5, False)


def chart(rng: random.Random, style: str) -> tuple[list[str], list[int], list[float], list[Label], list[Points]]:
    """Three names, their values and heights (pixels from the top), labels and axes of a bar or line chart."""
    names = rng.sample(LETTERS, 3)
    columns = (2, 4, 6)
    axes = [((18, 6), (18, 111), (124, 111))]
    if style == "direct":
        values = [rng.choice(CHART_VALUES) for _ in names]
        heights = [111 - 8.0 * value for value in values]
        rows = [int(height - 12) // PATCH for height in heights]
        of_names = [f"of {name}" for name in names]
        labels = [Label(str(v), *place) for v, *place in zip(values, columns, rows, of_names, strict=True)]
    else:
        start, step = rng.choice(range(1, 5)), rng.choice(range(2, 5))
        ticks = [start + 2 * step, start + step, start]  # from the top, like the rows of labels
        rows = [rng.choice(range(3)) for _ in names]
        values = [ticks[row] for row in rows]
        heights = [24.0 + 32 * row for row in rows]
        labels = [Label(str(tick), 0, 1 + 2 * row, "tick") for row, tick in enumerate(ticks)]
        axes += [((18, 24 + 32 * row), (124, 24 + 32 * row)) for row in range(3)]
    labels += [Label(name, column, 7, f"at {v}") for name, column, v in zip(names, columns, values, strict=True)]
    return names, values, heights, labels, axes


def bar_chart(rng: random.Random, style: str) -> Figure | None:
    names, values, heights, labels, axes = chart(rng, style)
    more, less = rng.sample(range(3), 2)
    answer = values[more] - values[less]
    if answer <= 0:
        return None
    bars = tuple(((32 * i + 32, height), (32 * i + 48, 111)) for i, height in enumerate(heights))
    return Figure(
        axes,
        labels,
        f"how much more is {names[more]} than {names[less]} ?",
        f"{names[more]} is {values[more]} and {names[less]} is {values[less]}",
        f"{values[more]} - {values[less]} = {answer}",
        answer,
        bars=bars,
    )


def line_chart(rng: random.Random, style: str) -> Figure | None:
    names, values, heights, labels, axes = chart(rng, style)
    start, end = sorted(rng.sample(range(3), 2))
    answer = values[end] - values[start]
    if answer <= 0:
        return None
    return Figure(
        [*axes, tuple((32 * i + 40, height) for i, height in enumerate(heights))],
        labels,
        f"how much does it rise from {names[start]} to {names[end]} ?",
        f"it is {values[start]} at {names[start]} and {values[end]} at {names[end]}",
        f"{values[end]} - {values[start]} = {answer}",
        answer,
    )


def flip(figure: Figure, horizontally: bool, vertically: bool) -> Figure:
    """Mirrors lines and label positions."""

    def moved(x: float, y: float, size: float) -> tuple[float, float]:
        return size - x if horizontally else x, size - y if vertically else y

    last = IMAGE_SIZE // PATCH - 1
    return figure._replace(
        lines=[tuple(moved(x, y, IMAGE_SIZE) for x, y in line) for line in figure.lines],
        labels=[Label(text, *moved(column, row, last), part) for text, column, row, part in figure.labels],
    )


KINDS = {
    "crossing chords": crossing_chords,
    "right triangle": right_triangle,
    "isosceles triangle": isosceles_triangle,
    "parallel lines": parallel_lines,
    "bar chart": bar_chart,
    "line chart": line_chart,
}
# Combinations of figure and label style that are only drawn for the out-of-domain test
OUT_OF_DOMAIN = (("isosceles triangle", "indirect"), ("line chart", "indirect"))
IN_DOMAIN = tuple((kind, style) for kind in KINDS for style in STYLES if (kind, style) not in OUT_OF_DOMAIN)


def sample_scene(rng: random.Random, combinations: tuple[tuple[str, str], ...]) -> Scene:
    """Samples a scene of one of the given combinations of kind and style, whose answer is not shown by chance."""
    kind, style = rng.choice(combinations)
    while True:
        figure = KINDS[kind](rng, style)
        if figure is None:
            continue
        shown = {*figure.question.split(), *(label.text for label in figure.labels)}
        # Angles at parallel lines are equal or add up to 180
        if str(figure.answer) not in shown or kind == "parallel lines":
            return Scene(kind, style, figure)


# --- Images ---


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def draw(scene: Scene, rng: random.Random, scale: int = 2) -> PILImage.Image:
    """Draws a scene `scale` times as large and shrinks it, which smooths the lines."""
    figure = scene.figure
    image = PILImage.new("L", (IMAGE_SIZE * scale, IMAGE_SIZE * scale), 255)
    pen = ImageDraw.Draw(image)

    def scaled(points: Points) -> list[tuple[float, float]]:
        return [(x * scale, y * scale) for x, y in points]

    if figure.circle is not None:
        pen.ellipse(scaled(figure.circle), outline=0, width=scale)
    for bar in figure.bars:
        pen.rectangle(scaled(bar), fill=190, outline=0, width=scale)
    for line in figure.lines:
        pen.line(scaled(line), fill=90, width=scale, joint="curve")
    for label in figure.labels:
        x, y = ((place + 0.5) * PATCH * scale + rng.uniform(-1, 1) * scale for place in (label.column, label.row))
        pen.rectangle((x - 7 * scale, y - 6 * scale, x + 7 * scale, y + 6 * scale), fill=255)
        pen.text((x, y), label.text, fill=0, font=font(12 * scale), anchor="mm")
    return image.resize((IMAGE_SIZE, IMAGE_SIZE), PILImage.Resampling.BOX).convert("RGB")


# --- Splits ---


class Split(NamedTuple):
    """Rows, seed, combinations of kind and style, and the range (in percent) of all labellings to draw from."""

    rows: int
    seed: int
    combinations: tuple[tuple[str, str], ...]
    labellings: range


# A labelling is a kind of figure with its texts, their positions and the question. The splits' labellings are disjoint
# ("test" and "test_ood" share theirs, but no combination); the base's images are taken from the split "vision".
SPLITS = {
    "vision": Split(8000, 0, IN_DOMAIN, range(0, 40)),
    "distillation": Split(4000, 1, IN_DOMAIN, range(40, 80)),
    "validation": Split(200, 2, IN_DOMAIN, range(80, 88)),
    "test": Split(600, 3, IN_DOMAIN, range(88, 100)),
    "test_ood": Split(300, 4, OUT_OF_DOMAIN, range(88, 100)),
}


def labelling(scene: Scene) -> str:
    return repr((scene.kind, scene.style, sorted(scene.figure.labels), scene.figure.question))


def sample_split(split: str) -> list[tuple[Scene, PILImage.Image]]:
    """The scenes of a split, and their images."""
    rows, seed, combinations, labellings = SPLITS[split]
    rng = random.Random(seed)
    drawn = []
    while len(drawn) < rows:
        scene = sample_scene(rng, combinations)
        if hashlib.blake2b(labelling(scene).encode(), digest_size=4).digest()[0] * 100 // 256 in labellings:
            drawn.append((scene, draw(scene, rng)))
    return drawn


def load_geometry(split: str) -> Dataset:
    """
    Draws one split as a dataset with the columns `prompt`, `images`, `cue`, `answer`, `kind`, `style`,
    `visible_text` (the labels, for the audit) and `evidence_tokens` (the visual tokens that show them).

    Args:
        split (`str`):
            `"vision"`, for the base model; `"distillation"`; `"validation"`, for learning rates; `"test"`; or
            `"test_ood"`, combinations of figure and label style that no other split has.
    """
    rows: list[dict[str, Any]] = []
    for scene, image in sample_split(split):
        png = io.BytesIO()
        image.save(png, "PNG")
        rows.append(
            {
                "prompt": [{"role": "user", "content": scene.figure.question}],
                "images": [{"bytes": png.getvalue(), "path": None}],
                "cue": scene.figure.cue,
                "answer": str(scene.figure.answer),
                "kind": scene.kind,
                "style": scene.style,
                "visible_text": [label.text for label in scene.figure.labels],
                "evidence_tokens": scene.label_tokens,
            }
        )
    text = Value("string")
    features = {"prompt": List({"role": text, "content": text}), "images": List(Image(mode="RGB"))}
    features |= {"cue": text, "answer": text, "kind": text, "style": text}
    features |= {"visible_text": List(text), "evidence_tokens": List(Value("int64"))}
    return Dataset.from_list(rows, features=Features(features))
