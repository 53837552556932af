"""Finds the layers that carry a module, the positions of the sink and the visual tokens, and packed rows."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig


# Forward arguments that exist only for packed rows: for flash attention, and for linear attention (`seq_idx`)
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# transformers' names for layers in which a token sees only a limited number of the tokens before it
WINDOWED_LAYER_TYPES = ("sliding_attention", "chunked_attention", "conv")


# --- Layers ---


def carrying_layers(text_config: PreTrainedConfig, layer_interval: int) -> range:
    """
    Indices of the decoder layers whose inputs the modules update. The output of layer l after DeepStack is the input
    of layer l + 1, so updating the outputs of layers 0, 5, … means updating the inputs of layers 1, 6, …
    """
    return range(1, last_reading_layer(text_config) + 1, layer_interval)


def last_reading_layer(text_config: PreTrainedConfig) -> int:
    """
    Index of the last decoder layer through which a token far from the sink can read the sink's hidden state. A module
    after it has no effect on later tokens and gets almost no gradient.

    This is the model's last layer, unless the final layers use a sliding window (Gemma, LFM2) or reuse the keys and
    values of earlier layers (Gemma 4). If all layers are windowed, it is the last one with keys of its own.
    """
    settings = text_config.to_dict()
    with_own_keys = text_config.num_hidden_layers - (settings.get("num_kv_shared_layers") or 0)
    layer_types = (settings.get("layer_types") or [])[:with_own_keys]
    reading = [i for i, layer_type in enumerate(layer_types) if layer_type not in WINDOWED_LAYER_TYPES]
    return reading[-1] if reading else with_own_keys - 1


# --- Tokens ---


def visual_token_ids(config: PreTrainedConfig) -> list[int]:
    """Token ids that stand for pieces of images and videos in a model's input; empty for a text model."""
    # Read attributes, not `to_dict()`: some families store the ids under another name (LLaVA's `image_token_index`)
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return [token_id for token_id in ids if token_id is not None]


def find_sinks(
    input_ids: torch.Tensor, token_id: int | None, attention_mask: torch.Tensor | BlockMask | dict | None
) -> torch.Tensor:
    """
    Index of each sample's sink, `(batch,)`: the first real token if `token_id` is `None`, otherwise that token's first
    occurrence, or `-1` if it does not occur. For the arguments, see [`find_token`].
    """
    if token_id is None:
        return first_real_token(input_ids, attention_mask)
    return find_token(input_ids, token_id, attention_mask)


def first_real_token(input_ids: torch.Tensor, attention_mask: torch.Tensor | BlockMask | dict | None) -> torch.Tensor:
    """
    Index of the first token of each sample that is not padding.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq)`):
            Token ids.
        attention_mask (`torch.Tensor` of shape `(batch, seq)` or `(batch, 1, seq, keys)`, `BlockMask`, or `dict`):
            Attention mask as the model gets it, or a dict with one mask per attention type, which `generate` builds
            for a static cache; `None` if there is no padding.

    Returns:
        `torch.Tensor` of shape `(batch,)`: The indices.
    """
    if attention_mask is None:
        return input_ids.new_zeros(input_ids.shape[0])
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        is_real = attention_mask
    else:
        is_real = is_seen_by_next(input_ids, attention_mask)
    if is_real.dtype == torch.bool:  # pytorch#35529: `argmax` does not support bool
        is_real = is_real.view(torch.uint8)
    # `argmax` returns the first of equal values
    return is_real.argmax(dim=1).expand(input_ids.shape[0])


def find_token(
    input_ids: torch.Tensor, token_id: int, attention_mask: torch.Tensor | BlockMask | dict | None = None
) -> torch.Tensor:
    """
    Index of a token's first occurrence in each sample. Padding is ignored, because the padding token may be the same.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq)`):
            Token ids.
        token_id (`int`):
            The token to look for.
        attention_mask (`torch.Tensor`, `BlockMask` or `dict`, *optional*):
            As for [`first_real_token`].

    Returns:
        `torch.Tensor` of shape `(batch,)`: The indices; `-1` if the token does not occur.
    """
    matches = input_ids == token_id
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        matches = matches & attention_mask.bool()
    elif attention_mask is not None:  # a pairwise mask, which `generate` builds from left padding
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        matches = matches & (index >= first_real_token(input_ids, attention_mask).unsqueeze(1))
    return torch.where(matches.any(dim=1), matches.view(torch.uint8).argmax(dim=1), -1)


