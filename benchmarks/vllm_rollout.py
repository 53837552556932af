"""
Compares rollouts in vLLM with the recovery module to the same engine without it, and to transformers' `generate`.

It needs vLLM in a separate environment (`.ci/vllm` creates it):

    .venv-vllm/bin/python benchmarks/run.py --only vllm_rollout

A rollout is a batch of prompts with one image each, sampled to the same length; a prefill is a rollout of one token.
All engines are loaded at the same time and take turns. Without the module, vLLM runs with its defaults: prefix caching
and chunked prefill.
"""

import os
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from matplotlib.figure import Figure
from measure import DEVICE, IS_CUDA, alternate, ratio, wall_seconds
from peft import get_peft_model
from tiny_models import encode, make_image, make_qwen3_vl, randomize, user
from training_run import MODELS, make_large_image_processor

from trl_vicur import CueRecoveryConfig


PROMPTS = 16
IMAGE_SIZE = 512  # pixels of a side: 256 visual tokens
NEW_TOKENS = 64
# The smallest head size that vLLM's attention supports on a CPU
TINY = MODELS["tiny"] | {"head_dim": 64, "rope_parameters": MODELS["100M"]["rope_parameters"]}


def run(quick: bool = False) -> dict[str, Any]:
    import vllm

    models = {"tiny": TINY} if quick else {"tiny": TINY, "100M": MODELS["100M"]}
    measured = {name: measure(config, repeats=1 if quick else 5) for name, config in models.items()}
    return {"vllm": vllm.__version__, "seconds": "wall clock", "models": measured}


def measure(config: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Seconds of one model's rollouts and prefills, by each engine."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM, SamplingParams

    processor = make_large_image_processor()
    conversations = [user(f"What is in picture {i}?", make_image(i, (IMAGE_SIZE,) * 2)) for i in range(PROMPTS)]
    prompts = [
        {
            "prompt": processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False),
            "multi_modal_data": {"image": [conversation[0]["content"][0]["image"]]},
        }
        for conversation in conversations
    ]
    with TemporaryDirectory() as folder:
        base, adapter = Path(folder, "base"), Path(folder, "adapter")
        model = make_qwen3_vl(**config)
        model.save_pretrained(base)
        processor.save_pretrained(base)
        student = randomize(get_peft_model(model, CueRecoveryConfig())).eval().to(DEVICE)
        student.save_pretrained(adapter)
        options = dict(dtype="float32", enforce_eager=not IS_CUDA, max_model_len=1024, max_num_seqs=PROMPTS)
        options |= dict(gpu_memory_utilization=0.4, mm_processor_cache_gb=0)
        engines = {
            "vLLM with the module": LLM(str(base), hf_overrides={"cue_recovery": str(adapter)}, **options),
            "vLLM": LLM(str(base), **options),
        }

        def in_engine(engine: LLM, new_tokens: int) -> None:
            sampling = SamplingParams(temperature=1, max_tokens=new_tokens, ignore_eos=True)
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
            engine.reset_prefix_cache()  # a training run never repeats a prompt
            engine.llm_engine.reset_encoder_cache()

        def in_transformers(new_tokens: int) -> None:
            inputs = {name: value.to(DEVICE) for name, value in encode(processor, conversations).items()}
            lengths = dict(max_new_tokens=new_tokens, min_new_tokens=new_tokens)
            with torch.no_grad():
                student.generate(**inputs, do_sample=True, **lengths)

        sides = {name: partial(in_engine, engine) for name, engine in engines.items()}
        sides["transformers with the module"] = in_transformers
        results = {
            work: alternate({name: partial(side, tokens) for name, side in sides.items()}, repeats, 1, wall_seconds)
            for work, tokens in (("rollout", NEW_TOKENS), ("prefill", 1))
        }
        for engine in engines.values():
            engine.llm_engine.engine_core.shutdown()
    ours, plain, transformers = sides
    rollout, prefill = results["rollout"], results["prefill"]
    tokens = PROMPTS * NEW_TOKENS
    rates = {name: [tokens / seconds for seconds in rollout[name]] for name in sides}
    ratios = {
        "throughput_over_plain": ratio(rollout[plain], rollout[ours]),
        "throughput_over_transformers": ratio(rollout[transformers], rollout[ours]),
        "prefill_over_plain": ratio(prefill[ours], prefill[plain]),
    }
    for name, value in ratios.items():
        print(f"{name}: {value['median']:.3f} ({value['lowest']:.3f} - {value['highest']:.3f})", flush=True)
    return {**results, "tokens_per_second": rates, **ratios}


def plot(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(4 * len(results["models"]), 3), layout="constrained")
    for axes, (name, measured) in zip(
        figure.subplots(1, len(results["models"]), squeeze=False)[0], results["models"].items(), strict=True
    ):
        rates = {side.replace(" with", "\nwith"): median(v) for side, v in measured["tokens_per_second"].items()}
        bars = axes.bar(rates.keys(), rates.values(), color=["C0", "0.7", "0.85"])
        axes.bar_label(bars, fmt="{:.0f}")
        axes.set_title(f"{name}: tokens per second", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=8)
    return figure
