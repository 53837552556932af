"""
A row with a blank image, for ranks without images in their batch when other ranks have some.

FSDP2 gathers the layers of a sharded vision tower from all ranks, in rollouts too, and the gradients of a vision tower
that trains are reduced over all ranks. Without the blank image, the other ranks would wait forever.
"""

from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from transformers import ProcessorMixin
from trl.data_utils import prepare_multimodal_messages


class BlankImageRow:
    """
    The row that is added to a text-only batch, so that its forward pass runs the vision tower.

    Args:
        processing_class ([`~transformers.ProcessorMixin`]):
            Processor of the model.
        image_token_id (`int`):
            Id of the image token.
        chat_template_kwargs (`dict`):
            Variables of the chat template.
    """

    def __init__(self, processing_class: ProcessorMixin, image_token_id: int, chat_template_kwargs: dict[str, Any]):
        self.processing_class = processing_class
        self.image_token_id = image_token_id
        self.chat_template_kwargs = chat_template_kwargs

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The row's model inputs, as a batch of one."""
        message = {"role": "user", "content": "-"}
        prompt = prepare_multimodal_messages([message], images=[Image.new("RGB", (64, 64))])
        inputs: Any = self.processing_class.apply_chat_template(  # annotated as `str`, but a dict of tensors here
            [prompt],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self.chat_template_kwargs,
        )
        return dict(inputs)

    @property
    def num_image_tokens(self) -> int:
        """Number of the row's visual tokens."""
        return int((self.inputs["input_ids"] == self.image_token_id).sum())

    def add_to_prompts(
        self, prompt_ids: list[list[int]], multimodal_fields: dict[str, Any]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """
        Append the row to the prompts of a rollout.

        Args:
            prompt_ids (`list[list[int]]`):
                Token ids of text-only prompts.
            multimodal_fields (`dict`):
                Other outputs of the processor: token types, or nothing.

        Returns:
            `tuple[list[list[int]], dict]`: The same with one more prompt.
        """
        blank: dict[str, Any] = dict(self.inputs)
        is_real = blank.pop("attention_mask")[0].bool()
        prompt_ids = [*prompt_ids, blank.pop("input_ids")[0][is_real].tolist()]
        for name in _token_type_names(blank):
            types = multimodal_fields.get(name, [[0] * len(ids) for ids in prompt_ids[:-1]])
            blank[name] = [*types, blank[name][0][is_real].tolist()]
        return prompt_ids, {**multimodal_fields, **blank}

    def add_to_batch(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, multimodal_inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """
        Append the row to a batch, and pad the shorter of the two on the left.

        Args:
            input_ids (`torch.Tensor` of shape `(batch, seq)`):
                Token ids of text-only samples.
            attention_mask (`torch.Tensor` of shape `(batch, seq)`):
                Their attention mask.
            multimodal_inputs (`dict`):
                Other model inputs: token types, `(batch, seq)`, or nothing.

        Returns:
            `tuple[torch.Tensor, torch.Tensor, dict]`: The same with one more row and its pixels.
        """
        blank = {name: value.to(input_ids.device) for name, value in self.inputs.items()}

        def stack(rows: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
            length = max(rows.shape[1], row.shape[1])
            return torch.cat([F.pad(part, (length - part.shape[1], 0)) for part in (rows, row.to(rows.dtype))])

        for name in _token_type_names(blank):
            blank[name] = stack(multimodal_inputs.get(name, torch.zeros_like(input_ids)), blank[name])
        return (
            stack(input_ids, blank.pop("input_ids")),
            stack(attention_mask, blank.pop("attention_mask")),
            {**multimodal_inputs, **blank},
        )


def _token_type_names(inputs: dict[str, Any]) -> list[str]:
    return [name for name in inputs if name.endswith("token_type_ids")]
