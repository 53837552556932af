"""Layouts of vision-language datasets, as they are found on the Hub and in the repositories of other trainers."""

import base64
import json
from io import BytesIO

import pytest
from datasets import Dataset, IterableDataset
from tiny_models import make_image

from trl_vicur.data.images import read_image
from trl_vicur.data.layouts import read_layout
from trl_vicur.data.rows import row_images


QUESTION = "What is the value of x?"
IMAGE = make_image(0)


def png(image=IMAGE) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


BASE64 = base64.b64encode(png()).decode()


def user(text: str = QUESTION, num_images: int = 1) -> dict:
    return {"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": text}]}


def turns(*pairs: tuple[str, str], keys: tuple[str, str] = ("role", "content")) -> list[dict]:
    return [dict(zip(keys, pair, strict=True)) for pair in pairs]


def llava(*pairs: tuple[str, str]) -> list[dict]:
    return turns(*pairs, keys=("from", "value"))


SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
ASKED, ANSWERED = ("user", QUESTION), ("assistant", "5")

# Name, a row, its prompt, its number of images, its answer
LAYOUTS = [
    # Conversations
    ("messages", {"messages": turns(ASKED, ANSWERED), "images": [IMAGE]}, [user()], 1, "5"),
    ("messages, one image", {"messages": turns(ASKED, ANSWERED), "image": IMAGE}, [user()], 1, "5"),
    ("messages without answer", {"messages": turns(ASKED), "images": [IMAGE]}, [user()], 1, None),
    (
        "messages with a column for the answer",
        {"messages": turns(ASKED), "images": [IMAGE], "answer": "5"},
        [user()],
        1,
        "5",
    ),
    (
        "messages with a rationale and an answer",
        {"messages": turns(ASKED, ("assistant", "x is 5.")), "images": [IMAGE], "answer": "5"},
        [user()],
        1,
        "5",
    ),
    ("text only", {"messages": turns(ASKED, ANSWERED)}, [user(num_images=0)], 0, "5"),
    (
        "ms-swift",
        {"messages": turns(("user", f"<image>{QUESTION}"), ANSWERED), "images": ["a.png"]},
        [user()],
        1,
        "5",
    ),
    (
        "ms-swift, two images",
        {"messages": turns(("user", f"<image><image>{QUESTION}"), ANSWERED), "images": ["a.png", "b.png"]},
        [user(num_images=2)],
        2,
        "5",
    ),
    (
        "ms-swift, image behind the text",
        {"messages": turns(("user", f"{QUESTION}<image>"), ANSWERED), "images": ["a.png"]},
        [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image"}]}],
        1,
        "5",
    ),
    (
        "ms-swift, images as dicts",
        {"messages": turns(("user", f"<image>{QUESTION}"), ANSWERED), "images": [{"bytes": png(), "path": None}]},
        [user()],
        1,
        "5",
    ),
    (
        "ms-swift, query and response",
        {"query": f"<image>{QUESTION}", "response": "5", "images": ["a.png"]},
        [user()],
        1,
        "5",
    ),
    (
        "ms-swift, history",
        {"query": QUESTION, "response": "5", "history": [["Look.", "I do."]], "images": ["a.png"]},
        [
            user("Look."),
            {"role": "assistant", "content": [{"type": "text", "text": "I do."}]},
            user(num_images=0),
        ],
        1,
        "5",
    ),
    (
        "ms-swift, ShareGPT",
        {"conversation": [{"human": f"<image>{QUESTION}", "assistant": "5"}], "images": ["a.png"]},
        [user()],
        1,
        "5",
    ),
    (
        "ms-swift, ShareGPT with a system prompt",
        {"system": "Be brief.", "conversation": [{"human": f"<image>{QUESTION}", "assistant": "5"}], "image": "a.png"},
        [SYSTEM, user()],
        1,
        "5",
    ),
    (
        "LLaVA",
        {"id": "1", "image": "a.png", "conversations": llava(("human", f"<image>\n{QUESTION}"), ("gpt", "5"))},
        [user()],
        1,
        "5",
    ),
    (
        "LLaVA, image after the text",
        {"image": "a.png", "conversations": llava(("human", f"{QUESTION}\n<image>"), ("gpt", "5"))},
        [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image"}]}],
        1,
        "5",
    ),
    (
        "LLaVA, several rounds",
        {
            "image": "a.png",
            "conversations": llava(("human", "<image>\nLook."), ("gpt", "I do."), ("human", QUESTION), ("gpt", "5")),
        },
        [
            user("Look."),
            {"role": "assistant", "content": [{"type": "text", "text": "I do."}]},
            user(num_images=0),
        ],
        1,
        "5",
    ),
    (
        "LLaVA, system turn",
        {
            "image": "a.png",
            "conversations": llava(("system", "Be brief."), ("human", f"<image>{QUESTION}"), ("gpt", "5")),
        },
        [SYSTEM, user()],
        1,
        "5",
    ),
    (
        "LLaVA-OneVision",
        {"id": "1", "image": IMAGE, "conversations": llava(("human", QUESTION), ("gpt", "5")), "data_source": "x"},
        [user()],
        1,
        "5",
    ),
    (
        "LLaVA, conversations as JSON",
        {"image": "a.png", "conversations": json.dumps(llava(("human", f"<image>\n{QUESTION}"), ("gpt", "5")))},
        [user()],
        1,
        "5",
    ),
    (
        "ShareGPT4V",
        {"image": "a.png", "conversations": llava(("human", f"{QUESTION}\n<image>"), ("gpt", "5"))},
        [{"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image"}]}],
        1,
        "5",
    ),
    (
        "LLaMA-Factory, sharegpt",
        {"messages": turns(("user", f"<image>{QUESTION}"), ANSWERED), "images": ["mllm_demo_data/1.jpg"]},
        [user()],
        1,
        "5",
    ),
    (
        "LLaMA-Factory, conversations with roles",
        {"conversations": turns(("user", f"<image>{QUESTION}"), ANSWERED), "images": ["a.png"]},
        [user()],
        1,
        "5",
    ),
    (
        "LLaMA-Factory, alpaca",
        {"instruction": QUESTION, "input": "Use the picture.", "output": "5", "images": ["a.png"]},
        [user(f"{QUESTION}\nUse the picture.")],
        1,
        "5",
    ),
    (
        "LLaMA-Factory, alpaca with an empty input and a system prompt",
        {"instruction": QUESTION, "input": "", "output": "5", "system": "Be brief.", "images": ["a.png"]},
        [SYSTEM, user()],
        1,
        "5",
    ),
    # Images within the messages
    (
        "OpenAI, image_url",
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
                        {"type": "text", "text": QUESTION},
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "5"}]},
            ]
        },
        [user()],
        1,
        "5",
    ),
    (
        "Qwen-VL, paths in blocks",
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": QUESTION}]},
                {"role": "assistant", "content": [{"type": "text", "text": "5"}]},
            ]
        },
        [user()],
        1,
        "5",
    ),
    (
        "Qwen-VL, tags in the text",
        {"conversations": llava(("user", f"Picture 1: <img>a.png</img>\n{QUESTION}"), ("assistant", "5"))},
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Picture 1:"},
                    {"type": "image"},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ],
        1,
        "5",
    ),
    (
        "Hugging Face VLM cookbook",
        {
            "images": [IMAGE],
            "messages": [
                {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]},
                {"role": "assistant", "content": [{"type": "text", "text": "5"}]},
            ],
        },
        [user()],
        1,
        "5",
    ),
    (
        "the_cauldron",
        {"images": [IMAGE], "texts": [{"user": QUESTION, "assistant": "5", "source": "x"}]},
        [user()],
        1,
        "5",
    ),
    (
        "a prompt in JSON",
        {"prompt": json.dumps(turns(ASKED)), "answer": "5", "images": [IMAGE]},
        [user()],
        1,
        "5",
    ),
    # Questions
    ("question, answer, image", {"question": QUESTION, "answer": "5", "image": IMAGE}, [user()], 1, "5"),
    (
        "problem, answer, images (Geometry3K)",
        {"problem": f"<image>{QUESTION}", "answer": "5", "images": [IMAGE]},
        [user()],
        1,
        "5",
    ),
    ("problem, solution, image", {"problem": QUESTION, "solution": "5", "image": IMAGE}, [user()], 1, "5"),
    (
        "problem, solution and answer",
        {"problem": QUESTION, "solution": "x + 1 = 6, so x = 5", "answer": "5", "image": IMAGE},
        [user()],
        1,
        "5",
    ),
    ("prompt as text", {"prompt": QUESTION, "completion": "5", "image": IMAGE}, [user()], 1, "5"),
    ("ChartQA", {"query": QUESTION, "label": ["5"], "human_or_machine": 0, "image": IMAGE}, [user()], 1, "5"),
    (
        "DocVQA",
        {"questionId": "1", "question": QUESTION, "answers": ["five", "5", "5"], "image": IMAGE},
        [user()],
        1,
        "5",
    ),
    (
        "VQAv2",
        {
            "question": QUESTION,
            "answers": [
                {"answer": "5", "answer_id": 1},
                {"answer": "6", "answer_id": 2},
                {"answer": "5", "answer_id": 3},
            ],
            "image": IMAGE,
        },
        [user()],
        1,
        "5",
    ),
    ("numeric answer", {"question": QUESTION, "answer": 5, "image": IMAGE}, [user()], 1, "5"),
    (
        "MMMU",
        {
            "question": f"<image 1> {QUESTION}",
            "options": "['4', '5']",
            "answer": "B",
            "image_1": IMAGE,
            "image_2": None,
        },
        [user(f"{QUESTION}\nA. 4\nB. 5")],
        1,
        "B",
    ),
    (
        "MMMU, two images",
        {
            "question": f"<image 1> or <image 2>? {QUESTION}",
            "options": "[]",
            "answer": "5",
            "image_1": IMAGE,
            "image_2": IMAGE,
        },
        [
            {
                "role": "user",
                "content": [
                    {"type": "image"},
                    {"type": "text", "text": "or"},
                    {"type": "image"},
                    {"type": "text", "text": f"? {QUESTION}"},
                ],
            }
        ],
        2,
        "5",
    ),
    (
        "ScienceQA",
        {"question": QUESTION, "choices": ["4", "5"], "answer": 1, "image": IMAGE},
        [user(f"{QUESTION}\nA. 4\nB. 5")],
        1,
        "B",
    ),
    # Images in other forms
    ("image_path", {"question": QUESTION, "answer": "5", "image_path": "a.png"}, [user()], 1, "5"),
    ("image_url", {"question": QUESTION, "answer": "5", "image_url": "https://example.com/a.png"}, [user()], 1, "5"),
    ("base64", {"question": QUESTION, "answer": "5", "image": BASE64}, [user()], 1, "5"),
    (
        "bytes and path",
        {"question": QUESTION, "answer": "5", "image": {"bytes": png(), "path": "a.png"}},
        [user()],
        1,
        "5",
    ),
    (
        "WebDataset",
        {"__key__": "1", "__url__": "x.tar", "png": IMAGE, "json": {"question": QUESTION, "answer": "5"}},
        [user()],
        1,
        "5",
    ),
    (
        "WebDataset with conversations",
        {
            "__key__": "1",
            "__url__": "x.tar",
            "jpg": IMAGE,
            "json": {"conversations": llava(("human", f"<image>\n{QUESTION}"), ("gpt", "5"))},
        },
        [user()],
        1,
        "5",
    ),
]


