"""
Whole training steps against TRL's `DistillationTrainer`: the same model, data and generation settings.

Switched off: `ViCuRTrainer` with nothing of its own (`privilege="none"`, `distillation_mode="full_logits"`, a copy as
teacher, no module), which is what the trainer itself costs. As used: an adapter of module and LoRA that is its own
teacher, on cues, by the sampled token; against TRL with a LoRA student, and with full fine-tuning, both with a second
copy of the model as teacher.
"""

from typing import Any

from matplotlib.figure import Figure
from training_run import TrainingRun, alternate_runs, compare


OURS = "ViCuRTrainer"


def comparisons(model: str, steps: int) -> dict[str, dict[str, TrainingRun]]:
    sizes = dict(model=model, steps=steps)
    lora = dict(r=16, target_modules="all-linear")
    trl = dict(trainer="DistillationTrainer", teacher_copy=True, **sizes)
    return {
        f"{model}, switched off": {
            OURS: TrainingRun(
                trainer=OURS,
                teacher_copy=True,
                arguments=dict(privilege="none", distillation_mode="full_logits", share_vision_features="never"),
                **sizes,
            ),
            "DistillationTrainer": TrainingRun(**trl),
        },
        f"{model}, as used": {
            OURS: TrainingRun(trainer=OURS, adapter=dict(r=16, layer_interval=2), **sizes),
            "DistillationTrainer, LoRA": TrainingRun(adapter=lora, **trl),
            "DistillationTrainer, full": TrainingRun(**trl),
        },
    }


def run(quick: bool = False) -> dict[str, Any]:
    results = {}
    for model, steps, repeats in (("tiny", 12, 5), ("100M", 2, 3)):
        for name, sides in comparisons(model, 1 if quick else steps).items():
            print(name, flush=True)
            results[name] = compare(alternate_runs(sides, 1 if quick else repeats), OURS)
            for side, ratios in results[name]["ratios"].items():
                figures = ", ".join(f"{key} {value['median']:.3f}" for key, value in ratios.items())
                print(f"{name}: ours over {side}: {figures}", flush=True)
    return {"comparisons": results}


def plot(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 6), layout="constrained")
    keys = {"seconds_per_step": "seconds per step", "weights_mib": "weights, MiB", "peak_mib": "peak memory, MiB"}
    panels = figure.subplots(len(keys), len(results["comparisons"]), squeeze=False)
    for column, (name, comparison) in enumerate(results["comparisons"].items()):
        panels[0][column].set_title(name, fontsize=10)
        for row, (key, label) in enumerate(keys.items()):
            axes = panels[row][column]
            sides = [side.replace(", ", ",\n") for side in comparison["sides"]]
            colors = ["C0" if side == OURS else "0.7" for side in comparison["sides"]]
            bars = axes.bar(sides, [side[key] for side in comparison["sides"].values()], color=colors)
            axes.bar_label(bars, fmt="{:.3g}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.set_ylabel(label if column == 0 else "")
            axes.spines[["top", "right"]].set_visible(False)
            axes.margins(y=0.15)
    return figure
