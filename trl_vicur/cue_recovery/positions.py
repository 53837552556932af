"""Positions of the sink and the visual tokens, rows that hold several samples, and the layers that carry a module."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedConfig


# Forward arguments that only packed rows have: for flash attention, and for layers with a state (linear attention)
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
# Layers in which a token sees a limited number of the tokens before it, as transformers names them
WINDOWED_LAYER_TYPES = ("sliding_attention", "chunked_attention", "conv")


# --- Layers ---


def carrying_layers(text_config: PreTrainedConfig, layer_interval: int) -> range:
    """
    Indices of the decoder layers whose inputs modules update: the output of layer l after DeepStack is the input of
    layer l + 1.
    """
    return range(1, last_reading_layer(text_config) + 1, layer_interval)


def last_reading_layer(text_config: PreTrainedConfig) -> int:
    """
    Index of the last decoder layer through which a token far from the sink can read the sink's hidden state. A module
    after it has no effect on later tokens and gets almost no gradient.

    It is the last of all layers, except where layers look back over a window only (Gemma, LFM2) or use keys and values
    of earlier layers (Gemma 4). If every layer does, the window has to suffice.
    """
    settings = text_config.to_dict()
    with_own_keys = text_config.num_hidden_layers - (settings.get("num_kv_shared_layers") or 0)
    layer_types = (settings.get("layer_types") or [])[:with_own_keys]
    reading = [i for i, layer_type in enumerate(layer_types) if layer_type not in WINDOWED_LAYER_TYPES]
    return reading[-1] if reading else with_own_keys - 1


# --- Tokens ---


def visual_token_ids(config: PreTrainedConfig) -> list[int]:
    """Token ids that stand for pieces of images and videos in a model's input; empty for a text model."""
    # Attributes, not `to_dict()`: some families store them under another name (LLaVA's `image_token_index`)
    ids = (getattr(config, name, None) for name in ("image_token_id", "video_token_id"))
    return [token_id for token_id in ids if token_id is not None]


def find_sinks(
    input_ids: torch.Tensor, token_id: int | None, attention_mask: torch.Tensor | BlockMask | dict | None
) -> torch.Tensor:
    """
    Index of each sample's sink, `(batch,)`: the first real token if `token_id` is `None`, otherwise that token's first
    occurrence; `-1` if it does not occur. Arguments as for [`find_token`].
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
            Attention mask as the model gets it, or one per attention type, which `generate` builds for a static
            cache; `None` if there is no padding.

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
    Index of a token's first occurrence in each sample. Padding does not count: it may be the same token.

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
    elif attention_mask is not None:  # a mask for pairs of tokens, to which `generate` turns left padding
        index = torch.arange(input_ids.shape[1], device=input_ids.device)
        matches = matches & (index >= first_real_token(input_ids, attention_mask).unsqueeze(1))
    return torch.where(matches.any(dim=1), matches.view(torch.uint8).argmax(dim=1), -1)


def is_seen_by_next(input_ids: torch.Tensor, attention_mask: torch.Tensor | BlockMask | dict) -> torch.Tensor:
    """
    Whether each token is seen by the next one, `(batch, seq - 1)`. It is not if either is padding or if they belong to
    different samples; otherwise it is, in every attention type, however short its window.

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
    else:  # seen is `True`, or 0 in an additive mask
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
    Find rows that hold several samples, from the arguments by which transformers itself infers sample boundaries.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq)`):
            Token ids.
        attention_mask (`torch.Tensor` of shape `(batch, seq)` or `(batch, 1, seq, keys)`, `BlockMask`, or `dict`):
            As for [`first_real_token`].
        position_ids (`torch.Tensor` of shape `(batch, seq)`, `(3, batch, seq)` or `(4, batch, seq)`):
            Positions as the backbone gets them: text positions, Qwen-VL's three axes, or both; `None` if the backbone
            counts them itself.
        uses_flash_attention (`bool`, *optional*, defaults to `False`):
            Whether the model uses flash attention, which drops a mask of ones and then reads positions.

    Returns:
        `torch.Tensor` of shape `(batch,)` or `None`: Whether a row is packed; `None` if no argument says so.
    """
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        # A pairwise mask is enough: a row is packed if tokens are seen, then not, then seen again
        is_seen = is_seen_by_next(input_ids, attention_mask)
        begins = is_seen[:, 1:] & ~is_seen[:, :-1]
        return begins.sum(dim=1) + is_seen[:, 0] > 1
    if position_ids is None or not (attention_mask is None or uses_flash_attention):
        return None
    steps = (position_ids if position_ids.ndim == 2 else position_ids[0]).diff(dim=1)
    # Qwen-VL's first axis, time, is constant within an image and then jumps by its size, so only a step back counts
    restarts = steps < 0 if position_ids.ndim == 3 and len(position_ids) == 3 else steps != 1
    if attention_mask is not None:  # the positions of padding mean nothing
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
        return  # the common case, which does not wait for the device
    if rows := torch.nonzero(is_packed & visual_mask.any(dim=1)).flatten().tolist():
        raise ValueError(
            f"Row(s) {rows} of the batch hold several samples, and images: positions restart within the row, its "
            f"attention mask separates parts of it, or the call has one of {', '.join(PACKING_ARGUMENTS)}. Cue "
            "recovery expects one sample per row and would mix their images. Pad the samples instead of packing "
            "them (no `packing`, no `padding_free`, no continuous batching)."
        )


def read_later(mask: torch.Tensor) -> Callable[[], torch.Tensor]:
    """
    Return a function that returns the mask on the CPU. On a GPU the copy starts now and the function waits for this
    copy alone; a copy that starts later would also wait for all work queued in between.
    """
    if not mask.is_cuda:
        return lambda: mask
    copy = mask.to("cpu", non_blocking=True)  # into pinned memory
    is_copied = torch.cuda.current_stream(mask.device).record_event()

    def read() -> torch.Tensor:
        is_copied.synchronize()
        return copy

    return read
