"""
Compares whole training steps with TRL's `DistillationTrainer`, on the same model, data and generation settings.

Switched off: `ViCuRTrainer` with all its features off (`privilege="none"`, `distillation_mode="full_logits"`, a copy
as teacher, no module), to measure the cost of the trainer itself. As used: an adapter (the module alone, the default,
or module and LoRA) that is its own teacher, on cues, with the sampled-token objective; against TRL with a LoRA student
and with full fine-tuning, both with a second copy of the model as teacher.

Each comparison runs in float32 and with `bf16=True`, and records the dtypes that decoder layers computed in.
"""

import json
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from measure import ratio
from training_run import TrainingRun, interleave


OURS = "ViCuRTrainer"


# Rows per micro-batch
BATCH_SIZES = {"tiny": 8, "100M": 2}


def switched_off(model: str, steps: int, bf16: bool) -> dict[str, TrainingRun]:
    sizes = dict(model=model, batch_size=BATCH_SIZES[model], steps=steps, teacher_copy=True, bf16=bf16)
    nothing = dict(privilege="none", distillation_mode="full_logits", share_vision_features="never")
    return {
        OURS: TrainingRun(OURS, arguments=nothing, **sizes),
        "DistillationTrainer": TrainingRun("DistillationTrainer", **sizes),
    }


def module_alone(model: str, steps: int, bf16: bool) -> dict[str, TrainingRun]:
    return as_used(model, steps, bf16, adapter={})


def module_and_lora(model: str, steps: int, bf16: bool) -> dict[str, TrainingRun]:
    return as_used(model, steps, bf16, adapter=dict(r=16))


def as_used(model: str, steps: int, bf16: bool, adapter: dict[str, Any]) -> dict[str, TrainingRun]:
    sizes = dict(model=model, batch_size=BATCH_SIZES[model], steps=steps, bf16=bf16)
    trl = dict(trainer="DistillationTrainer", teacher_copy=True, **sizes)
    return {
        OURS: TrainingRun(OURS, adapter=adapter, **sizes),
        "DistillationTrainer, LoRA": TrainingRun(adapter=dict(r=16, target_modules="all-linear"), **trl),
        "DistillationTrainer, full": TrainingRun(**trl),
    }


def run(quick: bool = False) -> dict[str, Any]:
    results = {}
    for model, steps in (("tiny", 30), ("100M", 4)):
        for bf16 in (False, True):
            for comparison in (switched_off, module_alone, module_and_lora):
                name = f"{model}, {comparison.__name__.replace('_', ' ')}, {'bf16' if bf16 else 'float32'}"
                # Memory is measured in a short run of each side, in its own process
                short_runs = {side: run.measure() for side, run in comparison(model, 1, bf16).items()}
                results[name] = compare_steps(comparison(model, 2 if quick else steps, bf16), short_runs)
                print(f"{name}: {json.dumps(results[name]['sides'])}", flush=True)
                print(f"  {json.dumps(results[name]['ratios'])}", flush=True)
                for side, dtypes in results[name]["dtypes"].items():
                    print(f"  {side} computed in {json.dumps(dtypes)}", flush=True)
    return {"comparisons": results}


def compare_steps(runs: dict[str, TrainingRun], short_runs: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Seconds and dtypes of runs that take turns in this process, and memory from the short runs."""
    times, dtypes = interleave(runs)
    used = {side: memory(short_runs[side]) for side in runs}
    return {
        "sides": {side: {"seconds_per_step": median(times[side])} | used[side] for side in runs},
        "ratios": {
            side: {
                "seconds_per_step": ratio(times[OURS], times[side]),
                **{key: value / used[side][key] for key, value in used[OURS].items()},
            }
            for side in runs
            if side != OURS
        },
        "dtypes": dtypes,
        "steps": times,
    }


def memory(run: dict[str, float]) -> dict[str, float]:
    return {key: run[key] for key in ("weights_mib", "peak_mib")}


def plot(results: dict[str, Any]) -> Figure:
    keys = {"seconds_per_step": "seconds per step", "weights_mib": "weights, MiB", "peak_mib": "peak memory, MiB"}
    figure = Figure(figsize=(2.7 * len(results["comparisons"]), 6), layout="constrained")
    panels = figure.subplots(len(keys), len(results["comparisons"]))
    for column, (name, comparison) in enumerate(results["comparisons"].items()):
        panels[0][column].set_title(name, fontsize=10)
        for row, (key, label) in enumerate(keys.items()):
            axes = panels[row][column]
            sides = [side.replace("Trainer", "\nTrainer").replace(", ", ",\n") for side in comparison["sides"]]
            colors = ["C0" if side == OURS else "0.7" for side in comparison["sides"]]
            bars = axes.bar(sides, [figures[key] for figures in comparison["sides"].values()], color=colors)
            axes.bar_label(bars, fmt="{:,.4g}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.set_ylabel(label if column == 0 else "")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(y=0.15)
    return figure
