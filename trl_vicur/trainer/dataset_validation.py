"""Checks of the datasets before training, so that no bad row costs a training run."""

from collections.abc import Callable
from functools import cache
from typing import Any

from datasets import Dataset, IterableDataset
from PIL import Image
from tqdm.auto import tqdm
from transformers import ProcessorMixin
from trl.data_utils import is_conversational, prepare_multimodal_messages

from ..dataset_rows import control_token_pattern, image_size, message_texts, row_getter, row_images, shorten
from ..teacher_prompt import add_privilege
from .privilege import get_privilege
from .vicur_config import ViCuRConfig


class RowChecker:
    """
    Checks that a dataset row can be trained on.

    Args:
        args ([`ViCuRConfig`]):
            Training configuration.
        processing_class ([`~transformers.ProcessorMixin`]):
            Processor of the student.
        max_length (`int`):
            Context length of the model, in tokens.
    """

    def __init__(self, args: ViCuRConfig, processing_class: ProcessorMixin, max_length: int):
        self.args = args
        self.processing_class = processing_class
        self.max_prompt_length = max_length - (args.max_completion_length or 0)
        self.max_length = max_length
        self.control_token = control_token_pattern(processing_class.tokenizer)

    def check(self, row: dict[str, Any]) -> None:
        """
        Raises:
            `ValueError`: With what is wrong and how to mend it; without the row's number, which the caller knows.
        """
        prompt = row["prompt"]
        if not is_conversational(row):
            raise ValueError(
                "`prompt` must be a list of messages, each with 'role' and 'content', got "
                f"{shorten(prompt)}. Images can only be placed in conversational prompts."
            )
        privilege = get_privilege(row, self.args)
        teacher_prompt = add_privilege(prompt, privilege, self.args.teacher_prompt_template)
        texts = [("prompt", text) for text in message_texts(prompt)] + [("privilege", privilege or "")]
        for name, text in texts:
            if found := self.control_token.search(text):
                raise ValueError(
                    f"The text of `{name}` contains the control token {found.group()!r}: {shorten(text)}. Data must "
                    "not steer the chat format; remove the token."
                )
        images = row_images(row)
        prepare_multimodal_messages(prompt, images=images)
        sizes = [image_size(image) for image in images]
        self._check_length(teacher_prompt, [size for size in sizes if size is not None])

    def _check_length(self, prompt: list[dict[str, Any]], image_sizes: list[tuple[int, int]]) -> None:
        num_image_tokens = self._num_image_tokens(image_sizes)
        # A text has at most as many tokens as bytes, so most rows need not be tokenized
        text_bound = sum(len(text.encode("utf-8", "replace")) + 64 for text in message_texts(prompt))
        if num_image_tokens + text_bound <= self.max_prompt_length:
            return
        text = self.processing_class.apply_chat_template(
            prepare_multimodal_messages(prompt, images=[None] * len(image_sizes)),
            tokenize=False,
            add_generation_prompt=True,
            **(self.args.chat_template_kwargs or {}),
        )
        length = len(self.processing_class.tokenizer.encode(text, add_special_tokens=False)) + num_image_tokens
        if length > self.max_prompt_length:
            raise ValueError(
                f"The prompt (as the teacher sees it) has {length} tokens, {num_image_tokens} of them visual; with "
                f"`max_completion_length={self.args.max_completion_length}` it exceeds the model's context of "
                f"{self.max_length} tokens. Shorten it, shrink its images, or remove the row."
            )

    def _num_image_tokens(self, image_sizes: list[tuple[int, int]]) -> int:
        if not image_sizes:
            return 0
        if hasattr(self.processing_class, "_get_num_multimodal_tokens"):
            sizes = [[height, width] for width, height in image_sizes]
            return sum(self.processing_class._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
        # SmolVLM's and LFM2-VL's processors cannot tell without an image
        return sum(map(self._num_tokens_of_blank_image, image_sizes))

    @cache  # noqa: B019  (there are few sizes, and the checker is short-lived)
    def _num_tokens_of_blank_image(self, size: tuple[int, int]) -> int:
        prompt = prepare_multimodal_messages([{"role": "user", "content": ""}], images=[Image.new("RGB", size)])
        inputs = self.processing_class.apply_chat_template(prompt, tokenize=True, return_dict=True)
        return len(inputs["input_ids"][0])


def check_dataset(
    dataset: Dataset | IterableDataset | dict[str, Dataset], name: str, checker: RowChecker, args: ViCuRConfig
) -> None:
    """
    Check a dataset's columns and, unless it is streamed, each of its rows. Processes share the rows between them.

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them):
            The dataset. Rows of an iterable dataset are checked when they are trained on.
        name (`str`):
            What to call it in errors.
        checker ([`RowChecker`]):
            The check of a row.
        args ([`ViCuRConfig`]):
            Training configuration.

    Raises:
        `ValueError`: If a column is missing or a row is bad; names the column, or the row by number.
    """
    if isinstance(dataset, dict):
        for key, part in dataset.items():
            check_dataset(part, f"{name}[{key!r}]", checker, args)
        return
    if dataset.column_names is not None:
        check_columns(dataset.column_names, name, args)
    if isinstance(dataset, IterableDataset):
        return
    numbers = range(args.process_index, len(dataset), args.world_size)
    progress = tqdm(numbers, desc=f"Checking {name}", disable=args.disable_tqdm or args.process_index != 0)
    get_row = row_getter(dataset)
    for number in progress:
        with_row_number(checker.check, lambda number=number: get_row(number), f"Row {number} of {name}")


def check_columns(column_names: list[str], name: str, args: ViCuRConfig) -> None:
    """
    Raises:
        `ValueError`: If a column that the trainer reads is missing.
    """
    required = ["prompt"]
    if args.privilege == "cue":
        required.append(args.cue_column)
    elif args.privilege == "answer":
        required.append(args.answer_column)
    for column in required:
        if column not in column_names:
            raise ValueError(
                f"{name} has no column `{column}`; with `privilege={args.privilege!r}` it must have {required} and "
                f"`images` or `image`, but it has {column_names}."
            )
    if "images" not in column_names and "image" not in column_names:
        raise ValueError(
            f"{name} has no column `images` or `image`, only {column_names}. Rows without one may be None."
        )


def with_row_number(check: Callable[[dict], None], get_row: Callable[[], dict], row_name: str) -> None:
    """Run `check` on a row; errors, also those of reading it, name the row."""
    try:
        check(get_row())
    except Exception as error:
        raise ValueError(f"{row_name}: {error}") from error
