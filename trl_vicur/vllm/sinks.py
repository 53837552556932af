from itertools import pairwise
from typing import NamedTuple

import torch

from ..cue_recovery import CueRecoveryConfig
from ..cue_recovery.positions import find_token


class SinkBatch(NamedTuple):
    """
    Positions of sinks and visual tokens in one step, whose tokens vLLM concatenates over all requests.

    Args:
        sinks (`torch.Tensor` of shape `(prompts,)`):
            Index of each prompt's sink.
        visual (`torch.Tensor` of shape `(prompts, visual)`):
            Indices of each prompt's visual tokens, padded to the longest.
        visual_mask (`torch.Tensor` of shape `(prompts, visual)`):
            `False` at padding.
        updated_by (`set[str]`):
            Names of the modules that have updated the sinks so far.
    """

    sinks: torch.Tensor
    visual: torch.Tensor
    visual_mask: torch.Tensor
    updated_by: set[str]


def find_sinks(
    input_ids: torch.Tensor,
    is_visual: torch.Tensor,
    positions: torch.Tensor,
    attention_metadata: dict | list,
    config: CueRecoveryConfig,
) -> SinkBatch | None:
    """
    Find the sinks of the prompts that are prefilled in this step, once for all layers.

    A preempted request is prefilled again with its prompt and the tokens generated so far, and is treated like any
    other.

    Args:
        input_ids (`torch.Tensor` of shape `(tokens,)`):
            Token ids of the step.
        is_visual (`torch.Tensor` of shape `(tokens,)`):
            `True` where vLLM inserts a visual embedding.
        positions (`torch.Tensor` of shape `(3, padded tokens)`):
            Positions for the rotary embedding; zero in all three rows at the first token of a prompt.
        attention_metadata (`dict`):
            vLLM's attention metadata by layer; `query_start_loc` has the offset of each request's tokens. A list, one
            per micro-batch, is refused.
        config ([`CueRecoveryConfig`]):
            The adapter's configuration.

    Returns:
        [`SinkBatch`] or `None`: `None` if no prompt has visual tokens.

    Raises:
        `RuntimeError`: If the step is split into micro-batches, if the attention backend does not report where
            requests begin, or if a prompt with visual tokens has no sink or was partly prefilled in an earlier step.
    """
    bounds = _request_bounds(attention_metadata)
    device = input_ids.device
    input_ids, is_visual, positions = input_ids.cpu(), is_visual.cpu(), positions.cpu()
    sinks, visual = [], []
    for begin, end in pairwise(bounds):
        indices = begin + torch.nonzero(is_visual[begin:end]).squeeze(1)
        if indices.numel() == 0:
            continue
        if positions[:, begin].any():
            raise RuntimeError(
                "A prompt with visual tokens was prefilled in pieces, but cue recovery needs the sink token and the "
                "images in one step. Perhaps its images do not fit into vLLM's encoder cache, or its KV cache was "
                "transferred from another engine."
            )
        sink = begin + _find_sink(input_ids[begin:end], config)
        indices = indices[indices != sink]
        if indices.numel() > 0:
            sinks.append(sink)
            visual.append(indices)
    if not sinks:
        return None
    padded = torch.nn.utils.rnn.pad_sequence(visual, batch_first=True, padding_value=-1)
    return SinkBatch(
        torch.tensor(sinks, device=device), padded.clamp(min=0).to(device), (padded >= 0).to(device), set()
    )


def _request_bounds(attention_metadata: dict | list) -> list[int]:
    """Offset of each request's first token, and the end of the last request."""
    if isinstance(attention_metadata, list):
        raise RuntimeError(
            "Cue recovery needs every prompt in one micro-batch, but vLLM split a step into "
            f"{len(attention_metadata)}. Start it without `--enable-dbo` and `--ubatch-size`."
        )
    metadata = next(iter(attention_metadata.values()))
    try:
        return metadata.query_start_loc.tolist()
    except AttributeError:
        raise RuntimeError(
            f"Cue recovery cannot separate a step's requests: {type(metadata).__name__} has no `query_start_loc`. "
            "Start vLLM with another attention backend, such as `--attention-backend FLASH_ATTN` or `TRITON_ATTN`."
        ) from None


def _find_sink(input_ids: torch.Tensor, config: CueRecoveryConfig) -> int:
    """Index of a prompt's sink."""
    if config.sink_token_id is None:
        return 0
    sink = int(find_token(input_ids[None], config.sink_token_id))
    if sink < 0:
        raise RuntimeError(
            f"A prompt has an image, but not the adapter's sink token {config.sink_token!r}, so the module would do "
            "nothing. Serve with the chat template that the adapter was trained with."
        )
    return sink
