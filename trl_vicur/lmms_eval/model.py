"""The model `trl_vicur` for lmms-eval."""

from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LogitsProcessor,
    LogitsProcessorList,
)

from ..generation.end_tokens import end_token_ids


class PresencePenalty(LogitsProcessor):
    """
    Lowers the logits of tokens that are already in the completion. The prompt does not count, as in vLLM and OpenAI's
    API.

    Args:
        penalty (`float`):
            Subtracted once from the logit of each such token.
        prompt_length (`int`):
            Length of the prompt in tokens, padding included.
    """

    def __init__(self, penalty: float, prompt_length: int):
        self.penalty = penalty
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """`input_ids` are `(batch, seq)`, `scores` `(batch, vocabulary)`."""
        is_present = torch.zeros_like(scores, dtype=torch.bool)
        is_present.scatter_(1, input_ids[:, self.prompt_length :], True)
        return scores - self.penalty * is_present


class ViCuRModel(lmms):
    """
    A base model with a cue recovery adapter, another PEFT adapter, or no adapter, for lmms-eval's image and video
    tasks: `lmms_eval --model trl_vicur --model_args pretrained=…,adapter=…`.

    Decoding follows the paper's evaluation (ViCuR, App. A) and ignores a task's `generation_kwargs`, so that all
    benchmarks are decoded in the same way. Use `model_args` to change it.

    Args:
        pretrained (`str`):
            Id or folder of the base model.
        adapter (`str`, *optional*):
            Id or folder of its adapter.
        revision (`str`, *optional*):
            Revision of the base model.
        dtype (`str`, *optional*, defaults to `"auto"`):
            Data type to load the model in.
        device (`str`, *optional*):
            Device, e.g. `"cuda:0"`; by default the device of this process.
        batch_size (`int`, *optional*, defaults to `1`):
            Requests per batch.
        system_prompt (`str`, *optional*, defaults to `"You are a helpful assistant."`):
            System turn of each conversation, unless the task has its own (in DynaMath and We-Math, that turn asks for
            the format that is scored).
        temperature (`float`, *optional*, defaults to `0.7`):
            Sampling temperature; 0 is greedy.
        top_p (`float`, *optional*, defaults to `0.8`):
            Total probability of the tokens to sample from (nucleus sampling).
        top_k (`int`, *optional*, defaults to `20`):
            Number of tokens to sample from.
        presence_penalty (`float`, *optional*, defaults to `1.5`):
            See [`PresencePenalty`].
        max_new_tokens (`int`, *optional*, defaults to `4096`):
            Maximum length of a completion, in tokens.
        min_pixels (`int`, *optional*, defaults to `3584`), max_pixels (`int`, *optional*, defaults to `401408`):
            Images are scaled to a number of pixels in this range.
        min_frames (`int`, *optional*, defaults to `4`), max_frames (`int`, *optional*, defaults to `512`):
            Videos are sampled at the processor's rate, to a number of frames in this range.

    Raises:
        `ValueError`: If the batch size is not a number.
    """

    is_simple = False  # lmms-eval then passes conversations instead of texts with image placeholders

    def __init__(
        self,
        pretrained: str,
        adapter: str | None = None,
        revision: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        system_prompt: str = "You are a helpful assistant.",
        temperature: float = 0.7,
        top_p: float = 0.8,
        top_k: int = 20,
        presence_penalty: float = 1.5,
        max_new_tokens: int = 4096,
        min_pixels: int = 3584,
        max_pixels: int = 401408,
        min_frames: int = 4,
        max_frames: int = 512,
    ):
        super().__init__()
        if not str(batch_size).isdigit():
            raise ValueError(f"`batch_size` must be a number for the model trl_vicur, got {batch_size!r}.")
        self.accelerator = Accelerator()
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        self.processor = AutoProcessor.from_pretrained(pretrained, revision=revision)
        model = AutoModelForImageTextToText.from_pretrained(pretrained, revision=revision, dtype=dtype)
        # pyright does not bind methods that transformers decorates
        model = model.to(device or self.accelerator.device)  # pyright: ignore[reportArgumentType]
        end_ids = end_token_ids(model, self.processor.tokenizer)
        self.model = (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()
        self.batch_size = int(batch_size)
        self.system_prompt = system_prompt
        self.presence_penalty = presence_penalty
        self.generation_kwargs = {
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature > 0,
            "eos_token_id": end_ids,
        }
        if temperature > 0:
            self.generation_kwargs |= {"temperature": temperature, "top_p": top_p, "top_k": top_k}
        self.processor_kwargs = {
            "padding": True,
            "padding_side": "left",
            "images_kwargs": {"min_pixels": min_pixels, "max_pixels": max_pixels},
            "videos_kwargs": {"min_frames": min_frames, "max_frames": max_frames},
        }

    def _conversation(self, request: Instance) -> list[dict[str, Any]]:
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}, *messages]
        return ChatMessages(messages=messages).to_hf_messages()

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Complete the conversations of lmms-eval's requests, in order."""
        results = []
        progress = tqdm(total=len(requests), desc="Completing", unit="request", disable=self._rank != 0)
        for start in range(0, len(requests), self.batch_size):
            conversations = [self._conversation(request) for request in requests[start : start + self.batch_size]]
            inputs = self.processor.apply_chat_template(
                conversations,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=self.processor_kwargs,
            ).to(self.model.device, self.model.dtype)
            prompt_length = inputs["input_ids"].size(1)
            penalty = PresencePenalty(self.presence_penalty, prompt_length)
            with torch.inference_mode():
                # pyright binds `generate` neither to a model of transformers' auto classes nor to one of PEFT
                output_ids = self.model.generate(  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                    **inputs, **self.generation_kwargs, logits_processor=LogitsProcessorList([penalty])
                )
            completion_ids = output_ids[:, prompt_length:]
            texts = self.processor.batch_decode(completion_ids, skip_special_tokens=True)
            lengths = (completion_ids != self.processor.tokenizer.pad_token_id).sum(dim=1).tolist()
            for text, length in zip(texts, lengths, strict=True):
                results.append(GenerationResult(text=text, token_counts=TokenCounts(output_tokens=length)))
            progress.update(len(conversations))
        progress.close()
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[GenerationResult]:
        raise NotImplementedError("The model trl_vicur answers in one turn; choose tasks of `generate_until`.")

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("The model trl_vicur generates; choose tasks of `generate_until`.")
