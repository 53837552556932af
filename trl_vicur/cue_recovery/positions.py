"""Find each row's sink, and the rows that hold several samples."""

import torch
from torch.nn.attention.flex_attention import BlockMask


# Forward arguments that only packed rows have: for flash attention, and for layers with a state (linear attention)
PACKING_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def first_real_token(input_ids: torch.Tensor, attention_mask: torch.Tensor | BlockMask | dict | None) -> torch.Tensor:
    """
    Index of the first token of each sample that is not padding.

    Args:
        input_ids (`torch.Tensor` of shape `(batch, seq)`):
            Token ids.
        attention_mask (`torch.Tensor` of shape `(batch, seq)` or `(batch, 1, seq, keys)`, `BlockMask`, or `dict`):
            Attention mask as the model gets it, or one per attention type, as `generate` makes for a static cache;
            `None` if there is no padding.

    Returns:
        `torch.Tensor` of shape `(batch,)`: The indices.
    """
    if attention_mask is None:
        return input_ids.new_zeros(input_ids.shape[0])
    is_padding_mask = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2
    is_real = attention_mask if is_padding_mask else is_seen_by_next(input_ids, attention_mask)
    if is_real.dtype == torch.bool:  # `argmax` does not support bool
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
    elif attention_mask is not None:  # a mask for pairs of tokens, which `generate` makes of left padding
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
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values())))
    num_samples, length = input_ids.shape
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
    Find rows that hold several samples, by the signs from which transformers itself infers sample boundaries.

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
        `torch.Tensor` of shape `(batch,)` or `None`: Whether a row is packed; `None` if the call has no such sign.
    """
    if attention_mask is not None and (not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2):
        # A pairwise mask decides alone: a row is packed if tokens are seen, then not, then seen again
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
