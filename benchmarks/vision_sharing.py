"""
Compares encoding images once for rollout, student and teacher with encoding them in each pass.

The model's vision tower takes more than half of a forward pass and is frozen (recovery adapter with LoRA); images have
256×256 pixels.
"""

from typing import Any

import torch
from matplotlib.figure import Figure
from measure import DEVICE, alternate, ratio
from tiny_models import encode, make_image, make_qwen3_vl, user
from training_run import MODELS, TrainingRun, alternate_runs, compare, make_large_image_processor


def run(quick: bool = False) -> dict[str, Any]:
    sides = {
        share: TrainingRun(
            trainer="ViCuRTrainer",
            model="image-heavy",
            steps=2 if quick else 6,
            batch_size=4,
            image_size=256,
            completion_length=8,
            adapter=dict(r=16, layer_interval=2),
            arguments=dict(share_vision_features=share),
        )
        for share in ("auto", "never")
    }
    results = compare(alternate_runs(sides, repeats=1 if quick else 5), ours="auto")
    results["tower_share_of_forward"] = tower_share(sides["auto"])
    speed_up = 1 / results["ratios"]["never"]["cpu_seconds_per_step"]["median"]
    encodings = results["sides"]["auto"]["encodings_per_image"]
    share = results["tower_share_of_forward"]
    print(
        f"Shared: {speed_up:.2f} times as fast, {encodings} encodings per image; tower {share:.0%} of a forward pass"
    )
    return results


@torch.no_grad()
def tower_share(run: TrainingRun) -> float:
    """The vision tower's share of a forward pass over prompts like those of the run."""
    model = make_qwen3_vl(**MODELS[run.model]).to(DEVICE)
    image = make_image(0, (run.image_size, run.image_size))
    prompts = [user("What is in picture 0?", *[image] * run.num_images)] * run.batch_size
    inputs = {name: value.to(DEVICE) for name, value in encode(make_large_image_processor(), prompts).items()}
    pixels = (inputs["pixel_values"], inputs["image_grid_thw"])
    times = alternate({"tower": lambda: model.model.get_image_features(*pixels), "all": lambda: model(**inputs)}, 5)
    return ratio(times["tower"], times["all"])["median"]


def plot(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (key, title) in zip(
        panels,
        (
            ("cpu_seconds_per_step", "CPU seconds per step"),
            ("encodings_per_image", "encodings per image and step"),
            ("peak_mib", "peak memory, MiB"),
        ),
        strict=True,
    ):
        bars = axes.bar(list(results["sides"]), [side[key] for side in results["sides"].values()], color=["C0", "0.7"])
        axes.bar_label(bars, fmt="{:.4g}")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("share_vision_features")
    return figure
