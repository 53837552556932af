"""
Whole training steps against TRL's `DistillationTrainer`: the same model, data and generation settings.

Switched off: `ViCuRTrainer` with nothing of its own (`privilege="none"`, `distillation_mode="full_logits"`, a copy as
teacher, no module), which is what the trainer itself costs. As used: an adapter (the module alone, as by default, or
module and LoRA) that is its own teacher, on cues, by the sampled token; against TRL with a LoRA student, and with full
fine-tuning, both with a second copy of the model as teacher.
"""

import json
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from measure import ratio
from training_run import TrainingRun, interleave


OURS = "ViCuRTrainer"


# Rows of a micro-batch
BATCH_SIZES = {"tiny": 8, "100M": 2}


def switched_off(model: str, steps: int) -> dict[str, TrainingRun]:
    sizes = dict(model=model, batch_size=BATCH_SIZES[model], steps=steps, teacher_copy=True)
    nothing = dict(privilege="none", distillation_mode="full_logits", share_vision_features="never")
    return {
        OURS: TrainingRun(OURS, arguments=nothing, **sizes),
        "DistillationTrainer": TrainingRun("DistillationTrainer", **sizes),
    }


def module_alone(model: str, steps: int) -> dict[str, TrainingRun]:
    return as_used(model, steps, adapter={})


def module_and_lora(model: str, steps: int) -> dict[str, TrainingRun]:
    return as_used(model, steps, adapter=dict(r=16))


def as_used(model: str, steps: int, adapter: dict[str, Any]) -> dict[str, TrainingRun]:
    sizes = dict(model=model, batch_size=BATCH_SIZES[model], steps=steps)
    trl = dict(trainer="DistillationTrainer", teacher_copy=True, **sizes)
    return {
        OURS: TrainingRun(OURS, adapter=adapter, **sizes),
        "DistillationTrainer, LoRA": TrainingRun(adapter=dict(r=16, target_modules="all-linear"), **trl),
        "DistillationTrainer, full": TrainingRun(**trl),
    }


def run(quick: bool = False) -> dict[str, Any]:
    results = {}
    for model, steps in (("tiny", 30), ("100M", 4)):
        for comparison in (switched_off, module_alone, module_and_lora):
            # Seconds from steps that take turns in one process, memory from a short run of each side in its own
            times = interleave(comparison(model, 2 if quick else steps))
            runs = {side: run.measure() for side, run in comparison(model, steps=1).items()}
            name = f"{model}, {comparison.__name__.replace('_', ' ')}"
            results[name] = {
                "sides": {side: {"seconds_per_step": median(times[side])} | memory(runs[side]) for side in runs},
                "ratios": {
                    side: {
                        "seconds_per_step": ratio(times[OURS], times[side]),
                        **{key: value / memory(runs[side])[key] for key, value in memory(runs[OURS]).items()},
                    }
                    for side in runs
                    if side != OURS
                },
                "steps": times,
            }
            print(f"{name}: {json.dumps(results[name]['sides'])}\n  {json.dumps(results[name]['ratios'])}", flush=True)
    return {"comparisons": results}


def memory(run: dict[str, float]) -> dict[str, float]:
    return {key: run[key] for key in ("weights_mib", "peak_mib")}


def plot(results: dict[str, Any]) -> Figure:
    keys = {"seconds_per_step": "seconds per step", "weights_mib": "weights, MiB", "peak_mib": "peak memory, MiB"}
    figure = Figure(figsize=(16, 6), layout="constrained")
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
