"""
Layouts of vision-language datasets, recognized by their columns and read as `prompt`, `images` and `answer`.

Texts are rewritten once, before training. Images stay in the dataset as they are, as long as they need no other name.
"""

import ast
import hashlib
import json
import logging
import re
from base64 import b64decode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, IterableDataset, List, Value, concatenate_datasets, config

from .columns import iterate_tables
from .conversations import read_content, read_messages
from .messages import count_blocks
from .rows import shorten


logger = logging.getLogger(__name__)

TARGETS = ("prompt", "images", "answer", "system")
CONVERSATIONS = ("messages", "conversations", "conversation", "texts")
QUESTIONS = ("prompt", "question", "problem", "query", "instruction")
ANSWERS = ("answer", "solution", "response", "output", "completion", "answers", "ground_truth", "label")
IMAGES = ("images", "image", "image_path", "image_paths", "image_url", "image_urls", "image_base64", "img")
WEBDATASET_IMAGES = ("jpg", "jpeg", "png", "webp")
NUMBERED_IMAGE = re.compile(r"image_?(\d+)")
CHOICES = ("choices", "options")
COLUMNS_HELP = (
    "Columns of the prompt, the images, the answer and the system prompt, where the layout would be guessed wrong, "
    "e.g. prompt=question,answer=solution."
)
SAMPLE_SIZE = 16
ROWS_PER_BATCH = 100
# Beginnings of PNG, JPEG, GIF and WebP files in base64
BASE64_IMAGE = re.compile(r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/\s]{64,}=*")
PROMPT_FEATURES = {
    "prompt": List({"role": Value("string"), "content": List(dict.fromkeys(("type", "text"), Value("string")))})
}


class UnknownLayoutError(ValueError):
    """No column of the dataset is known to hold prompts."""