def without_none(messages: list[dict]) -> list[dict]:
    """Arrow gives all blocks the same keys."""
    return [
        {
            **message,
            "content": [
                {key: value for key, value in block.items() if value is not None} for block in message["content"]
            ],
        }
        for message in messages
    ]


@pytest.mark.parametrize("kind", ["dataset", "stream"])
@pytest.mark.parametrize(
    "row, prompt, num_images, answer", [each[1:] for each in LAYOUTS], ids=[each[0] for each in LAYOUTS]
)
def test_layouts(tmp_path, kind, row, prompt, num_images, answer):
    for name in ("a.png", "b.png", "mllm_demo_data/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png())
    rows = [row, row]
    dataset = Dataset.from_list(rows) if kind == "dataset" else IterableDataset.from_generator(lambda: iter(rows))
    dataset, layout = read_layout(dataset, folder=tmp_path)
    assert layout.describe().startswith("read as ")
    read = list(dataset)[1]
    assert without_none(read["prompt"]) == prompt
    images = row_images(read)
    assert len(images) == num_images
    assert read.get("answer") == answer
    if "image_url" not in row:
        assert all(read_image(image).tobytes() == IMAGE.tobytes() for image in images)


@pytest.mark.parametrize(
    "row, columns, message",
    [
        (
            {"text": "A cat.", "image": IMAGE},
            None,
            "No column of the dataset is known to hold prompts; it has `image`",
        ),
        (
            {"messages": turns(ASKED), "conversations": llava(("human", QUESTION)), "image": IMAGE},
            None,
            r"Several columns could hold the prompt: `conversations` \(list\), `messages` \(list\)",
        ),
        ({"question": QUESTION, "problem": QUESTION}, None, "Several columns could hold the prompt"),
        ({"prompt": QUESTION, "messages": turns(ASKED)}, None, "Several columns could hold the prompt"),
        (
            {"question": QUESTION, "solution": "5", "response": "6"},
            None,
            "Several columns could hold the answer.*--columns answer=solution",
        ),
        ({"question": QUESTION, "image_path": "a", "img": IMAGE}, None, "Several columns could hold the images"),
        ({"question": QUESTION}, {"prompt": "q"}, "`columns` names 'q' for 'prompt', but the dataset has `question`"),
        ({"question": QUESTION}, {"question": "q"}, "`columns` has the key 'question', expected one of"),
        ({"question": "  "}, None, "Row 0: `question` is '  ', expected the text of a question"),
        ({"messages": "What?"}, None, "Row 0: `messages`: expected turns of a conversation, got 'What\\?'"),
        ({"messages": [{"role": "judge", "content": "?"}]}, None, "turn 0 has the role 'judge', expected one of"),
        (
            {"messages": [{"speaker": "user", "text": "?"}]},
            None,
            "turn 0 has the keys .*expected 'role' and 'content'",
        ),
        (
            {"messages": turns(("user", "<image><image>?")), "images": [IMAGE]},
            None,
            r"Row 0: `messages` has places for 2 image\(s\), but the row has 1",
        ),
        (
            {"conversations": llava(("human", "<img>a.png</img>?")), "images": [IMAGE]},
            None,
            r"contains 1 image\(s\), but .* holds 1 as well",
        ),
        ({"question": QUESTION, "options": "A or B"}, None, "Row 0: `options` is 'A or B', expected a list"),
        ({"question": QUESTION, "options": "'abc'"}, None, "Row 0: `options` is 'abc', expected a list"),
        ({"question": QUESTION, "options": {"A": "4", "B": "5"}}, None, "Row 0: `options` is {.*, expected a list"),
        ({"question": QUESTION, "options": ["4"] * 27}, None, "Row 0: `options` is .* at most 26 choices"),
        ({"question": QUESTION, "options": ["4", "5"], "answer": -1}, None, "Row 0: The answer is -1, .* from 0 to 1"),
        ({"question": QUESTION, "answers": {"text": ["5"]}}, None, "Row 0: The answer is {.*expected a text"),
        ({"question": QUESTION}, {"prompt": "question", "answer": "question"}, "names 'question' more than once"),
        (
            {"question": "<image 2> or <image 1>?", "image_1": IMAGE, "image_2": IMAGE},
            None,
            r"Row 0: the text refers to its images in the order \[2, 1\]",
        ),
        ({"messages": turns(("system", "?"), ASKED), "system": "!"}, None, "Row 0: `messages` starts with a system"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]},
            None,
            "Row 0: `messages`: turn 0 has 'tool_calls', which cannot be read",
        ),
        (
            {"messages": [{"role": "user", "content": "?", "images": ["a.png"]}]},
            None,
            "Row 0: `messages`: turn 0 has 'images'",
        ),
    ],
)
def test_what_is_not_recognized_is_refused_with_what_was_seen(row, columns, message):
    with pytest.raises(ValueError, match=message):
        read_layout(Dataset.from_list([row]), columns)


