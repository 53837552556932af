"""
Measures the recovery module's share of prefill and of a training pass, relative to the decoder layers around it, and
its speed relative to a direct implementation of Eq. 3-4.

The model is five decoder layers with the real widths of Qwen3-VL-2B (and 8B) and random weights: one interval, with
one module. Its inputs are precomputed image features and a text of 64 tokens. The module, including finding sink and
visual tokens, is timed alone right after a pass of the five layers, so that CPU caches are filled as in a real pass;
the difference of passes with and without the module, which is also recorded, is mostly noise. The module is timed in
place as well, within a pass.

On a GPU, kernel launches dominate its cost, so the kernels of the module and of a decoder layer are counted.
"""

from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from matplotlib.figure import Figure
from measure import DEVICE, IS_CUDA, CountKernels, alternate, ratio, seconds
from peft import PeftModel, get_peft_model
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from trl_vicur import CueRecoveryConfig
from trl_vicur.cue_recovery import CueRecoveryContext, CueRecoveryLayer, attention


DTYPE = torch.bfloat16 if IS_CUDA else torch.float32
WIDTHS = {
    "2B": dict(hidden_size=2048, num_attention_heads=16, num_key_value_heads=8, intermediate_size=6144),
    "8B": dict(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, intermediate_size=12288),
}
# Number of visual tokens: patches of the image, (height, width). Four patches make one visual token
GRIDS = {64: (16, 16), 256: (32, 32), 1782: (66, 108)}
NUM_TEXT_TOKENS = 64
IMAGE_TOKEN, START_TOKEN = 100, 101


