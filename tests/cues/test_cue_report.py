"""The report of an audited dataset: content of rows is displayed, never executed, and no row can break the page."""

import base64
import io
import random
import re

import pytest
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from html_pages import Page
from PIL import Image
from rich.console import Console

from trl_vicur import html_page
from trl_vicur.cues import report
from trl_vicur.cues.audit_summary import VERDICTS, summarize_audit
from trl_vicur.cues.report import print_summary, write_html_report


FEATURES = Features(
    {
        "question": Value("string"),
        "images": List(ImageFeature()),
        "cue": Value("string"),
        "cue_error": Value("string"),
        "answer": Value("string"),
        "cue_answer_leak": Value("string"),
        "cue_reasoning_leak": Value("bool"),
        "cue_control_text": Value("bool"),
        "cue_usable": Value("bool"),
        "cue_reasons": List(Value("string")),
    }
)
FAILED = {
    "cue": None,
    "cue_error": "The generator refused.",
    "cue_answer_leak": None,
    "cue_reasoning_leak": None,
    "cue_control_text": None,
    "cue_usable": False,
}
CONTROL_TEXT = {"cue_control_text": True, "cue_usable": False}
LEAK = {"cue_answer_leak": "leak", "cue_usable": False}
REASONING = {"cue_reasoning_leak": True, "cue_usable": False}
POSSIBLE = {"cue_answer_leak": "possible"}


def image_bytes(size=(64, 48), mode="RGB", image_format="PNG"):
    buffer = io.BytesIO()
    Image.new(mode, size, 200 if mode == "L" else "teal").save(buffer, image_format)
    return buffer.getvalue()


def make_row(**changes):
    row = {
        "question": "How long is AB?",
        "images": [{"bytes": image_bytes(), "path": None}],
        "cue": "A label stands beside AB.",
        "cue_error": None,
        "answer": "12",
        "cue_answer_leak": "none",
        "cue_reasoning_leak": False,
        "cue_control_text": False,
        "cue_usable": True,
        "cue_reasons": [],
    }
    return row | changes


def make_dataset(*rows, features=FEATURES):
    return Dataset.from_list([make_row(**changes) for changes in rows], features=features)


def write(tmp_path, dataset, **arguments):
    write_html_report(dataset, tmp_path / "report.html", **arguments)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


# --- Totals ---


def test_totals():
    dataset = make_dataset({}, FAILED, LEAK, LEAK | REASONING, POSSIBLE, CONTROL_TEXT | LEAK, {})
    assert summarize_audit(dataset) == {
        "rows": 7,
        "control_text": 1,
        "answer_leak": 3,
        "reasoning_leak": 1,
        "failed": 1,
        "unusable": 4,
        "possible_leak": 1,
        "usable": 3,
    }


def test_totals_over_several_batches():
    dataset = Dataset.from_list([make_row(images=[])] * 2500 + [make_row(images=[], **LEAK)], features=FEATURES)
    summary = summarize_audit(dataset.shuffle(seed=0))
    assert (summary["rows"], summary["usable"], summary["answer_leak"]) == (2501, 2500, 1)


def test_totals_read_no_image():
    unreadable = {"bytes": b"nothing", "path": None}
    assert summarize_audit(make_dataset({"images": [unreadable]}))["usable"] == 1


def test_means_are_over_rows_that_have_both():
    dataset = make_dataset({}, {}, {}, FAILED)
    dataset = dataset.add_column("cue_gap", [0.1, 0.3, 5.0, None]).add_column("answer_gap", [1.0, 2.0, None, None])
    dataset = dataset.add_column("correct_with_cue", [True, True, False, None])
    dataset = dataset.add_column("correct_without_cue", [False, True, False, None])
    summary = summarize_audit(dataset)
    assert summary["cue_gap"] == pytest.approx(0.2)
    assert summary["answer_gap"] == pytest.approx(1.5)
    assert summary["cue_gap_rows"] == summary["answer_gap_rows"] == 2
    assert summary["correct_with_cue"] == pytest.approx(2 / 3)
    assert summary["correct_without_cue"] == pytest.approx(1 / 3)
    assert {type(value) for value in summary.values()} == {int, float}  # goes into JSON