@dataclass(frozen=True)
class Layout:
    """
    Where a dataset's rows have the prompt, the images and the answer.

    Args:
        name (`str`):
            Name of the layout, for people.
        prompt (`str`):
            Column with the question, or with the conversation.
        is_conversation (`bool`):
            Whether that column holds turns. If the last one is the assistant's, it is the answer.
        images (`tuple[str, ...]`, *optional*, defaults to `()`):
            Columns with images, in order.
        answer (`str`, *optional*):
            Column with the answer.
        context (`dict[str, str]`, *optional*):
            Columns with further parts of the prompt: `"system"`, `"history"`, `"input"`, `"choices"`.
    """

    name: str
    prompt: str
    is_conversation: bool
    images: tuple[str, ...] = ()
    answer: str | None = None
    context: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that the rows are read from."""
        answer = () if self.answer is None else (self.answer,)
        return (self.prompt, *self.context.values(), *answer, *self.images)

    @property
    def is_trl(self) -> bool:
        """Whether the rows can be trained on as they are."""
        return self.name == "TRL's `prompt`"

    def describe(self) -> str:
        """One line for people: what was recognized, and what becomes of it."""
        if self.is_trl:
            return "read as TRL's `prompt`"
        parts = [f"`prompt` from `{self.prompt}`"]
        parts[0] += "".join(f" and `{column}`" for column in self.context.values())
        if self.images:
            parts.append("`images` from " + ", ".join(f"`{column}`" for column in self.images))
        if self.answer is not None:
            parts.append(f"`answer` from `{self.answer}`")
        elif self.is_conversation:
            parts.append("`answer` from the last assistant turn")
        return f"read as {self.name}: {', '.join(parts)}"

    def read(self, row: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
        """
        Rewrite one row.

        Args:
            row (`dict`):
                The row.
            folder (`Path`, *optional*):
                Folder that relative paths of images start from. `None` leaves them as they are.

        Returns:
            `dict`: `prompt` (messages whose contents are blocks), `images` (a list) and `answer` (`str` or `None`).

        Raises:
            `ValueError`: If the row does not have the dataset's layout.
        """
        images = [image for column in self.images for image in _as_list(row.get(column))]
        if self.is_trl:
            return {"images": [_locate(image, folder) for image in images]}
        if self.is_conversation:
            try:
                messages, found = read_messages(row.get(self.prompt))
            except ValueError as error:
                raise ValueError(f"`{self.prompt}`: {error}") from error
        else:
            messages, found = self._read_question(row)
        if images and found:
            raise ValueError(
                f"`{self.prompt}` contains {len(found)} image(s), but {self.images} holds {len(images)} as well. "
                "Leave out one of the two."
            )
        images = [_locate(image, folder) for image in images or found]
        answer = None if self.answer is None else _as_text(row.get(self.answer), self._choices(row))
        if self.is_conversation and len(messages) > 1 and messages[-1]["role"] == "assistant":
            last = _plain_text(messages.pop()["content"])
            answer = last if answer is None else answer
        if system := self._context(row, "system"):
            if messages[0]["role"] == "system":
                raise ValueError(
                    f"`{self.prompt}` starts with a system turn, but `{self.context['system']}` holds a system prompt "
                    "as well. Leave out one of the two."
                )
            messages = [{"role": "system", "content": system}, *messages]
        return {"prompt": _place_images(messages, len(images), self.prompt), "images": images, "answer": answer}

    def _context(self, row: dict[str, Any], name: str) -> Any:
        return row.get(self.context[name]) if name in self.context else None

    def _read_question(self, row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Any]]:
        question = row.get(self.prompt)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f"`{self.prompt}` is {shorten(question)}, expected the text of a question.")
        if further := self._context(row, "input"):
            question += f"\n{further}"
        if choices := self._choices(row):
            lines = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
            question = "\n".join([question, *lines])
        messages = []
        for earlier in self._context(row, "history") or []:
            messages += [
                {"role": role, "content": text} for role, text in zip(("user", "assistant"), earlier, strict=True)
            ]
        content, found = read_content(question, f"`{self.prompt}`")
        return [*messages, {"role": "user", "content": content}], found

    def _choices(self, row: dict[str, Any]) -> list[str]:
        choices = self._context(row, "choices") or []
        if isinstance(choices, str):  # MMMU writes a list as Python does
            try:
                choices = ast.literal_eval(choices)
            except (SyntaxError, ValueError) as error:
                raise ValueError(f"`{self.context['choices']}` is {shorten(choices)}, expected a list.") from error
        if not isinstance(choices, (list, tuple)) or len(choices) > len(ascii_uppercase):
            raise ValueError(
                f"`{self.context['choices']}` is {shorten(choices)}, expected a list of at most "
                f"{len(ascii_uppercase)} choices."
            )
        return [str(choice) for choice in choices]


def find_layout(rows: Sequence[dict[str, Any]], columns: Mapping[str, str] | None = None) -> Layout:
    """
    Recognize the layout of a dataset.

    Args:
        rows (sequence of `dict`):
            Some of its rows; their images need not be decoded.
        columns (`dict[str, str]`, *optional*):
            Columns of `"prompt"`, `"images"`, `"answer"` and `"system"`, where the guess would be wrong.

    Returns:
        [`Layout`]: Where the rows have what is needed.

    Raises:
        [`UnknownLayoutError`]: If no column is known to hold prompts; says what was seen.
        `ValueError`: If several columns could hold the same; says which.
    """
    columns = columns or {}
    if twice := [column for column, count in Counter(columns.values()).items() if count > 1]:
        raise ValueError(f"`columns` names {twice[0]!r} more than once. Name one column for each of {list(columns)}.")
    seen = {name: value for row in reversed(rows) for name, value in row.items() if value is not None}
    for target, column in columns.items():
        if target not in TARGETS:
            raise ValueError(f"`columns` has the key {target!r}, expected one of {list(TARGETS)}.")
        if column not in seen:
            raise ValueError(f"`columns` names {column!r} for {target!r}, but the dataset has {_describe(seen)}.")
    is_trl = _is_conversation(seen.get("prompt"))
    if is_trl and not columns:
        return Layout("TRL's `prompt`", "prompt", is_conversation=True, images=_find_images(seen))

    prompt = columns.get("prompt") or ("prompt" if is_trl else None)
    prompt = prompt or _choose("prompt", [*CONVERSATIONS, *QUESTIONS], seen)
    if prompt is None:
        raise UnknownLayoutError(
            f"No column of the dataset is known to hold prompts; it has {_describe(seen)}. Name the column with "
            "`columns` (`--columns prompt=NAME`)."
        )
    is_conversation = prompt in CONVERSATIONS or _is_conversation(seen[prompt]) or _is_json_list(seen[prompt])
    others = {name: value for name, value in seen.items() if name != prompt}
    if "images" in columns:
        images = (columns["images"],)
    else:
        images = _find_images(others)
    answer = columns.get("answer")
    if answer is None:
        candidates = [name for name in ANSWERS if not (name == "label" and isinstance(others.get(name), int))]
        answer = _choose("answer", candidates, others)
    context = {name: name for name in ("history", "input") if name in others and not is_conversation}
    choices = _choose("choices", CHOICES, others)
    if choices is not None and not is_conversation:
        context["choices"] = choices
    if (system := columns.get("system", "system")) in others:
        context["system"] = system
    return Layout(_name_layout(prompt, seen[prompt]), prompt, is_conversation, images, answer, context)


def _find_images(seen: dict[str, Any]) -> tuple[str, ...]:
    numbered = {int(match[1]): name for name in seen if (match := NUMBERED_IMAGE.fullmatch(name))}
    if numbered and not {"images", "image"} & seen.keys():
        return tuple(name for _, name in sorted(numbered.items()))
    column = _choose("images", [*IMAGES, *WEBDATASET_IMAGES], seen)
    return () if column is None else (column,)


def _choose(target: str, candidates: Sequence[str], seen: dict[str, Any]) -> str | None:
    """The one candidate that there is; a column of the target's own name comes before others, but not for prompts."""
    found = [name for name in candidates if name in seen]
    if target != "prompt" and found[:1] in ([target], [target.removesuffix("s")]):
        return found[0]
    if len(found) > 1:
        raise ValueError(
            f"Several columns could hold the {target}: {_describe({name: seen[name] for name in found})}. Name the "
            f"one to use with `columns` (`--columns {target}={found[0]}`), or remove the others."
        )
    return found[0] if found else None