def make_slice(size: str) -> PeftModel:
    """Five decoder layers with one module, whose W_O is not zero."""
    config = Qwen3VLConfig(
        text_config={
            **WIDTHS[size],
            "head_dim": 128,
            "num_hidden_layers": 5,
            "vocab_size": 128,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={  # unused, because image features are precomputed
            "depth": 3,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 32,
            "out_hidden_size": WIDTHS[size]["hidden_size"],
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=DTYPE)
    model = get_peft_model(model, CueRecoveryConfig(), autocast_adapter_dtype=False).eval()
    # As with gradient checkpointing: the backward pass reaches the first layer although the backbone is frozen
    model.enable_input_require_grads()
    for name, parameter in model.named_parameters():
        if "o_proj" in name and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_inputs(model: PeftModel, num_visual_tokens: int, batch_size: int) -> dict[str, Any]:
    """Token ids and image features of prompts with an image in the middle of the text."""
    text = torch.arange(NUM_TEXT_TOKENS) % IMAGE_TOKEN
    text[0] = START_TOKEN
    image = torch.full((num_visual_tokens,), IMAGE_TOKEN)
    input_ids = torch.cat([text[:16], image, text[16:]]).expand(batch_size, -1).to(DEVICE)
    hidden_size = model.config.get_text_config().hidden_size
    features = [torch.randn(num_visual_tokens, hidden_size, device=DEVICE, dtype=DTYPE) for _ in range(batch_size)]
    return dict(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        mm_token_type_ids=(input_ids == IMAGE_TOKEN).int(),
        image_grid_thw=torch.tensor([[1, *GRIDS[num_visual_tokens]]] * batch_size, device=DEVICE),
        mm_encoder_outputs={
            "image": BaseModelOutputWithDeepstackFeatures(
                pooler_output=tuple(features), deepstack_features=[tuple(features)] * 3
            )
        },
        use_cache=False,
    )


class ModuleCall:
    """The module's work in one pass, which can be repeated outside the pass."""

    def __init__(self, model: PeftModel, inputs: dict[str, Any]):
        self.model, self.inputs = model, inputs
        self.layer = next(module for module in model.modules() if isinstance(module, CueRecoveryLayer))
        handle = self.layer.register_forward_pre_hook(self._note)
        model.get_base_model().model(**inputs)
        handle.remove()

    def _note(self, _, args: tuple[torch.Tensor, CueRecoveryContext]) -> None:
        self.hidden_states = args[0].detach().requires_grad_()

    def __call__(self) -> torch.Tensor:
        _, kwargs = self.model.base_model._add_context(None, (), self.inputs)
        return self.layer(self.hidden_states, kwargs["cue_recovery_context"])

    def plain(self) -> torch.Tensor:
        """The same by a direct implementation of Eq. 3-4, with keys and values for every token."""
        _, kwargs = self.model.base_model._add_context(None, (), self.inputs)
        context = kwargs["cue_recovery_context"]
        samples = torch.arange(len(self.hidden_states), device=DEVICE)
        positions = context.sink_positions["default"]
        sink = self.hidden_states[samples, positions]
        update = self.layer.sink_attention["default"].forward_plain(sink, self.hidden_states, context.visual_mask)
        return self.hidden_states.index_put((samples, positions), sink + update)


def forward(function: Callable[[], torch.Tensor]) -> Callable[[], None]:
    @torch.no_grad()
    def run() -> None:
        function()

    return run


def forward_backward(function: Callable[[], torch.Tensor], model: PeftModel) -> Callable[[], None]:
    def run() -> None:
        model.zero_grad(set_to_none=True)
        output = function()
        output.backward(torch.ones_like(output))

    return run


def kernels(model: PeftModel, call: ModuleCall) -> dict[str, int]:
    """Kernels launched by a call of the model, by one module (forward and backward), and by a decoder layer."""
    counts = {}
    with torch.no_grad(), CountKernels() as counter:
        _, kwargs = model.base_model._add_context(None, (), call.inputs)
        context = kwargs["cue_recovery_context"]
        context.layer_inputs(call.hidden_states)
    counts["call"] = len(counter.kernels)
    with torch.no_grad(), CountKernels() as counter:
        call.layer(call.hidden_states, context)
    counts["module"] = len(counter.kernels)
    # As on a GPU: in float32, CPUs use a different backward pass
    as_on_gpu = patch.object(attention, "_low_rank_gradients", attention._recomputed_gradients)
    with as_on_gpu, CountKernels() as counter:
        output = call.layer(call.hidden_states, context)
        forward_kernels = len(counter.kernels)
        output.backward(torch.ones_like(output))
    counts["module_backward"] = len(counter.kernels) - forward_kernels - 1
    counts["decoder_layer"] = decoder_layer_kernels(model, call.inputs)
    return counts


@torch.no_grad()
def decoder_layer_kernels(model: PeftModel, inputs: dict[str, Any]) -> int:
    """Kernels of a decoder layer without a module; each norm counts as one."""
    layer = model.get_base_model().get_decoder().layers[3]
    counter, calls = CountKernels(), []
    handles = [layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)]
    model.get_base_model().model(**inputs)
    for norm in layer.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = count_as_one(counter, norm.forward)
    with counter:
        layer(*calls[0][0], **calls[0][1])
    for norm in layer.modules():
        norm.__dict__.pop("forward", None)
    handles[0].remove()
    return len(counter.kernels)


def count_as_one(counter: CountKernels, function: Callable) -> Callable:
    def run(*args):
        with counter.one_kernel("rms_norm"):
            return function(*args)

    return run


@torch.no_grad()
def share_in_place(model: PeftModel, inputs: dict[str, Any], repeats: int) -> dict[str, float]:
    """Time of the module within a forward pass, relative to the rest of the same pass."""
    layer = next(module for module in model.modules() if isinstance(module, CueRecoveryLayer))
    spent = []

    def timed(function: Callable) -> Callable:
        def run(*args: Any) -> Any:
            result = []
            spent.append(seconds(lambda: result.append(function(*args))))
            return result[0]

        return run

    backbone = model.get_base_model().model
    hooks = backbone._forward_pre_hooks
    key = next(key for key, hook in hooks.items() if hook == model.base_model._add_context)
    hook, layer.forward = hooks[key], timed(layer.forward)
    hooks[key] = timed(hook)
    modules, rest = [], []
    for repeat in range(repeats + 1):
        spent.clear()
        elapsed = seconds(lambda: backbone(**inputs))
        if repeat > 0:
            modules.append(sum(spent))
            rest.append(elapsed - sum(spent))
    hooks[key] = hook
    del layer.forward
    return ratio(modules, rest)


def bytes_kept(function: Callable[[torch.Tensor], torch.Tensor], call: ModuleCall) -> int:
    """Bytes that autograd keeps of the module's work, without its output, which the decoder layer keeps anyway."""
    original = call.hidden_states
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * IS_CUDA], profile_memory=True) as events:
        call.hidden_states = original * 1.0
        output = function()
        call.hidden_states = None
    call.hidden_states = original
    usage = "self_device_memory_usage" if IS_CUDA else "self_cpu_memory_usage"
    return sum(getattr(event, usage) for event in events.key_averages()) - output.numel() * output.element_size()