def test_columns_can_be_named():
    row = {"q": QUESTION, "rationale": "x = 5", "gold": "5", "answer": "no", "picture": IMAGE, "style": "Be brief."}
    columns = {"prompt": "q", "images": "picture", "answer": "gold", "system": "style"}
    dataset, layout = read_layout(Dataset.from_list([row]), columns)
    assert without_none(dataset[0]["prompt"]) == [SYSTEM, user()]
    assert dataset[0]["answer"] == "5"
    assert read_image(dataset[0]["image"]).tobytes() == IMAGE.tobytes()
    assert dataset[0]["rationale"] == "x = 5"
    assert layout.describe() == (
        "read as questions: `prompt` from `q` and `style`, `images` from `picture`, `answer` from `gold`"
    )


def test_trl_rows_stay_as_they_are():
    rows = [{"prompt": turns(ASKED), "images": [IMAGE], "cue": "x", "question": QUESTION}]
    dataset = Dataset.from_list(rows)
    assert read_layout(dataset)[0] is dataset


def test_relative_paths_start_from_the_file_that_names_them(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    IMAGE.save(tmp_path / "a.png")
    for row in ({"prompt": turns(ASKED), "images": ["a.png"]}, {"question": QUESTION, "image": "a.png"}):
        dataset, _ = read_layout(Dataset.from_list([row]), folder=tmp_path)
        assert read_image(row_images(dataset[0])[0]).tobytes() == IMAGE.tobytes()


def test_images_are_not_copied():
    """Only texts are rewritten; a column of images keeps its data, under the name that the trainer reads."""
    dataset = Dataset.from_list([{"question": QUESTION, "jpg": IMAGE}] * 2)
    read, _ = read_layout(dataset)
    before, after = (each.data.table.column(name) for each, name in ((dataset, "jpg"), (read, "image")))
    addresses = [column.chunk(0).buffers()[3].address for column in (before, after)]
    assert addresses[0] == addresses[1]


def test_a_transform_is_not_rewritten():
    dataset = Dataset.from_list([{"question": QUESTION, "image": IMAGE}]).with_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="has the format 'custom' and would have to be read as questions"):
        read_layout(dataset)