def _name_layout(prompt: str, value: Any) -> str:
    first = value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}
    if first.get("from") is not None:
        return "LLaVA conversations"
    if first.get("assistant") is not None:
        return "pairs of questions and answers"
    if prompt in CONVERSATIONS or first:
        return "messages"
    return "questions"


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _is_json_list(value: Any) -> bool:
    """Whether a text is a conversation in JSON, which must not be read as a question."""
    return isinstance(value, str) and re.match(r"\s*\[\s*\{\s*\"", value) is not None


def _describe(seen: dict[str, Any]) -> str:
    """Columns with the kinds of their values."""
    return ", ".join(f"`{name}` ({type(value).__name__})" for name, value in sorted(seen.items()))


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return [image for image in value if image is not None] if isinstance(value, list) else [value]


def _as_text(answer: Any, choices: list[str]) -> str | None:
    """An answer as text: of several annotators' answers the most frequent one, of a choice's number its letter."""
    if isinstance(answer, list):
        answers = [item.get("answer") if isinstance(item, dict) else item for item in answer]
        answers = [item for item in answers if item is not None]
        answer = max(answers, key=answers.count, default=None)
    if answer is None or isinstance(answer, str):
        return answer
    if isinstance(answer, (dict, list)):
        raise ValueError(f"The answer is {shorten(answer)}, expected a text or a number.")
    if choices and isinstance(answer, int):
        if not 0 <= answer < len(choices):
            raise ValueError(f"The answer is {answer}, expected the number of a choice from 0 to {len(choices) - 1}.")
        return ascii_uppercase[answer]
    return str(answer)


def _plain_text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(block.get("text", "") for block in content)


def _locate(image: Any, folder: Path | None) -> Any:
    """An image that can be read from anywhere: its relative path starts from the folder, base64 becomes bytes."""
    if isinstance(image, dict) and image.get("bytes") is None and isinstance(path := image.get("path"), str):
        located = _locate(path, folder)
        return image if located is path else {**image, "path": located}
    if not isinstance(image, str):
        return image
    if image.startswith("data:") and ";base64," in image[:64]:
        return {"bytes": b64decode(image.partition(",")[2]), "path": None}
    if "://" in image:
        return image
    if BASE64_IMAGE.fullmatch(image):
        return {"bytes": b64decode(image), "path": None}
    return image if folder is None or Path(image).is_absolute() else str(folder / image)


