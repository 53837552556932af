"""
Computes the cost of a ViCuR step of Qwen3-VL-8B on 8 H100, which this machine cannot run, and settings for it.

FLOPs, bytes and memory of each GPU follow from the models' configs, for 128 prompts of 2,048 tokens (1,024 of them
visual) and completions of 4,096. The counts are checked against torch's FLOP counter on the real architecture.
Seconds, which are FLOPs divided by the rate of matrix products, are checked against decoder layers timed on this
machine.

`GPU` lists the assumptions about a GPU. Assumptions about the run: `bf16=True` under FSDP2, which gathers weights and
computes in bfloat16; frozen weights loaded in bfloat16 (in float32 their shards are twice as large), trained weights
in float32; an adapter (the module alone) or full fine-tuning with AdamW; gradient checkpointing; sharded teacher and
student; rollouts by vLLM in the memory of the training GPUs; shared image features.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from cue_recovery import GRIDS, NUM_TEXT_TOKENS, forward, make_inputs, make_slice
from matplotlib.figure import Figure
from measure import DEVICE, IS_CUDA, alternate, ratio
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLTextConfig

from trl_vicur import CueRecoveryConfig
from trl_vicur.cue_recovery.positions import carrying_layers


class GPU(NamedTuple):
    """Specification of one GPU; `utilization` is the share of peak FLOPs that training reaches."""

    flops: float = 989e12  # H100 SXM, bfloat16, dense
    memory: float = 80e9
    bandwidth: float = 3.35e12
    link: float = 450e9  # NVLink, each direction
    utilization: float = 0.4
    bandwidth_utilization: float = 0.7
    launch: float = 5e-6  # seconds per kernel, from Python, without CUDA graphs


NUM_GPUS = 8
PROMPTS, PROMPT_TOKENS, VISUAL_TOKENS, CUE_TOKENS, COMPLETION_TOKENS = 128, 2048, 1024, 100, 4096
BYTES = 2  # per bfloat16 number
VOCABULARY = 151936
# Kernels as counted by `--only cue_recovery`; a fused norm is one kernel
LAUNCHES = {"decoder_layer": 26, "module": 12, "call": 8}
VISION_8B = dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16)
VISION_2B = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16)


def make_config(hidden_size: int, layers: int, heads: int, intermediate_size: int, vision: dict, tied: bool):
    return Qwen3VLConfig(
        text_config=dict(
            hidden_size=hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=intermediate_size,
            vocab_size=VOCABULARY,
            tie_word_embeddings=tied,
        ),
        vision_config=dict(**vision, out_hidden_size=hidden_size, deepstack_visual_indexes=[5, 11, 17]),
        tie_word_embeddings=tied,
    )


CONFIGS = {
    "2B": make_config(2048, 28, 16, 6144, VISION_2B, tied=True),
    "8B": make_config(4096, 36, 32, 12288, VISION_8B, tied=False),
    "32B": make_config(5120, 64, 64, 25600, VISION_8B, tied=False),
}


@dataclass
class Costs:
    """FLOPs and bytes of one model. Counts matrix products only; norms and activations are negligible."""

    config: Qwen3VLConfig

    @property
    def text(self) -> Qwen3VLTextConfig:
        return self.config.text_config

    @cached_property
    def parameters(self) -> int:
        with torch.device("meta"):
            model = Qwen3VLForConditionalGeneration(self.config)
        return sum(parameter.numel() for parameter in model.parameters())

    @property
    def layer_parameters(self) -> int:
        text = self.text
        attention = 2 * text.hidden_size * text.head_dim * (text.num_attention_heads + text.num_key_value_heads)
        return attention + 3 * text.hidden_size * text.intermediate_size

    def attention_flops(self, tokens: int, causal: bool) -> float:
        flops = 4 * self.text.num_attention_heads * self.text.head_dim * tokens**2
        return flops / 2 if causal else flops

    def decoder_flops(self, tokens: int, layers: int | None = None, causal: bool = True) -> float:
        """A sequence's forward pass through the decoder layers, without the language-model head."""
        layers = self.text.num_hidden_layers if layers is None else layers
        return layers * (2 * self.layer_parameters * tokens + self.attention_flops(tokens, causal))

    def head_flops(self, tokens: int) -> float:
        return 2 * self.text.hidden_size * VOCABULARY * tokens

    def tower_flops(self, visual_tokens: int) -> float:
        """The vision tower's forward pass for one image; four patches make one visual token."""
        vision, patches = self.config.vision_config, 4 * visual_tokens
        layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        merged = 4 * vision.hidden_size
        mergers = 1 + len(vision.deepstack_visual_indexes)
        merger = merged**2 + merged * vision.out_hidden_size
        attention = 4 * vision.hidden_size * patches**2
        return vision.depth * (2 * layer * patches + attention) + mergers * 2 * merger * visual_tokens

    @property
    def cache_bytes(self) -> int:
        """Bytes of one token's KV cache."""
        return 2 * self.text.num_hidden_layers * self.text.num_key_value_heads * self.text.head_dim * BYTES

    @property
    def module_parameters(self) -> int:
        """Parameters of all recovery modules at the default interval."""
        carrying = len(carrying_layers(self.text, CueRecoveryConfig().layer_interval))
        return carrying * (4 * self.text.hidden_size**2 + 2 * self.text.hidden_size)