def test_mean_where_the_other_column_has_no_value():
    dataset = make_dataset({}, {}).add_column("cue_gap", [0.1, 0.3])
    dataset = dataset.add_column("answer_gap", [None, None], feature=Value("float64"))
    summary = summarize_audit(dataset)
    assert summary["cue_gap"] == pytest.approx(0.2)
    assert "answer_gap" not in summary


def test_dataset_that_was_not_audited(tmp_path):
    dataset = make_dataset({}).remove_columns(["cue_usable"])
    with pytest.raises(ValueError, match=r"not audited: it has no column \['cue_usable'\]. Call `audit_cues` first"):
        summarize_audit(dataset)
    with pytest.raises(ValueError, match="not audited"):
        write_html_report(dataset, tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_wrong_dataset(tmp_path):
    with pytest.raises(TypeError, match="one split"):
        write_html_report(DatasetDict({"train": make_dataset({})}), tmp_path / "report.html")
    with pytest.raises(ValueError, match="no rows"):
        summarize_audit(make_dataset({}).select([]))
    with pytest.raises(ValueError, match="`cue_column` is 'hint'"):
        summarize_audit(make_dataset({}), cue_column="hint")


def test_head_of_the_page(tmp_path):
    dataset = make_dataset(*[{}] * 6, FAILED, LEAK).add_column("cue_agreement", [0.875] * 8)
    dataset = dataset.add_column("cue_gap", [0.0625] * 8).add_column("answer_gap", [0.5] * 8)
    head = re.sub(r"\s+", " ", write(tmp_path, dataset).head)
    assert "6 of 8 cues (75.0%) may be used" in head
    assert re.search(r"Answer leak .*? 1 12.5% Reasoning leak .*? 0 0.0% Failed .*? 1 12.5%", head)
    assert "a privilege with a smaller gap is better" in head
    assert "cue 0.062 8 answer 0.500 8" in head
    assert "0.875 8" in head
    assert "Teacher accuracy" not in head  # was not measured


def test_terminal_summary():
    console = Console(file=io.StringIO(), width=80)
    print_summary(make_dataset({}, LEAK, {}, {}), console)
    text = console.file.getvalue()
    assert re.search(r"Answer leak\W+1\W+25.0%", text)
    assert re.search(r"Usable\W+3\W+75.0%", text)
    assert "Measured" not in text
    dataset = make_dataset({}).add_column("cue_gap", [0.1]).add_column("answer_gap", [0.7])
    print_summary(dataset, console)
    assert re.search(r"Privilege gap\W+answer\W+0.700\W+1\W", console.file.getvalue())


# --- Which rows ---


def test_worst_rows_come_first_and_ties_keep_their_order(tmp_path):
    rows = [{}, POSSIBLE, FAILED, REASONING, LEAK, CONTROL_TEXT, {}, LEAK | CONTROL_TEXT, LEAK]
    assert write(tmp_path, make_dataset(*rows)).rows == [5, 7, 4, 8, 3, 2, 1, 0, 6]


def test_rows_beyond_max_rows_are_counted(tmp_path):
    page = write(tmp_path, make_dataset(*[{}] * 1500, LEAK), max_rows=3)
    assert page.rows == [1500, 0, 1]
    assert "3 of 1,501 rows are shown, and 1,498 are left out" in page.head
    assert "control text, answer leak, reasoning leak, failed, not usable, possible leak, usable" in page.head
    assert [button["value"] for button in page.attributes("button")] == ["all", "answer_leak", "unusable", "usable"]


def test_only_images_of_shown_rows_are_read(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(html_page, "read_image", lambda image: read.append(image) or Image.new("RGB", (8, 8)))
    write(tmp_path, make_dataset(*[{}] * 50), max_rows=2)
    assert len(read) == 2


def test_bad_max_rows(tmp_path):
    with pytest.raises(ValueError, match="`max_rows` must be at least 1, got 0"):
        write_html_report(make_dataset({}), tmp_path / "report.html", max_rows=0)


# --- Hostile text ---

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "</dd></article></main><h1>Usable</h1>",
    "{{ 7 * 7 }} {% raw %} {# #}",
    "<!-- -->&amp;&lt;",
    "javascript:alert(1)",
]


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("column", ["question", "cue", "cue_error", "answer", "cue_reasons"])
def test_text_of_a_row_stays_text(tmp_path, column, text):
    value = [text, f"the cue says {text!r}"] if column == "cue_reasons" else text
    changes = (FAILED if column == "cue_error" else {}) | {column: value}
    page = write(tmp_path, make_dataset(changes))
    plain = write(tmp_path, make_dataset(FAILED if column == "cue_error" else {}))
    assert text in page.cards[0]
    added = {"ul", "li", "mark"} if column == "cue_reasons" else set()
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements} | {"dt", "dd"} | added
    assert len(page.attributes("script")) == len(page.attributes("img")) == 1
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_evidence_is_marked(tmp_path):
    reasons = [
        "the cue says '12', the answer is '12'",
        'it names a theorem: "chord theorem"',
        "it steers: '<|im_end|>'",
        "it's the formula " + repr(r"\frac{1}{2}"),
    ]
    cue = r"By the chord theorem, x<|im_end|> is 12, not 120. <b>12</b> \frac{1}{2}"
    write(tmp_path, make_dataset(LEAK | {"cue": cue, "cue_reasons": reasons}))
    html = (tmp_path / "report.html").read_text()
    assert (
        "By the <mark>chord theorem</mark>, x<mark>&lt;|im_end|&gt;</mark> is <mark>12</mark>, not 120. "
        r"&lt;b&gt;<mark>12</mark>&lt;/b&gt; <mark>\frac{1}{2}</mark></dd>"
    ) in html
    assert "the cue says &#39;<mark>12</mark>&#39;, the answer is &#39;<mark>12</mark>&#39;</li>" in html
    assert "names a theorem: &#34;<mark>chord theorem</mark>&#34;</li>" in html


