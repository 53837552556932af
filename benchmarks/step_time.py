"""
Whole training steps against TRL's `DistillationTrainer`: the same model, data and generation settings.

Switched off: `ViCuRTrainer` with nothing of its own (`privilege="none"`, `distillation_mode="full_logits"`, a copy as
teacher, no module), which is what the trainer itself costs. As used: an adapter of module and LoRA that is its own
teacher, on cues, by the sampled token; against TRL with a LoRA student, and with full fine-tuning, both with a second
copy of the model as teacher.
"""

from statistics import median
from typing import Any

from matplotlib.figure import Figure
from measure import ratio
from training_run import TrainingRun, alternate_runs, compare, interleave


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


def as_used(model: str, steps: int) -> dict[str, TrainingRun]:
    sizes = dict(model=model, batch_size=BATCH_SIZES[model], steps=steps)
    trl = dict(trainer="DistillationTrainer", teacher_copy=True, **sizes)
    return {
        OURS: TrainingRun(OURS, adapter=dict(r=16, layer_interval=2), **sizes),
        "DistillationTrainer, LoRA": TrainingRun(adapter=dict(r=16, target_modules="all-linear"), **trl),
        "DistillationTrainer, full": TrainingRun(**trl),
    }


def run(quick: bool = False) -> dict[str, Any]:
    results = {"switched_off": {}, "as_used": {}}
    for model, steps in (("tiny", 40), ("100M", 5)):
        # Step by step, because the ratio is near one
        times = interleave(switched_off(model, 2 if quick else steps))
        ratios = ratio(times[OURS], times["DistillationTrainer"])
        results["switched_off"][model] = {
            "seconds_per_step": {side: median(values) for side, values in times.items()},
            "ratio": ratios,
            "ratio_of_medians": median(times[OURS]) / median(times["DistillationTrainer"]),
            "steps": times,
        }
        print(f"{model}, switched off: {results['switched_off'][model]['seconds_per_step']}, {ratios}", flush=True)
    for model, steps, repeats in (("tiny", 12, 3), ("100M", 2, 3)):
        runs = alternate_runs(as_used(model, 1 if quick else steps), 1 if quick else repeats)
        results["as_used"][model] = compare(runs, OURS)
        for side, ratios in results["as_used"][model]["ratios"].items():
            figures = ", ".join(f"{key} {value['median']:.3f}" for key, value in ratios.items())
            print(f"{model}, as used: ours over {side}: {figures}", flush=True)
    return results


def plot(results: dict[str, Any]) -> Figure:
    keys = {
        "cpu_seconds_per_step": "CPU seconds per step",
        "weights_mib": "weights, MiB",
        "peak_mib": "peak memory, MiB",
    }
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    panels = figure.subplots(2, 1 + len(keys))
    for row, (model, comparison) in enumerate(results["as_used"].items()):
        off = results["switched_off"][model]["seconds_per_step"]
        columns = {"switched off: seconds per step": off} | {
            f"as used: {label}": {side: figures[key] for side, figures in comparison["sides"].items()}
            for key, label in keys.items()
        }
        for axes, (title, values) in zip(panels[row], columns.items(), strict=True):
            sides = [side.replace("Trainer", "\nTrainer").replace(", ", ",\n") for side in values]
            bars = axes.bar(sides, list(values.values()), color=["C0" if side == OURS else "0.7" for side in values])
            axes.bar_label(bars, fmt="{:.3g}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.set_title(title if row == 0 else "", fontsize=9)
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(y=0.15)
        panels[row][0].set_ylabel(f"{model} model")
    return figure
