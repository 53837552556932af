from collections.abc import Callable, Collection

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .attention import SavedOutput, SinkCrossAttention, additive_mask
from .config import CueRecoveryConfig


# An additive mask `(batch, seq)`; and for each active adapter, the sinks' indices `(batch, 1, 1)`, 0 where a sample
# has no sink, and whether a sample is left untouched `(batch, 1)`
LayerInputs = tuple[torch.Tensor, dict[str, tuple[torch.Tensor, torch.Tensor]]]


class CueRecoveryLayer(nn.Module, BaseTunerLayer):
    """
    The tuner layer of one decoder layer: a [`SinkCrossAttention`] per adapter, applied to the decoder layer's input.

    It is attached to the decoder layer as a child named `cue_recovery` and runs in a pre-forward hook. The input of
    layer l+1 is the output of layer l after DeepStack. Unlike a wrapper, a child does not change the names
    of any other parameters, and it shares the decoder layer's FSDP shard and device.

    Args:
        decoder_layer (`nn.Module`):
            The decoder layer whose input is updated.
    """

    adapter_layer_names = ("sink_attention",)

    def __init__(self, decoder_layer: nn.Module):
        super().__init__()
        self.sink_attention = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters = []
        # In a tuple, so that torch does not register the parent as a child of its own child
        self._decoder_layer = (decoder_layer,)
        self._hook = decoder_layer.register_forward_pre_hook(update_sink_before_layer, with_kwargs=True)

    def update_layer(
        self, adapter_name: str, config: CueRecoveryConfig, hidden_size: int, num_heads: int, eps: float
    ) -> None:
        """Add the attention module of another adapter."""
        self.sink_attention[adapter_name] = SinkCrossAttention(hidden_size, num_heads, eps, config.bottleneck_size)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: torch.Tensor, context: "CueRecoveryContext") -> torch.Tensor:
        """
        Add the update of every active adapter to the sink tokens (ViCuR, Eq. 5).

        Args:
            hidden_states (`torch.Tensor` of shape `(batch, seq, hidden)`):
                Input of the decoder layer.
            context ([`CueRecoveryContext`]):
                Positions of the sink and the visual tokens.

        Returns:
            `torch.Tensor` of shape `(batch, seq, hidden)`: The hidden states, changed at the sinks only.

        Raises:
            `ValueError`: If the decoder layer's input is not laid out like `input_ids` (Gemma 3n has four streams).
        """
        if hidden_states.shape[:-1] != context.visual_mask.shape:
            raise ValueError(
                f"The input of a decoder layer with cue recovery has the shape {tuple(hidden_states.shape)}, but "
                f"`input_ids` has {tuple(context.visual_mask.shape)}. Cue recovery needs one hidden state per token; "
                "this model family is not supported."
            )
        hidden_states = hidden_states.to(self.execution_device(hidden_states))
        updated = hidden_states
        saved = SavedOutput(hidden_states)
        mask, sinks = context.layer_inputs(hidden_states)
        for adapter_name, (positions, is_untouched) in sinks.items():
            if adapter_name not in self.sink_attention:
                continue
            positions = positions.expand(-1, 1, hidden_states.shape[-1])
            with saved.hooks():
                sink = hidden_states.gather(1, positions).squeeze(1)
                update = self.sink_attention[adapter_name](sink, hidden_states, mask)
            update = update.to(hidden_states).masked_fill(is_untouched, 0.0)
            updated = updated.scatter_add(1, positions, update.unsqueeze(1))
        saved.set_output(updated)
        return updated

    def execution_device(self, hidden_states: torch.Tensor) -> torch.device:
        """The device of the weights, or that of `hidden_states` if the weights are offloaded."""
        # Under `device_map` the inputs may be on another device: accelerate moves them in the `forward` that its
        # `add_hook_to_module` installs, and torch runs pre-forward hooks, such as ours, before it
        weight = next(self.sink_attention.parameters())
        # accelerate keeps offloaded weights on "meta", and its hooks on the submodules move weights and inputs
        is_offloaded = weight.is_meta and any(hasattr(module, "_hf_hook") for module in self.sink_attention.modules())
        return hidden_states.device if is_offloaded else weight.device

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Does nothing: attention over the image cannot be merged into weights, so it stays active beside them."""

    def unmerge(self) -> None:
        """Does nothing, see [`CueRecoveryLayer.merge`]."""

    def detach(self) -> None:
        """Remove this layer from its decoder layer."""
        self._hook.remove()
        del self._decoder_layer[0].cue_recovery

    def get_base_layer(self) -> nn.Module:
        return self._decoder_layer[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT's method reads the single weight of a linear layer (and, since PEFT#2893, its compute dtype if it is
        # quantized). A decoder layer has many weights; its unquantized ones have the dtype of the hidden states
        own = {id(parameter) for parameter in self.parameters()}
        weight = next(p for p in base_layer.parameters() if p.is_floating_point() and id(p) not in own)
        # Offloaded weights are on "meta" between calls; `_move_adapter_to_device_of_base_layer` would move the adapter
        # there, where it loses its values. accelerate's hooks know the device that the weights run on
        hooks = (getattr(module, "_hf_hook", None) for module in base_layer.modules() if weight.is_meta)
        device = next((hook.execution_device for hook in hooks if isinstance(hook, AlignDevicesHook)), None)
        return weight.device if device is None else torch.device(device), weight.dtype


def update_sink_before_layer(decoder_layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Pre-forward hook of a decoder layer that has a [`CueRecoveryLayer`]."""
    kwargs = dict(kwargs)
    context = kwargs.pop("cue_recovery_context", None)
    if context is not None:
        context.has_arrived = True
        layer = decoder_layer.cue_recovery
        assert isinstance(layer, CueRecoveryLayer)  # it registered this hook
        if args:
            args = (layer(args[0], context), *args[1:])
        else:
            kwargs["hidden_states"] = layer(kwargs["hidden_states"], context)
    return args, kwargs