def prefill_overhead(costs: Costs, tokens: int, gpu: GPU) -> float:
    """
    Relative cost of the modules in a prefill, in eager PyTorch on a GPU. A prefill takes as long as its kernel
    launches or its matrix products, whichever is longer. The modules' own products, for one token, are neglected.
    """
    layers = costs.text.num_hidden_layers
    carrying = len(carrying_layers(costs.text, CueRecoveryConfig().layer_interval))
    launches = layers * LAUNCHES["decoder_layer"] * gpu.launch
    added = (carrying * LAUNCHES["module"] + LAUNCHES["call"]) * gpu.launch
    products = costs.decoder_flops(tokens) / (gpu.flops * gpu.utilization)
    return max(launches + added, products) / max(launches, products) - 1


def plan(student: Costs, teacher: Costs | None, full: bool, gpu: GPU) -> dict[str, Any]:
    """Seconds of each stage of a step, and bytes per GPU. `teacher=None`: the student without its adapter teaches."""
    scorer = teacher or student
    samples = PROMPTS / NUM_GPUS
    sequence = PROMPT_TOKENS + COMPLETION_TOKENS
    scored_sequence = sequence + CUE_TOKENS
    compute = gpu.flops * gpu.utilization
    bandwidth = gpu.bandwidth * gpu.bandwidth_utilization
    student_bytes, teacher_bytes = student.parameters * BYTES, scorer.parameters * BYTES

    # A decode step reads all weights once, and each sample's cache, which on average holds half of the completion
    cache = samples * (PROMPT_TOKENS + COMPLETION_TOKENS / 2) * student.cache_bytes
    towers = samples * student.tower_flops(VISUAL_TOKENS) * (2 if full else 1)
    if teacher is not None:
        towers += samples * teacher.tower_flops(VISUAL_TOKENS)
    # Backward costs one more forward for activations and one for weights; checkpointing adds one to recompute
    passes = 4 if full else 3
    student_head = samples * student.head_flops(COMPLETION_TOKENS) * (4 if full else 3)
    seconds = {
        "images": towers / compute,
        "rollout: prefill": samples * student.decoder_flops(PROMPT_TOKENS) / compute,
        "rollout: decode": COMPLETION_TOKENS * (student_bytes + cache) / bandwidth,
        "teacher": samples * (scorer.decoder_flops(scored_sequence) + scorer.head_flops(COMPLETION_TOKENS)) / compute,
        "student": (samples * passes * student.decoder_flops(sequence) + student_head) / compute,
    }
    # Each pass over a micro-batch gathers weights from the other GPUs; time hidden by matrix products does not count
    gathered = samples * (teacher_bytes + (passes - 1) * student_bytes) * (NUM_GPUS - 1) / NUM_GPUS / gpu.link
    seconds["gathering weights"] = max(0.0, gathered - seconds["teacher"] - seconds["student"])

    memory = training_memory(student, teacher, full)
    rollout = {"weights": student_bytes, "KV cache": samples * sequence * student.cache_bytes}
    # vLLM needs about 3 GB for activations and graphs
    share = (sum(rollout.values()) + 3e9) / gpu.memory
    left = gpu.memory * (1 - share)
    per_prompt = memory["checkpoints of a micro-batch"] + memory["activations of one layer"]
    micro_batch = max(1, int((0.9 * left - sum(memory.values())) / per_prompt) + 1)
    return {
        "seconds": seconds,
        "seconds_per_step": sum(seconds.values()),
        "memory": memory,
        "memory_of_rollout": rollout,
        "settings": {
            "vllm_gpu_memory_utilization": round(share + 0.005, 2),
            "per_device_train_batch_size": 1 << (min(micro_batch, int(samples)).bit_length() - 1),
            "fits": sum(memory.values()) + share * gpu.memory < 0.95 * gpu.memory,
        },
    }