def run(quick: bool = False) -> dict[str, Any]:
    rows = []
    for size, batch_size, num_visual_tokens in (
        *(("2B", batch_size, tokens) for batch_size in (1, 4) for tokens in GRIDS),
        *(("8B", 1, tokens) for tokens in GRIDS),
    ):
        if not rows or rows[-1]["model"] != size:
            model = make_slice(size)
            layers = model.get_base_model().get_decoder().layers
            num_layer_parameters = sum(p.numel() for p in layers.parameters()) / len(layers)
        inputs = make_inputs(model, num_visual_tokens, batch_size)
        with torch.no_grad():
            call = ModuleCall(model, inputs)

        def with_module(model=model, inputs=inputs):
            return model.get_base_model().model(**inputs).last_hidden_state

        def without_module(model=model, inputs=inputs):
            with model.disable_adapter():
                return with_module(model, inputs)

        row = {"model": size, "batch": batch_size, "visual_tokens": num_visual_tokens}
        for name, wrap in (
            ("forward", forward),
            ("forward_backward", lambda function, model=model: forward_backward(function, model)),
        ):
            sides = {"without": wrap(without_module), "module": wrap(call), "plain": wrap(call.plain)}
            if name == "forward":
                sides["with"] = wrap(with_module)
            for side in ("module", "plain"):
                sides[side]()
            flops = 10 * batch_size * (num_visual_tokens + NUM_TEXT_TOKENS) * num_layer_parameters
            # The largest sizes take minutes on a CPU, so they are repeated less often
            repeats = 1 if quick or flops > 3e12 and not IS_CUDA else 3 if flops > 5e11 and not IS_CUDA else 7
            times = alternate(sides, repeats, warmup=0)
            row[name] = {
                "seconds": {side: median(values) for side, values in times.items()},
                "share": ratio(times["module"], times["without"]),
                "speedup_over_plain": ratio(times["plain"], times["module"]),
            }
            if name == "forward":
                row[name]["with_over_without"] = ratio(times["with"], times["without"])
        with torch.no_grad():
            difference = (call() - call.plain()).abs().max() / (call() - call.hidden_states).abs().max()
        row["relative_difference_to_plain"] = difference.item()
        row["share_in_place"] = share_in_place(model, inputs, repeats)
        row["kernels"] = kernels(model, call)
        row["bytes_kept"] = bytes_kept(call, call)
        row["bytes_kept_plain"] = bytes_kept(call.plain, call)
        rows.append(row)
        print(describe(row), flush=True)
    return {"rows": rows}


def describe(row: dict[str, Any]) -> str:
    parts = [f"{row['model']}, batch {row['batch']}, {row['visual_tokens']} visual tokens"]
    for name in ("forward", "forward_backward"):
        timed = row[name]
        parts.append(
            f"{name} {timed['seconds']['module'] * 1e3:.1f} ms of {timed['seconds']['without'] * 1e3:.0f} "
            f"({timed['share']['median']:.2%}), {timed['speedup_over_plain']['median']:.1f}x as fast as plain"
        )
    parts.append(f"in place {row['share_in_place']['median']:.2%} of forward; kernels {row['kernels']}")
    parts.append(f"keeps {row['bytes_kept'] / 2**20:.2f} MiB (plain {row['bytes_kept_plain'] / 2**20:.1f})")
    return "; ".join(parts)


def plot(results: dict[str, Any]) -> Figure:
    rows = results["rows"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    labels = [f"{row['model']}\n{row['batch']}\n{row['visual_tokens']}" for row in rows]
    for offset, (name, label) in enumerate((("forward", "forward"), ("forward_backward", "forward + backward"))):
        places = [index + 0.4 * (offset - 0.5) for index in range(len(rows))]
        left.bar(places, [100 * row[name]["share"]["median"] for row in rows], width=0.38, label=label)
        right.bar(places, [row[name]["speedup_over_plain"]["median"] for row in rows], width=0.38, label=label)
    for axes in (left, right):
        axes.set_xticks(range(len(rows)), labels, fontsize=7)
        axes.set_xlabel("model, batch, visual tokens")
        axes.legend()
        axes.spines[["top", "right"]].set_visible(False)
    left.set_title("Module's time relative to five decoder layers")
    left.set_ylabel("%")
    right.set_title("Speed-up over a direct implementation of Eq. 3-4")
    right.set_ylabel("times")
    return figure
