"""A teacher on a vLLM server, which scores completions as soon as they are sampled."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import ProcessorMixin

from ...hub.names import hub_model_name
from .scores import ServedScores
from .teacher import Model, Teacher
from .teacher_server import ScoringRequest, TeacherServer


class ServedTeacher(Teacher):
    """
    A teacher that a vLLM server runs.

    Args:
        server ([`TeacherServer`]):
            Client of the server.
        processing_class ([`~transformers.ProcessorMixin`]):
            Processor of the student.
        chat_template_kwargs (`dict`):
            Variables of the chat template.
    """

    def __init__(self, server: TeacherServer, processing_class: ProcessorMixin, chat_template_kwargs: dict[str, Any]):
        self.server = server
        self.processing_class = processing_class
        self.chat_template_kwargs = chat_template_kwargs
        self.description = hub_model_name(server.model) or "another model"

    def prepare(self, conversations: Sequence[list[dict[str, Any]]], batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """
        Get the server's log-probabilities of the completion tokens, `(batch, completion)`, and, in `"topk_logits"`,
        the log-probabilities and ids of the most likely tokens, `(batch, completion, k)`; zero on padding.
        """
        texts = self.processing_class.apply_chat_template(
            conversation=list(conversations), add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
        )
        short_prompt_ids = self.processing_class.tokenizer(texts, add_special_tokens=False)["input_ids"]
        name = "teacher_prompt" if "teacher_prompt_ids" in batch else "prompt"
        requests = []
        for row, conversation in enumerate(conversations):
            prompt_ids = batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()].tolist()
            completion_ids = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            blocks = [block for message in conversation for block in message["content"]]
            images = [block["image"] for block in blocks if block["type"] == "image"]
            requests.append(ScoringRequest(prompt_ids, short_prompt_ids[row], images, completion_ids))
        scores = self.server.score(requests)

        mask = batch["completion_mask"].bool()
        tensors = {"teacher_logprobs": _pad([each.logprobs for each in scores], mask, torch.float32)}
        if self.server.top_k:
            tensors["teacher_top_logprobs"] = _pad([each.top_logprobs for each in scores], mask, torch.float32)
            tensors["teacher_top_ids"] = _pad([each.top_ids for each in scores], mask, torch.long)
        return tensors

    def score(self, student: Model, inputs: dict[str, Any]) -> ServedScores:
        top = None
        if self.server.top_k:
            top = inputs["teacher_top_logprobs"], inputs["teacher_top_ids"]
        return ServedScores(inputs["teacher_logprobs"], top)


def _pad(values: list[list], mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Turn each completion's values into a tensor `(batch, completion, …)`, zero where the mask is `False`."""
    tensor = torch.tensor([value for completion in values for value in completion], dtype=dtype)
    padded = torch.zeros(*mask.shape, *tensor.shape[1:], dtype=dtype, device=mask.device)
    padded[mask] = tensor.to(mask.device)
    return padded
