"""
Adds to TRL's trainers what prompts with images and videos need. Nothing here is specific to distillation. Each
workaround names the upstream issue; remove it once the oldest supported release has the fix.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import nn
from torch.nn import functional as F
from transformers.utils.generic import ModelOutput
from trl.trainer.utils import pad

from ..cue_recovery.positions import visual_token_ids
from ..data.messages import count_blocks
from .mixed_precision import autocast, compute_dtype
from .trl_trainer import TRLTrainer
from .vision.blank_image import BlankImageRow
from .vision.features import get_backbone, is_vision_frozen, lend_features, record_features, split_by_sample
from .vision.image_processing import images_processed_once
from .vision.videos import VIDEO_KEYS, split_videos


class MultimodalMixin(TRLTrainer):
    """
    A TRL trainer whose batches can mix prompts with images, with videos and with text alone.

    The prompts of its rows contain their images and videos, see [`~trl_vicur.data.examples.fill_prompt`].
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._vision_is_frozen = is_vision_frozen(self.model)
        self._blank_image_row = BlankImageRow(
            self.processing_class, self.model.config.image_token_id, self.chat_template_kwargs
        )
        # Parameters of `_get_last_hidden_state` after the token ids, e.g. `pixel_values`
        self._multimodal_keys = [*inspect.signature(super()._get_last_hidden_state).parameters][4:] + [*VIDEO_KEYS]

    @property
    def _vision_is_sharded(self) -> bool:
        """Whether a rank can encode images only if all ranks do."""
        return self.is_fsdp_enabled and self.accelerator.num_processes > 1

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # TRL#5373: TRL reads images only
        self._signature_columns += [name for name in ("videos", "video") if name not in self._signature_columns]

    # --- Rollouts ---

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        # TRL's `_generate_and_score_completions` processes a prompt's images for the rollout and again for the loss,
        # and ViCuRTrainer once more for the teacher's prompt. Remove once TRL reuses the fields of `_tokenize_prompts`
        with ExitStack() as stack:
            for name in ("image_processor", "video_processor"):
                if hasattr(self.processing_class, name):
                    stack.enter_context(images_processed_once(getattr(self.processing_class, name)))
            return super()._prepare_inputs(generation_batch)

    def _tokenize_prompts(self, prompts: list) -> tuple:
        # transformers#46759: Gemma 4's processor pads by default, and TRL would keep the padding in the prompts. Turn
        # padding off rather than strip it: a prompt may begin with a bos token that is also the pad token
        chat_template_kwargs = self.chat_template_kwargs
        processor_kwargs = {**chat_template_kwargs.get("processor_kwargs", {}), "padding": False}
        self.chat_template_kwargs = {**chat_template_kwargs, "processor_kwargs": processor_kwargs}
        # TRL#6718 also returns prompts for vLLM, with unexpanded images. `StudentGeneration` derives them itself
        try:
            prompt_ids, images, multimodal_fields, *for_vllm = super()._tokenize_prompts(prompts)
        finally:
            self.chat_template_kwargs = chat_template_kwargs
        if len(for_vllm) > 1:
            raise RuntimeError(
                f"`DistillationTrainer._tokenize_prompts` returns {3 + len(for_vllm)} values in TRL "
                f"{version('trl')}; trl-vicur {version('trl-vicur')} supports 3 or 4. Install "
                "`trl==1.16.*`, or a newer trl-vicur."
            )
        return prompt_ids, images, multimodal_fields, *(prompt_ids for _ in for_vllm)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        has_videos = "pixel_values_videos" in multimodal_fields
        # TRL suppresses the image token. A sampled video token would mismatch the video features (TRL#5373)
        suppressed = self.generation_kwargs["suppress_tokens"]
        if has_videos:
            suppressed = [*(suppressed or []), *visual_token_ids(self.model.config)]
        self.generation_config.suppress_tokens = suppressed
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        # transformers#37186: with FSDP, a rank without images would leave the other ranks' vision towers waiting
        needs_image = images is None and not has_videos and self._vision_is_sharded
        if needs_image:
            prompt_ids, multimodal_fields = self._blank_image_row.add_to_prompts(prompt_ids, multimodal_fields)
        with autocast(self.accelerator):  # accelerate wraps the forward of a PEFT model, not that of its base
            completion_ids = super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        return completion_ids[:-1] if needs_image else completion_ids

    def _generate(self, prompts: list) -> tuple:
        prompt_ids, completion_ids, tool_mask, images, *others = super()._generate(prompts)
        if any(_count_blocks(prompts, "video")):
            images = None  # TRL#5373: TRL would process them together with the prompts, but without the videos
        elif images is not None:
            # transformers#40263: for a prompt without images, processors expect an empty list, but TRL passes None
            images = [image_list or [] for image_list in images]
        return prompt_ids, completion_ids, tool_mask, images, *others

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        prompts = [row["prompt"] for row in inputs]
        if any(_count_blocks(prompts, "video")):
            output.update(self._visual_inputs(prompts, output))
        token_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)  # tools can return images, too
        output["num_image_tokens"] = (token_ids == self.model.config.image_token_id).sum(dim=1).tolist()
        if "video_grid_thw" in output:
            output["num_video_tokens"] = (token_ids == self.model.config.video_token_id).sum(dim=1).tolist()
        if "pixel_attention_mask" in output and "spatial_shapes" not in output:
            # Idefics and SmolVLM have one row of pixels per sample. TRL#6570 recognizes this by the number of rows,
            # so it would split them by image if there are as many images as samples
            del output["num_images"]
        return output

    def _visual_inputs(self, prompts: list, output: dict[str, Any]) -> dict[str, Any]:
        """The model inputs of images and videos that the rollout used (TRL#5373)."""
        _, _, fields, *_ = self._tokenize_prompts(prompts)
        inputs = {}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in fields:
                of_prompt = self._pad_left([list(types) for types in fields[name]])
                inputs[name] = F.pad(of_prompt, (0, output["completion_ids"].shape[1]))
        if "pixel_values" in fields:
            inputs |= {name: fields[name] for name in ("pixel_values", "image_grid_thw")}
            inputs["num_images"] = _count_blocks(prompts, "image")
        inputs |= split_videos(fields, _count_blocks(prompts, "video"))
        return {name: send_to_device(value, self.accelerator.device) for name, value in inputs.items()}

    def _pad_left(self, sequences: list[list[int]], padding_value: int = 0) -> torch.Tensor:
        return pad(
            [torch.tensor(sequence) for sequence in sequences],
            padding_value=padding_value,
            padding_side="left",
            pad_to_multiple_of=self.pad_to_multiple_of,
        ).to(self.accelerator.device)

    # --- Forward passes ---

    def _completion_hidden_states(
        self, model: nn.Module, inputs: dict[str, Any], shares_features: bool
    ) -> torch.Tensor:
        """
        Hidden states that predict the completion tokens, `(batch, completion, hidden)`. If `shares_features`, images
        and videos are encoded only if no earlier pass over this batch has done so.
        """
        with self._shared_features(model, inputs, shares_features) as encodes_images:
            input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            completion_length = inputs["completion_ids"].size(1)
            fields = self._multimodal_inputs(inputs)
            # Ranks wait for each other to gather shards of the vision tower, and to reduce its gradients
            # (transformers#37186)
            needs_gradients = torch.is_grad_enabled() and not self._vision_is_frozen
            is_gathered = self._vision_is_sharded or (needs_gradients and self.accelerator.num_processes > 1)
            has_visuals = "pixel_values" in fields or "pixel_values_videos" in fields
            if has_visuals or not (encodes_images and is_gathered):
                return self._get_last_hidden_state(model, input_ids, attention_mask, completion_length, **fields)
            input_ids, attention_mask, fields = self._blank_image_row.add_to_batch(input_ids, attention_mask, fields)
            fields = {key: fields[key] for key in self._multimodal_keys if key in fields}
            return self._get_last_hidden_state(model, input_ids, attention_mask, completion_length, **fields)[:-1]

    def _multimodal_inputs(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        # This micro-batch may have no images or videos, even if the generation batch has some
        has_images, has_videos = (any(inputs.get(f"num_{kind}_tokens", [])) for kind in ("image", "video"))
        multimodal_inputs = {}
        for key in self._multimodal_keys:
            if key in VIDEO_KEYS:
                if has_videos and key in inputs:
                    multimodal_inputs[key] = torch.cat(inputs[key])
            elif key in inputs and (has_images or key.endswith("token_type_ids")):
                multimodal_inputs[key] = inputs[key]
        return multimodal_inputs

    def _get_last_hidden_state(self, unwrapped_model, *args, **multimodal_inputs):
        # TRL#5373: TRL's method accepts no video inputs
        videos = {key: multimodal_inputs.pop(key) for key in VIDEO_KEYS if key in multimodal_inputs}
        with ExitStack() as stack:
            if videos:
                hook = get_backbone(unwrapped_model).register_forward_pre_hook(
                    lambda backbone, args, kwargs: (args, {**kwargs, **videos}), with_kwargs=True
                )
                stack.callback(hook.remove)
            with autocast(self.accelerator):
                states = super()._get_last_hidden_state(unwrapped_model, *args, **multimodal_inputs)
        # Autocast would pass them to the head in this dtype, so the losses see the distribution that is sampled from
        return states.to(compute_dtype(self.accelerator) or states.dtype)

    # --- Features of images and videos, computed once for all passes with the same vision weights ---

    @contextmanager
    def _shared_features(self, model: nn.Module, inputs: dict[str, Any], is_shared: bool) -> Iterator[bool]:
        """
        If `is_shared`, the model reuses the batch's features while this is active. If the batch has none yet, the
        model encodes its images and the features are added to the batch. Yields whether the model encodes images.
        """
        features = {kind: inputs[f"{kind}_features"] for kind in ("image", "video") if f"{kind}_features" in inputs}
        if not is_shared:
            yield True
        elif features:
            with lend_features(model, features):
                yield False
        else:
            with record_features(model) as recorded:
                yield True
            self._add_features(recorded, inputs)

    def _add_features(self, recorded: dict[str, list[ModelOutput]], inputs: dict[str, Any]) -> None:
        """Add features to a batch, by sample, so that they are shuffled, split and freed with it."""
        num_samples = len(inputs["num_image_tokens"])
        num_tokens = {kind: inputs.get(f"num_{kind}_tokens", [0] * num_samples) for kind in ("image", "video")}
        if not any(map(any, num_tokens.values())) and self._vision_is_sharded:
            num_tokens["image"] = [*num_tokens["image"], self._blank_image_row.num_image_tokens]
        samples = {}
        for kind, numbers in num_tokens.items():
            if any(numbers):
                outputs = recorded[kind]
                samples[kind] = split_by_sample(outputs[0], numbers) if len(outputs) == 1 else None
        has_features = bool(samples) and None not in samples.values()
        if self._vision_is_sharded:
            # If only some ranks encoded their images again, they would wait for the others forever
            has_features = all(gather_object([has_features]))
        if has_features:
            inputs.update({f"{kind}_features": of_kind[:num_samples] for kind, of_kind in samples.items()})


def _count_blocks(prompts: list[list[dict[str, Any]]], block_type: str) -> list[int]:
    """Number of images or videos in each prompt."""
    return [count_blocks(prompt, block_type) for prompt in prompts]