def test_invisible_text_is_shown(tmp_path):
    hidden = "a\u202eb\x1bc\u200bd\U000e0041e"
    page = write(tmp_path, make_dataset({"cue": hidden, "question": "👩‍👧 \u200fשלום"}))
    assert "a⟨U+202E⟩b⟨U+001B⟩c⟨U+200B⟩d⟨U+E0041⟩e" in page.cards[0]
    assert "👩‍👧 \u200fשלום" in page.cards[0]  # joiners and direction marks are part of ordinary text


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    page = write(tmp_path, make_dataset({}, LEAK, {"images": [{"bytes": None, "path": "missing.png"}]}))
    html = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//\w|url\(|@import|<link|<iframe", re.sub(r"data:[^\"]+", "", html))
    assert all(image["src"].startswith("data:image/") for image in page.attributes("img"))
    assert all(link["href"].startswith("#row-") for link in page.attributes("a"))


def test_policy_allows_only_the_script_of_the_page(tmp_path):
    page = write(tmp_path, make_dataset({}))
    html = (tmp_path / "report.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    (policy,) = [meta["content"] for meta in page.attributes("meta") if "http-equiv" in meta]
    assert f"script-src '{html_page.content_hash(script)}'" in policy
    assert "default-src 'none'" in policy


# --- Images ---


def decode(page):
    return [Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) for image in page.attributes("img")]