def training_memory(student: Costs, teacher: Costs | None, full: bool) -> dict[str, float]:
    """Bytes that training needs on each GPU, with a micro-batch of one prompt."""
    scorer = teacher or student
    sequence = PROMPT_TOKENS + COMPLETION_TOKENS
    text = student.text
    trained = student.parameters + student.module_parameters if full else student.module_parameters
    return {
        "student's weights (shard)": student.parameters * BYTES / NUM_GPUS,
        "teacher's weights (shard)": scorer.parameters * BYTES / NUM_GPUS if teacher is not None or full else 0.0,
        # Gradient and, in float32, master weight and AdamW's two moments
        "gradients, optimizer (shard)": trained * (BYTES + 12) / NUM_GPUS,
        "one gathered layer, twice": 2 * BYTES * max(student.layer_parameters, scorer.layer_parameters),
        "checkpoints of a micro-batch": BYTES * text.num_hidden_layers * text.hidden_size * sequence,
        "activations of one layer": BYTES
        * sequence
        * (8 * text.hidden_size + 4 * text.num_attention_heads * text.head_dim + 4 * text.intermediate_size),
        "loss (logits of one chunk)": 2 * BYTES * COMPLETION_TOKENS * 32768,
        # Merged and DeepStack features of the generation batch, and its pixels, which have a similar size
        "image features": PROMPTS / NUM_GPUS * VISUAL_TOKENS * (4 * text.hidden_size + 4 * 1536) * BYTES,
    }


def check_counts() -> dict[str, float]:
    """Ratios of these counts to those of torch's FLOP counter and of transformers' cache."""
    costs = Costs(CONFIGS["8B"])
    tokens = 1024
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        decoder = Qwen3VLForConditionalGeneration(costs.config).model.language_model
        decoder(inputs_embeds=torch.empty(1, tokens, costs.text.hidden_size))
    with FlopCounterMode(display=False) as tower_counter:
        tower = Qwen3VLForConditionalGeneration._from_config(small_tower()).model.visual
        tower(torch.randn(256, 1536), grid_thw=torch.tensor([[1, 16, 16]]))
    cache = DynamicCache(config=costs.text)
    keys = torch.empty(1, costs.text.num_key_value_heads, tokens, costs.text.head_dim, dtype=torch.bfloat16)
    for layer in range(costs.text.num_hidden_layers):
        cache.update(keys, keys, layer)
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    return {
        "decoder_flops": costs.decoder_flops(tokens, causal=False) / counter.get_total_flops(),
        "tower_flops": Costs(small_tower()).tower_flops(64) / tower_counter.get_total_flops(),
        "cache_bytes": costs.cache_bytes * tokens / stored,
    }


def small_tower() -> Qwen3VLConfig:
    """A vision tower with the 8B's widths but few layers, and a tiny decoder, small enough to run here."""
    vision = dict(VISION_8B, depth=3, deepstack_visual_indexes=[0, 1, 2])
    return Qwen3VLConfig(
        text_config=dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=64, head_dim=16),
        vision_config=dict(**vision, out_hidden_size=4096),
    )