def test_the_number_of_the_bad_row_is_named():
    rows = [{"question": QUESTION}] * 20 + [{"question": None}]
    with pytest.raises(ValueError, match="Row 20: `question` is None"):
        read_layout(Dataset.from_list(rows))


def test_later_rows_may_have_relative_paths(tmp_path):
    IMAGE.save(tmp_path / "a.png")
    rows = [{"question": QUESTION, "image": "https://example.com/a.png"}] * 20 + [
        {"question": QUESTION, "image": "a.png"}
    ]
    dataset, _ = read_layout(Dataset.from_list(rows), folder=tmp_path)
    assert dataset.data.column("images")[20].as_py() == [{"bytes": None, "path": str(tmp_path / "a.png")}]


def test_a_column_of_empty_lists_of_images():
    dataset, _ = read_layout(Dataset.from_list([{"question": QUESTION, "img": []}] * 2))
    assert [row_images(row) for row in dataset] == [[], []]


def test_columns_that_are_empty_at_first():
    row = {"question": QUESTION, "jpg": None, "solution": None, "system": None}
    rows = [row] * 300 + [{"question": QUESTION, "jpg": IMAGE, "solution": "5", "system": "Be brief."}]
    dataset, _ = read_layout(Dataset.from_list(rows))
    assert without_none(dataset[300]["prompt"]) == [SYSTEM, user()]
    assert dataset[300]["answer"] == "5"
    assert len(row_images(dataset[300])) == 1
    assert row_images(dataset[0]) == []


