"""
Measures how step time and peak memory grow with completion length, batch size, image size and number of images, for
`ViCuRTrainer` and TRL's `DistillationTrainer`. Growth is the slope of a line fitted to the logarithms; 1 is linear.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from training_run import TrainingRun, alternate_runs


AXES = {
    "completion_length": (32, 64, 128),
    "batch_size": (4, 8, 16),
    "image_size": (128, 256, 512),
    "num_images": (1, 2, 4),
}
# Fixed values of the other quantities while one grows
POINT = dict(model="growth", batch_size=4, completion_length=16, image_size=128)
KEYS = {"cpu_seconds_per_step": "CPU seconds per step", "peak_mib": "peak memory, MiB"}
SIDES = {
    "ViCuRTrainer": TrainingRun(trainer="ViCuRTrainer", adapter=dict(r=16, layer_interval=2)),
    "DistillationTrainer": TrainingRun(
        trainer="DistillationTrainer", teacher_copy=True, adapter=dict(r=16, target_modules="all-linear")
    ),
}


def run(quick: bool = False) -> dict[str, Any]:
    rows = []
    for axis, values in AXES.items():
        for value in values[:2] if quick else values:
            settings = {**POINT, axis: value, "steps": 1 if quick else 2}
            sides = {name: TrainingRun(**{**vars(side), **settings}) for name, side in SIDES.items()}
            print(f"{axis} {value}", flush=True)
            for name, (figures,) in alternate_runs(sides, repeats=1).items():
                rows.append({"axis": axis, "value": value, "side": name, **figures})
    slopes = {axis: {name: {key: slope(rows, axis, name, key) for key in KEYS} for name in SIDES} for axis in AXES}
    for axis, sides in slopes.items():
        for name, figures in sides.items():
            seconds, memory = (figures[key] for key in KEYS)
            print(f"{axis}, {name}: slope of time {seconds:.2f}, of memory {memory:.2f}")
    return {"rows": rows, "slopes": slopes}


def slope(rows: list[dict[str, Any]], axis: str, side: str, key: str) -> float:
    points = [(row["value"], row[key]) for row in rows if row["axis"] == axis and row["side"] == side]
    values, figures = np.log(np.array(points)).T
    return float(np.polyfit(values, figures, 1)[0])


def plot(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    panels = figure.subplots(2, len(AXES))
    for column, axis in enumerate(AXES):
        for row, (key, label) in enumerate(KEYS.items()):
            axes = panels[row][column]
            for name in SIDES:
                points = [p for p in results["rows"] if p["axis"] == axis and p["side"] == name]
                label_of_side = f"{name}, slope {results['slopes'][axis][name][key]:.2f}"
                axes.loglog([p["value"] for p in points], [p[key] for p in points], "o-", label=label_of_side)
            axes.set_xticks(AXES[axis], [str(value) for value in AXES[axis]])
            axes.yaxis.set_major_formatter("{x:.4g}")
            axes.yaxis.set_minor_formatter("{x:.4g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(labelsize=7, which="both")
            axes.legend(fontsize=7)
            axes.set_ylabel(label if column == 0 else "")
            axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel(axis)
    return figure