def _may_move(image: Any, folder: Path | None) -> bool:
    """Whether [`_locate`] would change an image, or others of its kind in the same column."""
    is_path = isinstance(image, str) or (isinstance(image, dict) and image.get("bytes") is None)
    return is_path and (folder is not None or _locate(image, folder) is not image)


def _place_images(messages: list[dict[str, Any]], num_images: int, column: str) -> list[dict[str, Any]]:
    """Messages of blocks, with one for each image; those without a place go before the text of the first user turn."""
    placed = count_blocks(messages, "image")
    if placed not in (0, num_images):
        raise ValueError(f"`{column}` has places for {placed} image(s), but the row has {num_images}.")
    missing = num_images - placed
    blocks = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if missing and message["role"] == "user":
            content = [{"type": "image"}] * missing + content
            missing = 0
        blocks.append({**message, "content": content})
    return blocks


def parse_columns(text: str | None) -> dict[str, str]:
    """
    Read the option `columns`, e.g. `"prompt=question,answer=solution"`.

    Raises:
        `ValueError`: If it is malformed.
    """
    pairs = [pair.partition("=") for pair in (text or "").split(",") if pair.strip()]
    if malformed := [target for target, equals, column in pairs if not equals or not column.strip()]:
        raise ValueError(
            f"`columns` is {text!r}, expected pairs such as 'prompt=question,answer=solution', but {malformed[0]!r} "
            "has no column."
        )
    return {target.strip(): column.strip() for target, _, column in pairs}


def read_layout(
    dataset: Dataset | IterableDataset, columns: Mapping[str, str] | None = None, folder: Path | None = None
) -> tuple[Dataset | IterableDataset, Layout]:
    """
    Read a dataset of any known layout as `prompt`, `images` and `answer`.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            The dataset.
        columns (`dict[str, str]`, *optional*):
            See [`find_layout`].
        folder (`Path`, *optional*):
            Folder that relative paths of images start from. `None` leaves them relative to the working directory.

    Returns:
        `tuple[Dataset | IterableDataset, Layout]`: The dataset with these columns in place of those that they were
        made from, its other columns unchanged; and the layout.

    Raises:
        `ValueError`: If the layout is not recognized, or if a row does not have it; names the row by its number.
    """
    rows = _first_rows(dataset)
    layout = find_layout([_unpack_json(row) for row in rows], columns)
    if not layout.is_trl:
        logger.warning(f"The dataset is {layout.describe()}.")
    images = [image for row in rows for name in layout.images for image in _as_list(row.get(name))]
    is_moved = any(_may_move(image, folder) for image in images)
    if layout.is_trl and not is_moved:
        return dataset, layout
    if isinstance(dataset, Dataset) and dataset.format["type"] is not None:
        raise ValueError(
            f"The dataset has the format {dataset.format['type']!r} and would have to be {layout.describe()}. Remove "
            "the format with `dataset.with_format(None)`, or let its transform return TRL's `prompt` and `images`."
        )
    # Images stay where they are unless they come from several columns, from the prompt, or from relative paths
    kept_images = None if is_moved or len(layout.images) != 1 else layout.images[0]
    names = {name for row in rows for name in row}
    used = [name for name in dict.fromkeys((*layout.columns, "json")) if name in names]
    unused = [name for name in ("images", "image") if name in names]  # the trainer would read these first
    dataset = _rewrite(dataset, layout, used, unused, kept_images, folder)
    if kept_images is not None:
        is_list = any(isinstance(row.get(kept_images), list) for row in rows)
        name = "images" if is_list else "image"
        dataset = dataset if kept_images == name else dataset.rename_column(kept_images, name)
    return dataset, layout


