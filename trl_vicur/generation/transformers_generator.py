"""Generate with a vision-language model in this process, in batches."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..data.messages import control_token_pattern, message_texts
from ..data.rows import shorten
from ..hub.names import naming_model
from .end_tokens import end_token_ids
from .requests import (
    ChatRequest,
    ChatResponse,
    GeneratorUnavailableError,
    check_sampling,
    cut_response,
    describe_error,
    public_name,
)


if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin


class TransformersGenerator:
    """
    Generates with a model in this process, in batches.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            An image-text-to-text model, or its id or folder.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            Its processor. Required for a loaded model; for a model given by name, it is loaded by default.
        adapter (`str`, *optional*):
            Id or folder of a PEFT adapter for the model.
        revision (`str`, *optional*):
            Revision of the model on the Hub.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type to load the model in.
        batch_size (`int`, *optional*, defaults to `8`):
            Requests per batch.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Maximum length of a text, in tokens. A request fails if its text is cut at this length.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature; `0.0` is greedy. Each batch is sampled with the seed of its first request, so
            samples depend on the batch size.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus sampling.

    Raises:
        `ValueError`: If an option is out of range, if a loaded model is given without its processor, or if neither the
            model nor its tokenizer has an end token.
        `OSError`: If the model cannot be loaded.
    """

    def __init__(
        self,
        model: "str | PreTrainedModel",
        processing_class: "ProcessorMixin | None" = None,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        batch_size: int = 8,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForImageTextToText, AutoProcessor

        check_sampling(max_new_tokens, temperature, top_p)
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        if isinstance(model, str):
            name = model
            device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
            with naming_model(name):
                processing_class = processing_class or AutoProcessor.from_pretrained(name, revision=revision)
                model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, dtype=dtype)
            # pyright does not bind methods that transformers decorates
            model = model.to(device)  # pyright: ignore[reportArgumentType]
        else:
            name = model.config._name_or_path
        if processing_class is None:
            raise ValueError(
                "`processing_class` must be given with a loaded model; only a model given by name loads its own."
            )
        self.end_ids = end_token_ids(model, processing_class.tokenizer)
        commit = getattr(model.config, "_commit_hash", None)
        self.model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
        self.processing_class = processing_class
        self.batch_size = batch_size
        self._control_token = control_token_pattern(processing_class)
        self._generation = {
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature > 0.0,
            "eos_token_id": self.end_ids,
        }
        if temperature > 0.0:
            self._generation |= {"temperature": temperature, "top_p": top_p, "top_k": 0}
        self.settings = {
            "generator": "transformers",
            "model": public_name(name),
            "adapter": None if adapter is None else public_name(adapter),
            "revision": commit or revision,
            "weights": _weights_digest(self.model),
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }

    def generate(self, requests: Iterable[ChatRequest]) -> Iterator[ChatResponse]:
        """See [`Generator.generate`]. If a batch fails, each of its requests is retried alone."""
        import torch

        requests = iter(requests)
        while batch := list(islice(requests, self.batch_size)):
            readable, conversations = [], []
            for request in batch:
                try:
                    conversations.append(self._read(request))
                    readable.append(request)
                except Exception as error:
                    yield ChatResponse(request.number, None, describe_error(error))
            if not readable:
                continue
            try:
                yield from self._complete(readable, conversations)
            except torch.OutOfMemoryError as error:
                raise GeneratorUnavailableError(
                    f"Out of memory in a batch of {len(readable)}. Lower `batch_size={self.batch_size}`."
                ) from error
            except Exception as error:
                if len(readable) == 1:
                    yield ChatResponse(readable[0].number, None, describe_error(error))
                    continue
                for request, conversation in zip(readable, conversations, strict=True):
                    try:
                        yield from self._complete([request], [conversation])
                    except Exception as single_error:
                        yield ChatResponse(request.number, None, describe_error(single_error))

    def refuse_control_tokens(self, texts: Iterable[str]) -> None:
        """
        Raises:
            `ValueError`: If a text contains a string that the tokenizer would read as a special token.
        """
        for text in texts:
            if found := self._control_token.search(text):
                raise ValueError(f"The text contains the control token {found.group()!r}: {shorten(text)}.")

    def encode(self, conversations: list[list[dict[str, Any]]]) -> "BatchFeature":
        """Tokenize conversations to left-padded model inputs, on the model's device and in its data type."""
        inputs = self.processing_class.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        # transformers annotates the result as text, which is right only without `tokenize`
        return inputs.to(self.model.device, self.model.dtype)  # pyright: ignore[reportAttributeAccessIssue]

    def _read(self, request: ChatRequest) -> list[dict[str, Any]]:
        messages = request.messages()
        self.refuse_control_tokens(message_texts(messages))
        return messages

    def _complete(self, requests: list[ChatRequest], conversations: list[list[dict]]) -> list[ChatResponse]:
        import torch

        inputs = self.encode(conversations)
        if self._generation["do_sample"]:
            torch.manual_seed(requests[0].seed)
        with torch.no_grad():
            # pyright binds `generate` neither to a model of transformers' auto classes nor to one of PEFT
            output_ids = self.model.generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                **inputs, **self._generation
            )
        completion_ids = output_ids[:, inputs["input_ids"].size(1) :]
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        ended = torch.isin(completion_ids, completion_ids.new_tensor(self.end_ids)).any(1).tolist()
        return [
            ChatResponse(request.number, text) if has_ended else cut_response(request.number, self.settings)
            for request, text, has_ended in zip(requests, texts, ended, strict=True)
        ]


def _weights_digest(model: "torch.nn.Module") -> str:
    """A digest of some elements of every weight. A model's name is not enough, since training does not change it."""
    import torch

    hasher = hashlib.blake2b(digest_size=8)
    for name, weight in model.state_dict().items():
        elements = weight.flatten()[:: max(1, weight.numel() // 64)]
        hasher.update(name.encode() + elements.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return hasher.hexdigest()
