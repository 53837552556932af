import math
from typing import Any

import torch
from PIL import ImageOps
from transformers import PreTrainedModel, ProcessorMixin

from ..cue_recovery import sink_attention
from ..data.images import read_image
from ..data.messages import check_messages, control_token_pattern, message_texts
from ..data.rows import shorten
from ..extras import needs_extra
from .visual_tokens import AttendedPicture, attended_pictures


with needs_extra("heatmap", "Drawing heat maps"):
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure


MAX_COLUMNS = 5  # so that a figure in the width of a page stays legible; more panels go into further lines
PANEL_WIDTH = 1.9  # inches
MAX_ASPECT = 1.5  # height / width of a panel
MAX_PIXELS = 1024  # on a side; more would not be seen


def plot_sink_attention(
    model: PreTrainedModel, processing_class: ProcessorMixin, messages: list[dict[str, Any]], **chat_template_kwargs
) -> Figure:
    """
    Draw what the sink token looks at: its attention over the images and videos of a conversation (ViCuR, Fig. 11),
    averaged over heads, for each layer that carries a module and averaged over these layers.

    The attention is relative to a sink that looks everywhere alike: 1 is what each visual token of the conversation
    would get then. All panels share this scale.

    Args:
        model ([`~peft.PeftModel`]):
            A model with an active [`CueRecoveryConfig`] adapter.
        processing_class ([`~transformers.ProcessorMixin`]):
            Its processor.
        messages (`list[dict]`):
            A conversation that ends in a user turn. Its images are in blocks `{"type": "image", "image": ...}`, as PIL
            images, paths or URLs; its videos in any form that the processor takes.
        chat_template_kwargs:
            Keyword arguments for the chat template, the same as in generation.

    Returns:
        [`~matplotlib.figure.Figure`]: A row of panels for each image, and for each group of video frames that share
            their visual tokens; a row of many panels is broken into lines. The axes count the picture's own pixels.

    Raises:
        `ValueError`: If the model has no active adapter of cue recovery, if the prompt has nothing to look at or no
            sink token, if a text holds a control token, or if the model's visual tokens do not lie on a grid that its
            processor tells.
    """
    layers, pictures = attend(model, processing_class, messages, **chat_template_kwargs)
    titles = ["", *layers, "mean over layers"] if len(layers) > 1 else ["", *layers]
    # Never narrower than from 0 to 2, or the noise of an attention that is next to uniform would look like an interest
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max(2.0, *(attended.attention.max().item() for attended in pictures)))

    num_lines = math.ceil(len(titles) / MAX_COLUMNS)
    num_columns = math.ceil(len(titles) / num_lines)
    aspects = [
        min(each.picture.height / each.picture.width, MAX_ASPECT) for each in pictures for _ in range(num_lines)
    ]
    num_titles = 1 if num_lines == 1 else len(aspects)
    figure = Figure(
        figsize=(PANEL_WIDTH * num_columns + 1.0, PANEL_WIDTH * sum(aspects) + 0.3 * num_titles), layout="constrained"
    )
    axes = figure.subplots(len(aspects), num_columns, squeeze=False, height_ratios=aspects)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for number, attended in enumerate(pictures):
        row = axes[number * num_lines : (number + 1) * num_lines].flatten()
        for axis in row[len(titles) :]:
            axis.set_axis_off()
        extent = (0, attended.picture.width, attended.picture.height, 0)
        picture = attended.picture.copy()
        picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
        row[0].imshow(picture, extent=extent)
        if len(pictures) > 1:
            row[0].set_ylabel(attended.name, fontsize=9)
        attention = attended.attention
        if len(layers) > 1:
            attention = torch.cat([attention, attention.mean(dim=0, keepdim=True)])
        # Light greys beneath the heat maps, where colour and darkness mean attention
        grey = ImageOps.autocontrast(picture.convert("L"))
        for axis, heat_map in zip(row[1:], attention.numpy(), strict=False):
            axis.imshow(grey, cmap="gray", vmin=-255, vmax=255, extent=extent)
            drawn = axis.imshow(heat_map, cmap="RdBu_r", norm=norm, alpha=0.6, interpolation="nearest", extent=extent)
        if number == 0 or num_lines > 1:
            for axis, title in zip(row, titles, strict=False):
                axis.set_title(title, fontsize=9)
    ticks = [0, 0.5, 1, (1 + norm.vmax) / 2, norm.vmax]
    colorbar = figure.colorbar(drawn, ax=axes, ticks=ticks, aspect=PANEL_WIDTH * sum(aspects) / 0.12)
    colorbar.ax.yaxis.set_major_formatter("{x:.3g}")
    colorbar.ax.tick_params(labelsize=9)
    colorbar.set_label("attention ÷ uniform", fontsize=9)
    return figure


def attend(
    model: PreTrainedModel, processing_class: ProcessorMixin, messages: list[dict[str, Any]], **chat_template_kwargs
) -> tuple[list[str], list[AttendedPicture]]:
    """
    The layers that carry a module, and the attention, relative to uniform, that is paid at each of them. Arguments and
    errors as of [`plot_sink_attention`].
    """
    check_messages(messages)
    control_token = control_token_pattern(processing_class)
    for text in message_texts(messages):
        if found := control_token.search(text):
            raise ValueError(f"The text contains the control token {found.group()!r}: {shorten(text)}.")
    messages, images = load_images(messages)
    inputs = processing_class.apply_chat_template(
        [messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **chat_template_kwargs,
    ).to(model.device, model.dtype)
    weights = sink_attention(model, **inputs)
    if not weights:
        raise ValueError(
            f"The {type(model).__name__} has no active adapter of cue recovery. Load one with "
            "`PeftModel.from_pretrained`, or attach a new one with `get_peft_model(model, CueRecoveryConfig())`."
        )
    attention = torch.stack([of_layer[0].mean(dim=0).cpu() for of_layer in weights.values()])
    pictures = attended_pictures(attention, inputs, images, model.config, processing_class)
    if not pictures:
        raise ValueError(
            "There is no image or video in the prompt, so there is nothing to look at. Add a block "
            "`{'type': 'image', 'image': ...}` to the conversation."
        )
    if not attention.any():
        raise ValueError(
            "The sink is the only visual token of the prompt, so the module does nothing. Use a larger image."
        )
    num_tokens = sum(attended.attention[0].numel() for attended in pictures)
    return list(weights), [each._replace(attention=each.attention * num_tokens) for each in pictures]


def load_images(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list]:
    """The messages with their images read, so that what is drawn is what the processor gets, and these images."""
    loaded, images = [], []
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            content = [
                {**block, "image": read_image(block["image"])} if block["type"] == "image" else block
                for block in content
            ]
            images += [block["image"] for block in content if block["type"] == "image"]
        loaded.append({**message, "content": content})
    return loaded, images
