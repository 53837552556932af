"""
Measures the check of all rows before training: rows per second, and how long a resumed run takes to find that its rows
have passed.

    python benchmarks/run.py --only row_checks

The baseline is `datasets`, which reads every row once in one process and decodes its image. Sides take turns. Seconds
are wall-clock time, because worker processes do the work. Memory is the peak of the main process.
"""

import tempfile
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
from datasets import Dataset, Features, Image, List, Value, load_from_disk
from matplotlib.figure import Figure
from measure import alternate, peak_memory, ratio, wall_seconds
from PIL import Image as PILImage
from tiny_models import make_processor

from trl_vicur import ViCuRConfig
from trl_vicur.trainer.checks.datasets import check_dataset
from trl_vicur.trainer.checks.receipts import receipt_of
from trl_vicur.trainer.checks.rows import RowChecker


FEATURES = Features(
    {
        "prompt": List({"role": Value("string"), "content": Value("string")}),
        "images": List(Image()),
        "cue": Value("string"),
    }
)


def make_png(side: int) -> bytes:
    """An image that compresses about as well as a photograph."""
    x = np.linspace(0, 40, side)
    waves = 128 + 60 * np.sin(x)[:, None, None] + 60 * np.cos(x)[None, :, None]
    pixels = (waves + np.random.default_rng(0).normal(0, 4, (side, side, 3))).clip(0, 255).astype(np.uint8)
    buffer = BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_dataset(folder: Path, count: int, image: dict[str, Any]) -> Dataset:
    """Rows with the same image, read from disk like any large dataset."""
    rows = {
        "prompt": [[{"role": "user", "content": f"question {number}"}] for number in range(count)],
        "images": [[image]] * count,
        "cue": [f"evidence {number}" for number in range(count)],
    }
    Dataset.from_dict(rows, features=FEATURES).save_to_disk(str(folder))
    return load_from_disk(str(folder))


def make_checker(num_proc: int | None = None) -> RowChecker:
    args = ViCuRConfig(
        tempfile.mkdtemp(), bf16=False, use_cpu=True, report_to="none", disable_tqdm=True, dataset_num_proc=num_proc
    )
    return RowChecker(args, make_processor(), max_length=10**6)


def check(dataset: Dataset, num_proc: int | None = None) -> None:
    checker = make_checker(num_proc)
    check_dataset(dataset, "dataset", checker, checker.args)


def read(dataset: Dataset) -> None:
    for _ in dataset:
        pass


def measure_throughput(side: int, count: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(Path(folder, "rows"), count, {"bytes": make_png(side), "path": None})
        sides = {
            "datasets": lambda: read(dataset),
            "one process": lambda: check(dataset),
            "two processes": lambda: check(dataset, num_proc=2),
        }
        times = alternate(sides, repeats, time_call=wall_seconds)
        memory = {name: peak_memory(function) / 2**20 for name, function in sides.items()}
    return {
        "rows_per_second": {name: count / median(seconds) for name, seconds in times.items()},
        "ratio": {name: ratio(times["datasets"], times[name]) for name in list(sides)[1:]},
        "mebibytes": memory,
    }


def measure_resume(count: int) -> dict[str, float]:
    """Seconds until a resumed run knows that its rows have passed, with images in the dataset and as files."""
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "image.png")
        file.write_bytes(make_png(4))
        images = {"in the dataset": {"bytes": make_png(4), "path": None}, "files": {"bytes": None, "path": str(file)}}
        for kind, image in images.items():
            dataset = make_dataset(Path(folder, kind), count, image)
            checker = make_checker()
            results[kind] = wall_seconds(lambda dataset=dataset, checker=checker: receipt_of(dataset, checker))
    return results


def run(quick: bool = False) -> dict[str, Any]:
    datasets.disable_progress_bars()
    datasets.disable_caching()
    counts = {64: 200} if quick else {64: 4_000, 500: 600, 1_000: 200}
    throughput = {}
    for side, count in counts.items():
        throughput[side] = measure_throughput(side, count, 1 if quick else 3)
        print(side, throughput[side], flush=True)
    datasets.enable_caching()
    resume = {count: measure_resume(count) for count in ([1_000] if quick else [1_000, 100_000, 1_000_000])}
    print(resume, flush=True)
    return {"throughput": throughput, "resume": resume}


def plot(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in ("datasets", "one process", "two processes"):
        rates = {int(side): each["rows_per_second"][name] for side, each in results["throughput"].items()}
        left.loglog(list(rates), list(rates.values()), "o-", label=name)
    left.set_title("rows per second", fontsize=10)
    left.set_xlabel("side of the image, pixels")
    left.legend(frameon=False)
    for kind in ("in the dataset", "files"):
        seconds = {int(count): each[kind] for count, each in results["resume"].items()}
        right.loglog(list(seconds), list(seconds.values()), "o-", label=f"images {kind}")
    right.set_title("seconds of a resumed run", fontsize=10)
    right.set_xlabel("rows")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
