from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .attention import SinkCrossAttention
from .layer import CueRecoveryContext, CueRecoveryLayer


def _recovery_layers(model: nn.Module) -> dict[str, CueRecoveryLayer]:
    # By the name of their decoder layer, e.g. "layers.1"
    return {
        ".".join(name.split(".")[-3:-1]): module
        for name, module in model.named_modules()
        if isinstance(module, CueRecoveryLayer)
    }


@contextmanager
def record_update_ratios(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """
    While active, record how large each layer's update is relative to the sink's hidden state, ‖z‖ / ‖h‖.

    Args:
        model (`nn.Module`):
            A model with cue recovery attached; without it, nothing is recorded.

    Yields:
        `dict[str, torch.Tensor]`: For each decoder layer (`"layers.1"`), the ratio of each sample that has a sink and
            visual tokens, of shape `(samples,)`. Each forward call overwrites the ratios of the one before.
    """
    ratios: dict[str, torch.Tensor] = {}

    def record(name: str):
        # No gradients: gradient checkpointing compares the tensors that its two runs save, and the second runs without
        # this hook
        @torch.no_grad()
        def hook(layer: CueRecoveryLayer, args: tuple[torch.Tensor, CueRecoveryContext], output: torch.Tensor) -> None:
            hidden_states, context = args
            for positions in context.sink_positions.values():
                positions = positions.to(output.device)
                samples = torch.nonzero(positions >= 0).squeeze(1)
                before = hidden_states.to(output.device)[samples, positions[samples]].float()
                after = output[samples, positions[samples]].float()
                ratios[name] = (after - before).norm(dim=-1) / before.norm(dim=-1)

        return hook

    handles = [layer.register_forward_hook(record(name)) for name, layer in _recovery_layers(model).items()]
    try:
        yield ratios
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def sink_attention(model: nn.Module, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """
    Attention of the sink token over the visual tokens, per layer (ViCuR, Fig. 11).

    Args:
        model ([`~peft.PeftModel`]):
            A model with an active [`CueRecoveryConfig`] adapter.
        inputs:
            The processor's outputs for a batch of prompts (`input_ids`, `attention_mask`, `pixel_values`, …).

    Returns:
        `dict[str, torch.Tensor]`: For each decoder layer with a module (`"layers.1"`) the attention weights of shape
            `(batch, heads, seq)`, in float32; zero at all tokens that are not visual, and in samples without a sink or
            visual tokens. With several active adapters, the weights are the last one's.
    """
    weights = {}

    def record(name: str):
        def hook(layer: CueRecoveryLayer, args: tuple[torch.Tensor, CueRecoveryContext]) -> None:
            hidden_states, context = args
            hidden_states = hidden_states.to(layer.execution_device(hidden_states))
            samples = torch.arange(hidden_states.shape[0], device=hidden_states.device)
            visual_mask = context.visual_mask.to(hidden_states.device)
            for adapter_name, positions in context.sink_positions.items():
                if adapter_name not in layer.sink_attention:
                    continue
                positions = positions.to(hidden_states.device)
                sink = hidden_states[samples, positions.clamp(min=0)]
                attention = layer.sink_attention[adapter_name]
                assert isinstance(attention, SinkCrossAttention)
                attended = attention.attention_weights(sink, hidden_states, visual_mask)
                is_seen = visual_mask & (positions >= 0).unsqueeze(1)
                weights[name] = attended.masked_fill(~is_seen.unsqueeze(1), 0.0)

        return hook

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in _recovery_layers(model).items()]
    try:
        model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return weights
