"""Datasets by their name, with images relative to the file that names them."""

import base64
import csv
import io
import json
import tarfile

import pytest
from datasets import Dataset, DatasetDict, Image, IterableDataset
from tiny_models import make_image

from trl_vicur.data.images import read_image
from trl_vicur.data.loading import load_rows, load_split
from trl_vicur.data.rows import row_images


QUESTION = "What is the value of x?"
IMAGE = make_image(0)


def png() -> bytes:
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG")
    return buffer.getvalue()


def json_lines(folder):
    rows = [{"messages": [{"role": "user", "content": f"<image>{QUESTION}"}], "images": ["pictures/a.png"]}] * 2
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


def json_list(folder):
    turns = [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": "5"}]
    (folder / "llava.json").write_text(json.dumps([{"image": "pictures/a.png", "conversations": turns}] * 2))
    return folder / "llava.json"


def delimited(name, delimiter):
    def write(folder):
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["question", "answer", "image"], *[[QUESTION, "5", "pictures/a.png"]] * 2])
        return folder / name

    return write


def base64_table(folder):
    image = base64.b64encode(png()).decode()
    Dataset.from_list([{"question": QUESTION, "answer": "5", "image": image}] * 2).to_csv(folder / "base64.csv")
    return folder / "base64.csv"


def parquet_paths(folder):
    rows = [{"question": QUESTION, "answer": "5", "image": "pictures/a.png"}] * 2
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def parquet_images(folder):
    dataset = Dataset.from_list([{"problem": QUESTION, "answer": "5", "images": [IMAGE]}] * 2)
    dataset.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def saved_to_disk(folder):
    rows = [{"question": QUESTION, "answer": "5", "image": IMAGE}] * 2
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def image_folder(folder):
    images = folder / "imagefolder" / "train"
    images.mkdir(parents=True)
    rows = [{"file_name": f"{i}.png", "question": QUESTION, "answer": "5"} for i in range(2)]
    for row in rows:
        (images / row["file_name"]).write_bytes(png())
    (images / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "imagefolder"


def webdataset(folder):
    with tarfile.open(folder / "shard-000.tar", "w") as shard:
        for i in range(2):
            for suffix, data in (("png", png()), ("json", json.dumps({"question": QUESTION, "answer": "5"}).encode())):
                info = tarfile.TarInfo(f"{i:06}.{suffix}")
                info.size = len(data)
                shard.addfile(info, io.BytesIO(data))
    return folder / "shard-000.tar"


def folder_named_like_a_builder(folder):
    (folder / "json").mkdir()
    rows = [{"question": QUESTION, "answer": "5", "image": "../pictures/a.png"}] * 2
    (folder / "json" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "json"


SOURCES = {
    "json lines": json_lines,
    "json": json_list,
    "csv": delimited("rows.csv", ","),
    "tsv": delimited("rows.tsv", "\t"),
    "csv with base64": base64_table,
    "parquet with paths": parquet_paths,
    "parquet with images": parquet_images,
    "save_to_disk": saved_to_disk,
    "image folder": image_folder,
    "webdataset": webdataset,
    "a folder with the name of a builder": folder_named_like_a_builder,
}


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("source", SOURCES)
def test_files_and_folders(tmp_path, monkeypatch, source, streaming):
    """From another working directory, so that a relative path can only mean the file's folder."""
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    (tmp_path / "data" / "pictures" / "a.png").write_bytes(png())
    name = SOURCES[source](tmp_path / "data")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if source == "a folder with the name of a builder":
        monkeypatch.chdir(name.parent)
        name = name.name
    else:
        monkeypatch.chdir(tmp_path)
    dataset, _ = load_rows(str(name), streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    rows = list(dataset)
    assert len(rows) == 2
    for row in rows:
        blocks = [block for message in row["prompt"] for block in message["content"]]
        assert [block["type"] for block in blocks] == ["image", "text"]
        assert blocks[1]["text"] == QUESTION
        assert row.get("answer") == (None if source == "json lines" else "5")
        assert [read_image(image).tobytes() for image in row_images(row)] == [IMAGE.tobytes()]


def test_a_mistyped_path_is_answered_at_once(tmp_path):
    (tmp_path / "geometry.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"no file or folder .*geometri\.jsonl'\. Did you mean '.*geometry\.jsonl'\?"):
        load_split(str(tmp_path / "geometri.jsonl"))
    with pytest.raises(ValueError, match=r"There is no file or folder '\./nothing'\. Check the path"):
        load_split("./nothing")


def test_the_dataset_is_named(tmp_path):
    Dataset.from_list([{"text": "A cat."}]).to_json(tmp_path / "captions.jsonl")
    with pytest.raises(ValueError, match=r"captions\.jsonl' cannot be read: No column of the dataset is known"):
        load_rows(str(tmp_path / "captions.jsonl"))


def test_images_of_files_are_features(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    Dataset.from_list([{"question": QUESTION, "image": "a.png"}]).to_json(tmp_path / "rows.jsonl")
    dataset, _ = load_rows(str(tmp_path / "rows.jsonl"))
    assert dataset.features["images"].feature == Image(decode=False)


@pytest.mark.parametrize("has_splits", [False, True], ids=["dataset", "splits"])
def test_a_saved_dataset_is_streamed_on_demand(tmp_path, has_splits):
    dataset = Dataset.from_list([{"question": f"What is {i}?"} for i in range(3)])
    saved = DatasetDict(train=dataset) if has_splits else dataset
    saved.save_to_disk(str(tmp_path / "rows"))
    loaded, streamed = (load_split(str(tmp_path / "rows"), streaming=streaming) for streaming in (False, True))
    assert isinstance(loaded, Dataset) and isinstance(streamed, IterableDataset)
    assert list(streamed) == list(loaded) == list(dataset)


def test_contents_of_mixed_types(tmp_path):
    """`datasets` 5 reads them as JSON."""
    (tmp_path / "a.png").write_bytes(png())
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": QUESTION}]
    row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "5"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    dataset, _ = load_rows(str(tmp_path / "rows.jsonl"))
    assert [block["type"] for block in dataset[0]["prompt"][0]["content"]] == ["image", "text"]
    assert dataset[0]["answer"] == "5"
    assert [read_image(image).tobytes() for image in row_images(dataset[0])] == [IMAGE.tobytes()]
