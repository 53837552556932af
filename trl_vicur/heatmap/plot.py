"""Draw the sink's attention over images and video frames, one row of panels for each."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from PIL import ImageOps
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from ..cue_recovery import sink_attention
from ..data.images import read_image
from ..data.messages import check_messages, control_token_pattern, message_texts
from ..data.rows import shorten
from ..extras import needs_extra
from .visual_tokens import AttendedPicture, attended_pictures


with needs_extra("heatmap", "Drawing heat maps"):
    from matplotlib.colors import Normalize, TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage


MAX_COLUMNS = 5  # keeps a figure legible at page width; further panels wrap onto more lines
PANEL_WIDTH = 1.9  # inches
MAX_ASPECT = 1.5  # height / width of a panel
MAX_PIXELS = 1024  # per side; more would not be visible


class Panels(NamedTuple):
    """
    An empty figure.

    Args:
        figure ([`~matplotlib.figure.Figure`]):
            The figure.
        axes (`numpy.ndarray` of shape `(lines, columns)`):
            All of its axes.
        rows (`list[numpy.ndarray]`):
            The axes of each picture, as many as there are panels.
        height (`float`):
            Sum of the heights of all lines, in inches.
    """

    figure: Figure
    axes: np.ndarray
    rows: list[np.ndarray]
    height: float


def plot_sink_attention(
    model: PeftModel | PreTrainedModel,
    processing_class: ProcessorMixin,
    messages: list[dict[str, Any]],
    **chat_template_kwargs,
) -> Figure:
    """
    Draw what the sink token attends to: its attention over the images and videos of a conversation (ViCuR, Fig. 11),
    averaged over heads, for each layer that carries a module and averaged over these layers.

    The attention is relative to uniform attention: `1` is what each visual token of the conversation would get if all
    got the same. All panels share this scale.

    Args:
        model ([`~peft.PeftModel`]):
            A model with an active [`CueRecoveryConfig`] adapter.
        processing_class ([`~transformers.ProcessorMixin`]):
            Its processor.
        messages (`list[dict]`):
            A conversation that ends in a user turn. Its images are in blocks `{"type": "image", "image": ...}`, as PIL
            images, paths or URLs; its videos in any form that the processor accepts.
        chat_template_kwargs:
            Keyword arguments for the chat template, the same as in generation.

    Returns:
        [`~matplotlib.figure.Figure`]: A row of panels for each image, and for each group of video frames that share
            their visual tokens; a row of many panels wraps onto several lines. Axis units are the picture's original
            pixels.

    Raises:
        `ValueError`: If the model has no active cue recovery adapter, if the prompt has no visual tokens or no sink
            token, if a text contains a control token, or if the processor does not report the grid of the visual
            tokens.
    """
    layers, pictures = attend(model, processing_class, messages, **chat_template_kwargs)
    titles = ["", *layers, "mean over layers"] if len(layers) > 1 else ["", *layers]
    # At least the range 0 to 2, so that noise in near-uniform attention does not look like structure
    max_attention = max(2.0, *(attended.attention.max().item() for attended in pictures))
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=max_attention)
    panels = make_panels([attended.picture.height / attended.picture.width for attended in pictures], len(titles))
    drawn = [draw_heat_maps(row, attended, norm) for row, attended in zip(panels.rows, pictures, strict=True)]
    has_wrapped = len(panels.axes) > len(pictures)
    for row in panels.rows if has_wrapped else panels.rows[:1]:
        for axis, title in zip(row, titles, strict=True):
            axis.set_title(title, fontsize=9)
    if len(pictures) > 1:
        for row, attended in zip(panels.rows, pictures, strict=True):
            row[0].set_ylabel(attended.name, fontsize=9)
    add_colorbar(panels, drawn[-1], max_attention)
    return panels.figure


def make_panels(aspects: list[float], num_panels: int) -> Panels:
    """Make an empty figure with `num_panels` panels for each picture; `aspects` are their height / width."""
    num_lines = math.ceil(num_panels / MAX_COLUMNS)
    num_columns = math.ceil(num_panels / num_lines)
    line_aspects = [min(aspect, MAX_ASPECT) for aspect in aspects for _ in range(num_lines)]
    num_titles = 1 if num_lines == 1 else len(line_aspects)
    height = PANEL_WIDTH * sum(line_aspects)
    figure = Figure(figsize=(PANEL_WIDTH * num_columns + 1.0, height + 0.3 * num_titles), layout="constrained")
    axes = figure.subplots(len(line_aspects), num_columns, squeeze=False, height_ratios=line_aspects)
    rows = list(axes.reshape(len(aspects), num_lines * num_columns))
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row in rows:
        for axis in row[num_panels:]:
            axis.set_axis_off()
    return Panels(figure, axes, [row[:num_panels] for row in rows], height)


def draw_heat_maps(row: np.ndarray, attended: AttendedPicture, norm: Normalize) -> AxesImage:
    """Draw a picture, and the attention of each layer over it; returns the last heat map."""
    extent = (0, attended.picture.width, attended.picture.height, 0)
    picture = attended.picture.copy()
    picture.thumbnail((MAX_PIXELS, MAX_PIXELS))
    row[0].imshow(picture, extent=extent)
    attention = attended.attention
    if len(attention) > 1:
        attention = torch.cat([attention, attention.mean(dim=0, keepdim=True)])
    # Light greys under the heat maps, because colour and darkness show attention
    grey = ImageOps.autocontrast(picture.convert("L"))
    drawn = []
    for axis, heat_map in zip(row[1:], attention.numpy(), strict=True):
        axis.imshow(grey, cmap="gray", vmin=-255, vmax=255, extent=extent)
        drawn.append(
            axis.imshow(heat_map, cmap="RdBu_r", norm=norm, alpha=0.6, interpolation="nearest", extent=extent)
        )
    return drawn[-1]


def add_colorbar(panels: Panels, heat_map: AxesImage, max_attention: float) -> None:
    """Add the scale that all heat maps share."""
    ticks = [0, 0.5, 1, (1 + max_attention) / 2, max_attention]
    colorbar = panels.figure.colorbar(heat_map, ax=panels.axes, ticks=ticks, aspect=panels.height / 0.12)
    colorbar.ax.yaxis.set_major_formatter("{x:.3g}")
    colorbar.ax.tick_params(labelsize=9)
    colorbar.set_label("attention ÷ uniform", fontsize=9)


def attend(
    model: PeftModel | PreTrainedModel,
    processing_class: ProcessorMixin,
    messages: list[dict[str, Any]],
    **chat_template_kwargs,
) -> tuple[list[str], list[AttendedPicture]]:
    """
    The names of the layers that carry a module, and the pictures with the attention of each layer, relative to
    uniform. Arguments and errors are the same as in [`plot_sink_attention`].
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
    )
    assert isinstance(inputs, BatchFeature)  # because of `return_dict`
    inputs = inputs.to(model.device, model.dtype)
    weights = sink_attention(model, **inputs)
    if not weights:
        raise ValueError(
            f"The {type(model).__name__} has no active cue recovery adapter. Load one with "
            "`PeftModel.from_pretrained`, or attach a new one with `get_peft_model(model, CueRecoveryConfig())`."
        )
    attention = torch.stack([of_layer[0].mean(dim=0).cpu() for of_layer in weights.values()])
    pictures = attended_pictures(attention, inputs.data, images, model.config, processing_class)
    if not pictures:
        raise ValueError(
            "The prompt has no image or video, so there is nothing to attend to. Add a block "
            "`{'type': 'image', 'image': ...}` to the conversation."
        )
    if not attention.any():
        raise ValueError(
            "The sink is the only visual token of the prompt, so the module does nothing. Use a larger image."
        )
    num_tokens = sum(attended.attention[0].numel() for attended in pictures)
    return list(weights), [each._replace(attention=each.attention * num_tokens) for each in pictures]


def load_images(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list]:
    """Load the images of the messages, so that the figure shows the images that the processor gets."""
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
