"""Checks that a dataset row can be trained on, and decodes only as much of it as the check needs."""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageFile
from transformers import ProcessorMixin

from ...cue_recovery import CueRecoveryConfig
from ...data.examples import fill_prompt, read_privilege
from ...data.images import image_size, read_video
from ...data.messages import all_strings, check_messages, check_placeholders, control_token_pattern, message_texts
from ...data.rows import VISUAL_COLUMNS, row_images, row_videos, shorten
from ...data.teacher_prompt import add_privilege
from ..vicur_config import ViCuRConfig, template_variables


SURROGATE = re.compile("[\ud800-\udfff]")
# Options that the row check reads; `test_receipt_depends_on_every_option_that_the_check_reads` keeps them complete
OPTIONS = (
    "privilege",
    "cue_column",
    "answer_column",
    "missing_privilege",
    "teacher_prompt_template",
    "max_completion_length",
    "chat_template_kwargs",
    "use_vllm",
    "teacher_model_server_url",
)


@runtime_checkable
class CountsMultimodalTokens(Protocol):
    """A processor that can compute an image's number of tokens from its size."""

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]]) -> Mapping[str, list[int]]: ...


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
        has_tools (`bool`, *optional*, defaults to `False`):
            Whether the model can call tools.
        is_sharded (`bool`, *optional*, defaults to `False`):
            Whether the ranks hold shards of the weights.
        recovery_configs (list of [`CueRecoveryConfig`], *optional*):
            Configs of the student's recovery modules, with resolved sink tokens.
    """

    def __init__(
        self,
        args: ViCuRConfig,
        processing_class: ProcessorMixin,
        max_length: int,
        has_tools: bool = False,
        is_sharded: bool = False,
        recovery_configs: Sequence[CueRecoveryConfig] = (),
    ):
        self.has_tools = has_tools
        self.is_sharded = is_sharded
        # Ids of the sink tokens that every prompt with an image or video must contain
        self.sink_tokens = {
            each.sink_token: each.sink_token_ids[0] for each in recovery_configs if each.sink_token_ids
        }
        self.args = args
        self.processing_class = processing_class
        self.max_prompt_length = max_length - (args.max_completion_length or 0)
        self.max_length = max_length
        self.control_token = control_token_pattern(processing_class)
        self.template_variables = template_variables(args)

    @cached_property
    def digest(self) -> str:
        """Digest of everything that the row check depends on: options, processor, and code."""
        hasher = hashlib.blake2b(digest_size=16)
        options = {name: getattr(self.args, name) for name in OPTIONS}
        limits = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
        versions = [(name, version(name)) for name in ("datasets", "jinja2", "pillow", "tokenizers", "transformers")]
        own = self.max_length, self.has_tools, self.is_sharded, self.sink_tokens
        hasher.update(repr((options, limits, versions, own)).encode())
        with TemporaryDirectory() as folder:
            self.processing_class.save_pretrained(folder)
            package = Path(__file__).parents[2]
            for file in (*sorted(Path(folder).rglob("*.*")), *sorted(package.rglob("*.py"))):
                hasher.update(file.name.encode() + hashlib.blake2b(file.read_bytes()).digest())
        return hasher.hexdigest()

    def check(self, row: dict[str, Any]) -> None:
        """
        Raises:
            `ValueError`: With the problem and its fix, but without the row's number, which the caller knows.
        """
        check_columns(list(row), "The row", self.args)
        prompt = row["prompt"]
        try:
            check_messages(prompt)
        except ValueError as error:
            raise ValueError(f"`prompt`: {error}") from error
        if prompt[-1]["role"] not in ("user", "tool"):
            raise ValueError(
                f"`prompt` ends in a turn of role {prompt[-1]['role']!r}, expected 'user' or 'tool': the student "
                "completes the prompt with a turn of its own. Remove the last turn."
            )
        column = self.args.privilege_column
        privilege = read_privilege(row, column, self.args.missing_privilege)
        template = self.args.teacher_prompt_template
        teacher_prompt = add_privilege(prompt, privilege, template)
        self._check_texts("prompt", prompt)
        check_placeholders("prompt", prompt)
        if column is not None and privilege is not None:
            self._check_text(column, privilege)
            check_placeholders(column, privilege)
            # The template may contain control tokens
            self._check_texts(f"prompt` with `{column}", teacher_prompt, self.control_token.findall(template))
        images, videos = row_images(row), row_videos(row)
        if videos:
            self._check_videos_are_supported()
        self._check_visual_blocks(prompt, len(images), len(videos))
        sizes = tuple(image_size(image) for image in images)
        shapes = [read_video(video).shape for video in videos]
        self._check_length(teacher_prompt, sizes, shapes)
        if sizes or shapes:
            self._check_sinks(prompt, len(sizes), len(shapes))

    def _check_videos_are_supported(self) -> None:
        processor = type(self.processing_class).__name__
        for is_refused, problem, fix in (
            (
                "video_grid_thw" not in self.processing_class.model_input_names,
                f"a {processor} lays out in a way that ViCuRTrainer does not support",
                "Use a model of the Qwen-VL families",
            ),
            (self.args.use_vllm, "TRL does not pass on to vLLM", "Set `use_vllm=False`"),
            (
                self.args.teacher_model_server_url is not None,
                "cannot be sent to the teacher's server",
                "Pass the teacher as `teacher_model`",
            ),
            (self.has_tools, "TRL does not pass on to the turns after a tool call", "Train without `tools`"),
            (self.is_sharded, "would make ranks with a sharded vision tower wait for each other", "Train with DDP"),
        ):
            if is_refused:
                raise ValueError(f"The row has videos, which {problem}. {fix}, or give the frames as images.")

    def _check_texts(self, name: str, prompt: list[dict[str, Any]], allowed: Sequence[str] = ()) -> None:
        for message in prompt:
            texts = list(message_texts([message]))
            # Chat templates concatenate the blocks of a turn, some of them stripped
            joined = ["".join(texts), "".join(text.strip() for text in texts)]
            for text in [*all_strings(message), *joined]:
                self._check_text(name, text, allowed)

    def _check_text(self, name: str, text: str, allowed: Sequence[str] = ()) -> None:
        found = self.control_token.findall(text)
        if found and found != allowed:
            raise ValueError(
                f"The text of `{name}` contains the control token {found[0]!r}: {shorten(text)}. Data must not steer "
                "the chat format; remove the token."
            )
        if surrogate := SURROGATE.search(text):
            raise ValueError(
                f"The text of `{name}` contains the lone surrogate {surrogate.group()!r}, which is not a character: "
                f"{shorten(text)}. Read the text again with the right encoding, or remove it."
            )

    def _check_visual_blocks(self, prompt: list[dict[str, Any]], num_images: int, num_videos: int) -> None:
        """
        Check that the prompt has a bare block for each image and video, or no blocks at all (then images and videos go
        before the text of the first user turn).
        """
        for message in prompt:
            content = message.get("content")
            for block in content if isinstance(content, list) else []:
                kind = block["type"]
                if kind == "text":
                    continue
                if message["role"] == "tool":
                    raise ValueError(
                        f"`prompt` has {'an' if kind == 'image' else 'a'} {kind} block in a turn of role 'tool', "
                        f"where TRL inserts no {kind}. Move it into a user turn."
                    )
                if kind in block:
                    raise ValueError(
                        f"`prompt` has the {kind} block {shorten(block)}, expected {{'type': '{kind}'}} alone. Put "
                        f"the {kind} into the column `{kind}s`."
                    )
        try:
            fill_prompt(prompt, [None] * num_images, [None] * num_videos)
        except ValueError as error:
            raise ValueError(
                f"{str(error).rstrip('.')}. Give `prompt` a block {{'type': 'image'}} for each image and "
                "{'type': 'video'} for each video, or make all contents strings."
            ) from error

    def _check_length(
        self,
        prompt: list[dict[str, Any]],
        image_sizes: tuple[tuple[int, int], ...],
        video_shapes: list[tuple[int, ...]],
    ) -> None:
        num_visual_tokens = self._num_image_tokens(image_sizes) + sum(map(self._num_video_tokens, video_shapes))
        # A text has at most as many tokens as bytes, so most rows need not be tokenized
        text_bound = sum(len(text.encode()) + 64 for text in all_strings(prompt))
        if num_visual_tokens + text_bound <= self.max_prompt_length:
            return
        length = len(self._text_token_ids(prompt, len(image_sizes), len(video_shapes))) + num_visual_tokens
        if length > self.max_prompt_length:
            server = ""
            if self.args.teacher_model_server_url is not None:
                server = " (or the `--max-model-len` of the teacher's server, minus one)"
            raise ValueError(
                f"The prompt (as the teacher sees it) has {length} tokens, {num_visual_tokens} of them visual; with "
                f"`max_completion_length={self.args.max_completion_length}` it exceeds the model's context of "
                f"{self.max_length} tokens{server}. Shorten it, shrink its images, or remove the row."
            )

    def _check_sinks(self, prompt: list[dict[str, Any]], num_images: int, num_videos: int) -> None:
        if not self.sink_tokens:
            return
        token_ids = self._text_token_ids(prompt, num_images, num_videos)
        for token, token_id in self.sink_tokens.items():
            if token_id not in token_ids:
                raise ValueError(
                    f"The prompt has an image or video, but rendered by the chat template it lacks the sink token "
                    f"{token!r}, so the recovery module would do nothing. Choose a `sink_token` that every prompt "
                    "has, such as 'first'."
                )

    def _text_token_ids(self, prompt: list[dict[str, Any]], num_images: int, num_videos: int) -> list[int]:
        """Token ids of the rendered prompt, with one placeholder for each image and video."""
        text = self.processing_class.apply_chat_template(
            fill_prompt(prompt, [None] * num_images, [None] * num_videos),
            tokenize=False,
            add_generation_prompt=True,
            **self.template_variables,
        )
        return self.processing_class.tokenizer.encode(text, add_special_tokens=False)

    @lru_cache(maxsize=10_000)  # noqa: B019  (the checker lives as long as the trainer)
    def _num_image_tokens(self, image_sizes: tuple[tuple[int, int], ...]) -> int:
        if not image_sizes:
            return 0
        if isinstance(self.processing_class, CountsMultimodalTokens):
            sizes = [[height, width] for width, height in image_sizes]
            try:
                return sum(self.processing_class._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"])
            except ValueError as error:
                raise ValueError(
                    f"The processor does not accept images of the sizes {list(image_sizes)}, in pixels: {error}. "
                    "Crop or pad the image, or remove the row."
                ) from error
        # The processors of SmolVLM and LFM2-VL can count tokens only by processing an image
        return sum(map(self._num_tokens_of_blank_image, image_sizes))

    @lru_cache(maxsize=10_000)  # noqa: B019
    def _num_tokens_of_blank_image(self, size: tuple[int, int]) -> int:
        prompt = fill_prompt([{"role": "user", "content": ""}], [Image.new("RGB", size)], [])
        return len(self._tokenize(prompt))

    @lru_cache(maxsize=10_000)  # noqa: B019
    def _num_video_tokens(self, shape: tuple[int, ...]) -> int:
        """Tokens of a blank video of this shape, including time stamps that some processors write before frames."""
        video = {"type": "video", "video": np.zeros(shape, np.uint8)}
        try:
            token_ids = self._tokenize([{"role": "user", "content": [video]}])
        except ValueError as error:
            raise ValueError(
                f"The processor does not accept a video of the shape {shape} (frames, height, width, channels): "
                f"{error}. Use more or larger frames, or remove the row."
            ) from error
        # `ProcessorMixin` does not declare the attribute, but processors of videos have it
        video_token_id: int = self.processing_class.video_token_id  # pyright: ignore[reportAttributeAccessIssue]
        if video_token_id not in token_ids:
            raise ValueError(
                f"The row has videos, for which a {type(self.processing_class).__name__} writes image tokens; its "
                "model cannot have images and videos in one batch. Give the frames as images, or use a model of the "
                "Qwen-VL families."
            )
        return len(token_ids)

    def _tokenize(self, prompt: list[dict[str, Any]]) -> list[int]:
        inputs = self.processing_class.apply_chat_template(
            [prompt], tokenize=True, return_dict=True, **self.template_variables
        )
        # transformers annotates the return value as `str` alone, which it is without `tokenize`
        return inputs["input_ids"][0]  # pyright: ignore[reportArgumentType, reportReturnType]


def check_columns(column_names: list[str], name: str, args: ViCuRConfig) -> None:
    """
    Raises:
        `ValueError`: If a column that the trainer reads is missing.
    """
    required = ["prompt", *filter(None, [args.privilege_column])]
    for column in required:
        if column not in column_names:
            raise ValueError(
                f"{name} has no column `{column}`; with `privilege={args.privilege!r}` it must have {required} and "
                f"`images` or `image`, but it has {column_names}."
            )
    if not any(column in column_names for column in VISUAL_COLUMNS):
        raise ValueError(
            f"{name} has no column `images` or `image`, only {column_names}, nor `videos` or `video`. "
            "Add one; in rows without images it may be None."
        )


def with_row_number(check: Callable[[dict], None], get_row: Callable[[], dict], row_name: str) -> None:
    """Run `check` on a row, and name the row in all errors, including those of reading it."""
    try:
        check(get_row())
    except ValueError as error:
        raise ValueError(f"{row_name}: {error}") from error
    except Exception as error:  # e.g. from a user's transform
        raise ValueError(f"{row_name} cannot be read: {type(error).__name__}: {error}") from error