@torch.no_grad()
def check_seconds(repeats: int) -> list[dict[str, Any]]:
    """
    Measured seconds of five decoder layers, relative to the seconds predicted from their FLOPs and this machine's rate
    of matrix products. Both are timed in turns.
    """
    rows = []
    for size in ("2B", "8B"):
        model, costs = make_slice(size), Costs(CONFIGS[size])
        for visual_tokens in GRIDS if IS_CUDA else (64, 256):
            tokens = visual_tokens + NUM_TEXT_TOKENS
            inputs = make_inputs(model, visual_tokens, batch_size=1)
            text = costs.text
            states = torch.randn(tokens, text.hidden_size, device=DEVICE, dtype=model.dtype)
            weight = torch.randn(text.intermediate_size, text.hidden_size, device=DEVICE, dtype=model.dtype)
            product_flops = 2 * states.numel() * text.intermediate_size
            count = 8

            def products(states=states, weight=weight, count=count):
                for _ in range(count):
                    torch.nn.functional.linear(states, weight)

            def layers(model=model, inputs=inputs):
                with model.disable_adapter():
                    model.get_base_model().model(**inputs)

            times = alternate({"layers": forward(layers), "products": forward(products)}, repeats)
            flops = costs.decoder_flops(tokens, layers=5, causal=False)
            rate = [count * product_flops / seconds for seconds in times["products"]]
            predicted = [flops / each for each in rate]
            rows.append(
                {
                    "model": size,
                    "tokens": tokens,
                    "rate_tflops": max(rate) / 1e12,
                    "measured_over_predicted": ratio(times["layers"], predicted),
                }
            )
    return rows


def run(quick: bool = False) -> dict[str, Any]:
    checks = {"counts": check_counts(), "seconds": check_seconds(repeats=1 if quick else 3)}
    for name, value in checks["counts"].items():
        print(f"{name}: {value:.4f} times the count of torch or transformers")
    for row in checks["seconds"]:
        measured = row["measured_over_predicted"]["median"]
        print(f"{row['model']}, {row['tokens']} tokens: measured {measured:.2f} of predicted seconds")
    overhead = {
        f"{size}, {visual_tokens} visual tokens": prefill_overhead(
            Costs(CONFIGS[size]), visual_tokens + NUM_TEXT_TOKENS, GPU()
        )
        for size in ("2B", "8B")
        for visual_tokens in (min(GRIDS), max(GRIDS))
    }
    for name, share in overhead.items():
        print(f"{name}: launches add {share:.1%} to an eager prefill")
    student = Costs(CONFIGS["8B"])
    plans = {}
    for name, teacher, full in (
        ("adapter, own teacher", None, False),
        ("full, frozen 8B teacher", Costs(CONFIGS["8B"]), True),
        ("adapter, 32B teacher", Costs(CONFIGS["32B"]), False),
        ("full, 32B teacher", Costs(CONFIGS["32B"]), True),
    ):
        plans[name] = plan(student, teacher, full, GPU())
        total, settings = plans[name]["seconds_per_step"], plans[name]["settings"]
        memory = sum(plans[name]["memory"].values()) / 1e9
        print(f"{name}: {total:.0f} s per step, {memory:.0f} GB for training on each GPU, {settings}")
        print("  " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in plans[name]["seconds"].items()))
    return {"gpu": GPU()._asdict(), "checks": checks, "prefill_overhead": overhead, "plans": plans}


def plot(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    times, memory = figure.subplots(1, 2)
    names = list(results["plans"])
    for axes, stacks, unit in (
        (times, [plan["seconds"] for plan in results["plans"].values()], 1.0),
        (memory, [with_rollout(plan) for plan in results["plans"].values()], 1e9),
    ):
        left = [0.0] * len(names)
        for part, color in zip(stacks[0], [f"C{index}" for index in range(10)] + ["0.6", "0.8"], strict=False):
            widths = [stack[part] / unit for stack in stacks]
            axes.barh(names, widths, left=left, label=part, color=color)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
        axes.spines[["top", "right"]].set_visible(False)
    times.set_xlabel("seconds per step (computed)")
    memory.set_xlabel("GB on each GPU (computed)")
    memory.axvline(results["gpu"]["memory"] / 1e9, color="black", linewidth=0.8)
    memory.set_yticklabels([])
    figure.suptitle("Qwen3-VL-8B on 8 H100, 128 prompts of 2,048 tokens, completions of 4,096")
    return figure


def with_rollout(plan: dict[str, Any]) -> dict[str, float]:
    return {**plan["memory"], **{f"vLLM: {part}": size for part, size in plan["memory_of_rollout"].items()}}