@pytest.mark.parametrize("kind", ["dataset", "stream"])
@pytest.mark.parametrize("name, other", [("img", "image"), ("img", "images"), ("image", "images")])
def test_named_images_replace_others(kind, name, other):
    rows = [{"question": QUESTION, name: IMAGE, other: [make_image(1)] if other == "images" else make_image(1)}]
    dataset = Dataset.from_list(rows) if kind == "dataset" else IterableDataset.from_generator(lambda: iter(rows))
    dataset, _ = read_layout(dataset, {"images": name})
    images = row_images(next(iter(dataset)))
    assert [read_image(image).tobytes() for image in images] == [IMAGE.tobytes()]


@pytest.mark.parametrize("row", [{"image": [IMAGE, IMAGE]}, {"images": IMAGE}], ids=["list", "one"])
def test_columns_of_images_are_named_by_their_kind(row):
    dataset, _ = read_layout(Dataset.from_list([{"question": QUESTION, **row}]))
    blocks = dataset[0]["prompt"][0]["content"]
    assert len(row_images(dataset[0])) == sum(block["type"] == "image" for block in blocks)
    assert all(read_image(image).tobytes() == IMAGE.tobytes() for image in row_images(dataset[0]))


def test_columns_of_trl_rows_can_be_named():
    rows = [{"prompt": turns(ASKED), "images": [make_image(1)], "img": IMAGE, "answer": "no", "gold": "5"}]
    dataset, _ = read_layout(Dataset.from_list(rows), {"answer": "gold", "images": "img"})
    assert without_none(dataset[0]["prompt"]) == [user()]
    assert dataset[0]["answer"] == "5"
    assert [read_image(image).tobytes() for image in row_images(dataset[0])] == [IMAGE.tobytes()]


def test_an_answer_is_not_lost():
    rows = [{"messages": turns(ASKED, ANSWERED), "solution": solution} for solution in ("6", None)]
    assert read_layout(Dataset.from_list(rows))[0]["answer"] == ["6", "5"]
    assert read_layout(Dataset.from_list([{"question": QUESTION, "answers": [None, "5"]}]))[0][0]["answer"] == "5"