def is_seen_by_next(input_ids: torch.Tensor, attention_mask: torch.Tensor | BlockMask | dict) -> torch.Tensor:
    """
    Whether the next token can attend to each token, `(batch, seq - 1)`. It cannot if either is padding or if they
    belong to different samples; otherwise it can, in every attention type, however short the window.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq)`):
            Token ids.
        attention_mask (`torch.Tensor` of shape `(batch, seq)` or `(batch, 1, seq, keys)`, `BlockMask`, or `dict`):
            As for [`first_real_token`].
    """
    num_samples, length = input_ids.shape
    if isinstance(attention_mask, dict):
        return is_seen_by_next(input_ids, attention_mask.get("full_attention", next(iter(attention_mask.values()))))
    if isinstance(attention_mask, BlockMask):
        sample = torch.arange(num_samples, device=input_ids.device).unsqueeze(1)
        index = torch.arange(length - 1, device=input_ids.device)
        is_seen = attention_mask.mask_mod(sample, torch.zeros_like(sample), index + 1, index)
    elif attention_mask.ndim == 2:
        is_real = attention_mask.bool()
        is_seen = is_real[:, 1:] & is_real[:, :-1]
    else:  # visible is `True` in a boolean mask, 0 in an additive one
        is_seen = attention_mask[:, 0].diagonal(-1, dim1=1, dim2=2)[:, : length - 1]
        is_seen = is_seen if is_seen.dtype == torch.bool else is_seen == 0
    return is_seen.expand(num_samples, length - 1)


def packed_rows(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | dict | None,
    position_ids: torch.Tensor | None,
    uses_flash_attention: bool = False,
) -> torch.Tensor | None:
    """
    Find rows that hold several samples, from the arguments that transformers itself uses to infer sample boundaries.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq)`):
            Token ids.
        attention_mask (`torch.Tensor` of shape `(batch, seq)` or `(batch, 1, seq, keys)`, `BlockMask`, or `dict`):
            As for [`first_real_token`].
        position_ids (`torch.Tensor` of shape `(batch, seq)`, `(3, batch, seq)` or `(4, batch, seq)`):
            Positions as the backbone gets them: text positions, Qwen-VL's three axes, or both; `None` if the backbone
            computes them itself.
        uses_flash_attention (`bool`, *optional*, defaults to `False`):
            Whether the model uses flash attention, which ignores a mask of ones and then reads the positions.

    Returns:
        `torch.Tensor` of shape `(batch,)` or `None`: Whether each row is packed; `None` if the arguments cannot
            express packing.
    """
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        # A pairwise mask is enough: a row is packed if it has several runs of tokens that see each other
        is_seen = is_seen_by_next(input_ids, attention_mask)
        begins = is_seen[:, 1:] & ~is_seen[:, :-1]
        return begins.sum(dim=1) + is_seen[:, 0] > 1
    if position_ids is None or not (attention_mask is None or uses_flash_attention):
        return None
    steps = (position_ids if position_ids.ndim == 2 else position_ids[0]).diff(dim=1)
    # Qwen-VL's first axis, time, is constant within an image and then jumps by its size, so only a step back counts
    restarts = steps < 0 if position_ids.ndim == 3 and len(position_ids) == 3 else steps != 1
    if attention_mask is not None:  # positions of padding are arbitrary
        restarts = restarts & is_seen_by_next(input_ids, attention_mask)
    return restarts.any(dim=1).expand(input_ids.shape[0])


def refuse_packed_rows(
    input_ids: torch.Tensor, visual_mask: torch.Tensor, arguments: Mapping[str, Any], uses_flash_attention: bool
) -> None:
    """
    Refuse a forward call in which a row with images holds several samples.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq)`):
            Token ids.
        visual_mask (`torch.Tensor` of shape `(batch, seq)`):
            `True` at image and video tokens.
        arguments (`Mapping[str, Any]`):
            All arguments of the call, by name.
        uses_flash_attention (`bool`):
            As for [`packed_rows`].

    Raises:
        `ValueError`: If there is such a row.
    """
    mask, position_ids = arguments.get("attention_mask"), arguments.get("position_ids")
    if any(arguments.get(name) is not None for name in PACKING_ARGUMENTS):
        is_packed = visual_mask.any(dim=1)
    else:
        is_packed = packed_rows(input_ids, mask, position_ids, uses_flash_attention)
    if is_packed is None:
        return  # the common case, without a synchronization with the device
    if rows := torch.nonzero(is_packed & visual_mask.any(dim=1)).flatten().tolist():
        raise ValueError(
            f"Row(s) {rows} of the batch hold images and several samples: positions restart within the row, its "
            f"attention mask separates parts of it, or the call has one of {', '.join(PACKING_ARGUMENTS)}. Cue "
            "recovery expects one sample per row and would mix their images. Pad the samples instead of packing "
            "them (no `packing`, no `padding_free`, no continuous batching)."
        )


def read_later(mask: torch.Tensor) -> Callable[[], torch.Tensor]:
    """
    Return a function that returns the mask on the CPU. For a GPU tensor, the copy starts now and the function waits
    for this copy only; a copy that starts later would also wait for all work queued in between.
    """
    if not mask.is_cuda:
        return lambda: mask
    copy = mask.to("cpu", non_blocking=True)  # into pinned memory
    is_copied = torch.cuda.current_stream(mask.device).record_event()

    def read() -> torch.Tensor:
        is_copied.synchronize()
        return copy

    return read