class CueRecoveryContext:
    """
    Positions of the sink and the visual tokens in one forward call, passed along as a keyword argument of that call.

    Args:
        visual_mask (`torch.Tensor` of shape `(batch, seq)`):
            `True` at image and video tokens, but not at a sink.
        sink_positions (`dict[str, torch.Tensor]`):
            For each active adapter, the sink's index in the sequence, of shape `(batch,)`; `-1` where the sample has
            no sink.
        missing_sinks (`dict[str, Callable]`, *optional*):
            For each active adapter whose sink may be missing, a function that returns which samples have visual tokens
            but no sink, of shape `(batch,)`. It is called after the layers have run.
        always_found (`Collection[str]`, *optional*, defaults to `()`):
            Adapters whose sink is in every sample, so that the layers need not check for `-1`.

    Attributes:
        has_arrived (`bool`):
            Whether the context has reached a decoder layer.
    """

    # Not a dataclass: pytorch#153077 made FSDP2's mixed precision rebuild the dataclasses among a forward's arguments
    # to cast their tensors, so the layers would set `has_arrived` on a copy
    def __init__(
        self,
        visual_mask: torch.Tensor,
        sink_positions: dict[str, torch.Tensor],
        missing_sinks: dict[str, Callable[[], torch.Tensor]] | None = None,
        always_found: Collection[str] = (),
    ):
        self.visual_mask = visual_mask
        self.missing_sinks = missing_sinks or {}
        self.has_arrived = False
        self._found_positions = sink_positions
        self._always_found = always_found
        self._inputs: dict[tuple[torch.device, torch.dtype], LayerInputs] = {}

    @property
    def sink_positions(self) -> dict[str, torch.Tensor]:
        """
        For each active adapter, the sink's index in the sequence, of shape `(batch,)`; `-1` where the sample has no
        sink or no visual token and is left untouched.
        """
        has_evidence = self.visual_mask.any(dim=1)
        return {name: torch.where(has_evidence, each, -1) for name, each in self._found_positions.items()}

    def layer_inputs(self, hidden_states: torch.Tensor) -> LayerInputs:
        """The layers' inputs on the device and in the dtype of `hidden_states`, cached per device and dtype."""
        device, dtype = hidden_states.device, hidden_states.dtype
        if (device, dtype) not in self._inputs:
            mask = additive_mask(self.visual_mask, hidden_states)
            lacks_evidence = mask.all(dim=1)
            sinks = {}
            for name, positions in self._found_positions.items():
                positions, is_untouched = positions.to(device), lacks_evidence
                if name not in self._always_found:
                    positions, is_untouched = positions.clamp(min=0), lacks_evidence | (positions < 0)
                sinks[name] = positions[:, None, None], is_untouched[:, None]
            self._inputs[device, dtype] = mask, sinks
        return self._inputs[device, dtype]