def _rewrite(
    dataset: Dataset | IterableDataset,
    layout: Layout,
    used: list[str],
    unused: list[str],
    kept_images: str | None,
    folder: Path | None,
) -> Dataset | IterableDataset:
    """The dataset with the columns that the layout makes of those that are used, in place of these."""
    features = Features({} if layout.is_trl else PROMPT_FEATURES)
    if not layout.is_trl and (layout.answer is not None or layout.is_conversation):
        features["answer"] = Value("string")
    if kept_images is None:
        features["images"] = List(Image(decode=False))  # `datasets` decodes URLs only with aiohttp; `read_image` does
    kept = {kept_images, layout.answer, "prompt" if layout.is_trl else None}
    replaced = [name for name in used if name not in kept]
    replaced += [name for name in unused if name not in (*replaced, *kept)]

    def read(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            new = layout.read(_unpack_json(row), folder)
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        return {name: new[name] for name in features}

    def read_batch(table: pa.Table, numbers: list[int]) -> dict[str, list[Any]]:
        batch = [read(row, number) for row, number in zip(_table_rows(table), numbers, strict=True)]
        return {name: [row[name] for row in batch] for name in features}

    if isinstance(dataset, IterableDataset):
        return dataset.map(read, with_indices=True, remove_columns=[name for name in replaced if name not in features])
    new_columns = (
        dataset.select_columns(used)
        .with_format("arrow")  # in which images are not decoded
        .map(
            read_batch,
            with_indices=True,
            batched=True,
            batch_size=ROWS_PER_BATCH,
            remove_columns=used,
            features=features,
            cache_file_name=_cache_file(dataset, layout, folder),
            desc="Reading rows",
        )
        .with_format(None)
    )
    others = dataset.remove_columns([name for name in {*replaced, *features} if name in dataset.column_names])
    return concatenate_datasets([others, new_columns], axis=1) if others.column_names else new_columns


def _cache_file(dataset: Dataset, layout: Layout, folder: Path | None) -> str | None:
    """File for the rewritten texts of a dataset on disk. `map` would put it into the dataset's own folder."""
    if not dataset.cache_files:
        return None
    key = repr((dataset._fingerprint, layout, folder, version("trl-vicur")))
    cache = Path(config.HF_DATASETS_CACHE, "trl_vicur_layouts")
    cache.mkdir(parents=True, exist_ok=True)
    return str(cache / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.arrow")


def _first_rows(dataset: Dataset | IterableDataset) -> list[dict[str, Any]]:
    """
    Some rows of a dataset, with images as bytes and paths where they need not be decoded: its first rows, and the
    first one with a value of each column that is empty in these.
    """
    if not isinstance(dataset, Dataset) or dataset.format["type"] is not None:
        return list(dataset.take(SAMPLE_SIZE))
    table: Any = dataset.with_format("arrow")[:SAMPLE_SIZE]  # `datasets` annotates rows of any format as dicts
    rows = _table_rows(table)
    for name in dataset.column_names:
        if len(dataset) > SAMPLE_SIZE and all(row.get(name) is None for row in rows):
            tables = iterate_tables(dataset, [name], ROWS_PER_BATCH)
            table = next((table for table in tables if table[name].null_count < len(table)), None)
            values = [] if table is None else _table_rows(table)
            rows += [row for row in values if row[name] is not None][:1]
    return rows


def _table_rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table. Values of mixed types, which `datasets` stores as JSON, are decoded."""
    rows = table.to_pylist()
    for column in table.schema:
        if "json" in str(column.type):
            for row in rows:
                row[column.name] = _decode_json(row[column.name], column.type)
    return rows


def _decode_json(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        decoded = json.loads(value)
        # `datasets` stores the text "5" as the number 5
        return decoded if decoded is None or isinstance(decoded, (str, list, dict)) else value
    if pa.types.is_struct(kind):
        return {field.name: _decode_json(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_decode_json(item, kind.value_type) for item in value]
    return value


def _unpack_json(row: dict[str, Any]) -> dict[str, Any]:
    """A WebDataset's row with the fields of its JSON file beside its images."""
    fields = row.get("json")
    if isinstance(fields, str):
        fields = json.loads(fields)
    return {**row, **fields} if isinstance(fields, dict) else row
