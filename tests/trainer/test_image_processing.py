"""A batch's images are processed once, with the same pixels as when they are processed for each use."""

from unittest.mock import patch

import pytest
import torch
from tiny_families import FAMILIES, each_of
from tiny_models import make_image
from tiny_recovery_models import conversations
from tiny_trainers import make_trainer

from trl_vicur.trainer.vision.image_processing import images_processed_once


def values(outputs) -> list:
    """The contents of outputs, with their types."""
    if isinstance(outputs, torch.Tensor):
        return [outputs.dtype, outputs.tolist()]
    if isinstance(outputs, list | tuple):
        return [type(outputs), *(values(output) for output in outputs)]
    return [outputs]


@each_of(FAMILIES)
def test_processing_once_gives_the_same_pixels(family):
    _, processor = FAMILIES[family]()
    prompts = conversations()
    images = [[part["image"] for part in prompt[0]["content"] if part["type"] == "image"] for prompt in prompts]
    texts = processor.apply_chat_template(prompts, tokenize=False)

    def outputs():  # TRL's calls, and another one for the teacher
        template = dict(add_generation_prompt=True, tokenize=True, return_dict=True)
        yield processor.apply_chat_template(prompts, **template)
        yield processor(images=images, text=texts, padding=True, return_tensors="pt")
        yield processor.apply_chat_template(prompts, **template)

    expected = [{name: values(value) for name, value in output.items()} for output in outputs()]
    preprocess = type(processor.image_processor).preprocess
    with (
        patch.object(type(processor.image_processor), "preprocess", autospec=True, side_effect=preprocess) as work,
        images_processed_once(processor.image_processor),
    ):
        assert [{name: values(value) for name, value in output.items()} for output in outputs()] == expected
    # Lists and stacked tensors are processed separately
    assert work.call_count == (1 if family.startswith(("qwen", "glm")) else 2)


def test_different_images_or_arguments_are_not_mixed_up(processor):
    image_processor = processor.image_processor
    calls = [
        ([make_image(0)], {}),
        ([make_image(1)], {}),
        ([make_image(0), make_image(1)], {}),
        ([make_image(0)], dict(do_normalize=False)),
        ([make_image(0)], dict(return_tensors="np")),
    ]
    expected = [image_processor(images, **arguments) for images, arguments in calls]
    with images_processed_once(image_processor):
        for (images, arguments), output in zip(2 * calls, 2 * expected, strict=True):
            result = image_processor(images, **arguments)
            assert type(result["pixel_values"]) is type(output["pixel_values"])
            assert result["pixel_values"].tolist() == output["pixel_values"].tolist()
    assert "preprocess" not in vars(image_processor)


@pytest.mark.parametrize("mode", ["train", "evaluate"])
def test_batch_is_processed_once(tmp_path, processor, mode):
    trainer = make_trainer(tmp_path, processor, max_steps=2, per_device_eval_batch_size=4)
    trainer.eval_dataset = trainer.train_dataset
    preprocess = type(processor.image_processor).preprocess
    with patch.object(type(processor.image_processor), "preprocess", autospec=True, side_effect=preprocess) as work:
        getattr(trainer, mode)()
    assert work.call_count == len(trainer.train_dataset) // 4