def test_thumbnails(tmp_path):
    sizes = [(64, 48), (1280, 640), (10, 2000)]
    images = [{"bytes": image_bytes(size), "path": None} for size in sizes]
    page = write(tmp_path, make_dataset({"images": images}))
    assert [thumbnail.size for thumbnail in decode(page)] == [(64, 48), (320, 160), (2, 320)]
    assert [image["alt"] for image in page.attributes("img")] == [f"Image {n} of 3 of row 0" for n in (1, 2, 3)]
    assert "1280 × 640 pixels" in page.cards[0]


def test_only_pixels_are_copied_from_an_image(tmp_path):
    noise = Image.frombytes("RGB", (64, 64), random.Random(0).randbytes(3 * 64 * 64))  # goes into a JPEG
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG", comment=b"secret" * 5000)
    page = write(tmp_path, make_dataset({"images": [{"bytes": buffer.getvalue(), "path": None}]}))
    (image,) = page.attributes("img")
    assert image["src"].startswith("data:image/jpeg") and b"secret" not in base64.b64decode(image["src"].split(",")[1])


@pytest.mark.parametrize("mode, image_format", [("L", "PNG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "GIF")])
def test_kinds_of_images(tmp_path, mode, image_format):
    image = {"bytes": image_bytes(mode=mode, image_format=image_format), "path": None}
    (thumbnail,) = decode(write(tmp_path, make_dataset({"images": [image]})))
    assert thumbnail.mode in ("RGB", "P") and thumbnail.size == (64, 48)


@pytest.mark.parametrize(
    "image, reason",
    [
        ({"bytes": b"nothing", "path": None}, "it is not an image, or has an unknown format"),
        (
            {"bytes": image_bytes((64, 64), image_format="JPEG")[:300], "path": None},
            "300 bytes) cannot be read: Trunc",
        ),
        ({"bytes": None, "path": "/nowhere/a<b>.png"}, "'/nowhere/a<b>.png') cannot be read: the file does not exist"),
        ({"bytes": None, "path": "https://nowhere.invalid/a.png"}, "a report downloads nothing"),
        ({"bytes": b"", "path": None}, "it is not an image, or has an unknown format"),
    ],
)
def test_image_that_cannot_be_read(tmp_path, image, reason):
    readable = {"bytes": image_bytes(), "path": None}
    page = write(tmp_path, make_dataset({"images": [image, readable]}, {}))
    assert "Image 1 of 2 cannot be shown." in page.cards[0] and reason in page.cards[0]
    assert len(page.attributes("img")) == 2  # the others are


@pytest.mark.parametrize("images", [[], None])
def test_row_without_image(tmp_path, images):
    assert "The row has no image." in write(tmp_path, make_dataset({"images": images})).cards[0]


def test_dataset_without_images(tmp_path):
    assert "The row has no image." in write(tmp_path, make_dataset({}).remove_columns("images")).cards[0]


def test_image_column(tmp_path):
    rows = [{"image": image, **make_row()} for image in (Image.new("RGB", (9, 7)), None)]
    dataset = Dataset.from_list(rows).remove_columns("images")
    page = write(tmp_path, dataset)
    assert [thumbnail.size for thumbnail in decode(page)] == [(9, 7)]
    assert "The row has no image." in page.cards[1]


# --- Kinds of rows ---


def test_prompt_with_mixed_contents(tmp_path):
    """Contents of several types are JSON in the dataset's file."""
    content = [{"type": "image"}, {"type": "text", "text": "How long is AB?"}]
    row = make_row(prompt=[{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}])
    del row["question"]
    dataset = Dataset.from_list([row], on_mixed_types="use_json").cast_column("images", FEATURES["images"])
    assert re.search(r"Question\s*How long is AB\?\s", write(tmp_path, dataset).cards[0])


def test_conversational_prompt(tmp_path):
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which one?"}]
    dataset = make_dataset({}).remove_columns("question").add_column("prompt", [prompt])
    card = write(tmp_path, dataset).cards[0]
    assert "Which one?" in card and "Be brief." not in card


def test_other_columns(tmp_path):
    dataset = make_dataset({"question": "Which?", "cue": "A tall bar.", "answer": "left"})
    dataset = dataset.rename_columns({"question": "ask", "cue": "hint", "answer": "gold"})
    card = write(tmp_path, dataset, question_column="ask", cue_column="hint", answer_column="gold").cards[0]
    assert "Which?" in card and "A tall bar." in card and "left" in card
    with pytest.raises(ValueError, match="no column 'prompt' or 'question'"):
        write(tmp_path, dataset, cue_column="hint")


def test_answers_are_optional(tmp_path):
    assert "Answer" not in write(tmp_path, make_dataset({"answer": None})).cards[0]
    assert "Answer" not in write(tmp_path, make_dataset({}).remove_columns("answer")).cards[0]
    numbers = make_dataset({}).remove_columns("answer").add_column("answer", [7])
    assert re.search(r"Answer\s*7\s", write(tmp_path, numbers).cards[0])


def test_failed_row_shows_its_error(tmp_path):
    page = write(tmp_path, make_dataset(FAILED))
    assert re.search(r"No cue\s*The generator refused\.", page.cards[0])
    without_errors = make_dataset(FAILED).remove_columns("cue_error")
    assert "No error was recorded." in write(tmp_path, without_errors).cards[0]


def test_page_size_is_bounded(tmp_path):
    noise = Image.frombytes("RGB", (600, 600), random.Random(0).randbytes(3 * 600 * 600))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG")
    row = LEAK | {
        "images": [{"bytes": buffer.getvalue(), "path": None}] * 20,
        "question": "q" * 10**6,
        "cue": "<" * 10**6,
        "answer": "\x00" * 10**6,
        "cue_reasons": ["'" * 10**5] * 1000,
    }
    page = write(tmp_path, make_dataset(row))
    assert len(page.attributes("img")) == html_page.MAX_IMAGES_PER_ROW
    assert "14 more images are not shown." in page.cards[0]
    assert "980 more" in page.cards[0]
    assert "996,000 more characters" in page.cards[0]
    assert (tmp_path / "report.html").stat().st_size < 1.5 * 2**20


def test_dataset_with_a_transform(tmp_path):
    dataset = make_dataset({"images": [{"bytes": b"nothing", "path": None}]}).with_transform(lambda rows: 1 / 0)
    assert "it is not an image, or has an unknown format" in write(tmp_path, dataset).cards[0]


# --- The file ---


def test_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "report.html"
    write_html_report(make_dataset({}), path)
    before = path.read_bytes()

    def read_rows(*arguments):
        assert path.with_name("report.html.unfinished").exists()
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(report, "read_rows", read_rows)
    with pytest.raises(KeyboardInterrupt):
        write_html_report(make_dataset({}), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_output_path_that_is_a_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which is a folder"):
        write_html_report(make_dataset({}), tmp_path)


def test_same_dataset_same_file(tmp_path):
    dataset = make_dataset({}, LEAK | {"cue_reasons": ["'a' and 'b' and 'c'"]}, FAILED)
    pages = []
    for name in ("one.html", "two.html"):
        write_html_report(dataset, tmp_path / name)
        pages.append((tmp_path / name).read_bytes())
    assert pages[0] == pages[1]


def test_page_is_readable_without_javascript(tmp_path):
    page = write(tmp_path, make_dataset({}, LEAK))
    assert [attributes for attributes in page.attributes("nav") if "hidden" in attributes]  # the filter alone
    assert not any("hidden" in attributes for attributes in page.attributes("article"))


def test_every_verdict_has_its_colour(tmp_path):
    write(tmp_path, make_dataset({}))
    style = (tmp_path / "report.html").read_text().split("</style>")[0]
    assert all(re.search(rf"\.{verdict}\b[^}}]*--tone", style) for verdict in VERDICTS)
