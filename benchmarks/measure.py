"""Tools of all benchmarks: take turns, measure seconds, memory and kernels, save results."""

import ctypes
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import matplotlib
import peft
import torch
import transformers
import trl
from matplotlib.figure import Figure
from torch.utils._python_dispatch import TorchDispatchMode


matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # for its tiny models

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IS_CUDA = DEVICE.type == "cuda"


def machine() -> dict[str, Any]:
    """The device and the library versions of a measurement."""
    return {
        "device": torch.cuda.get_device_name() if IS_CUDA else f"CPU ({platform.machine()}), {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "seconds": "GPU events" if IS_CUDA else "CPU seconds of the process",
        **{library.__name__: library.__version__ for library in (torch, transformers, trl, peft)},
    }


def seconds(function: Callable[[], Any]) -> float:
    """Time of one call: by events on a GPU; on a CPU, the process's CPU time, which other processes disturb less."""
    if IS_CUDA:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    start = time.process_time()
    function()
    return time.process_time() - start


def wall_seconds(function: Callable[[], Any]) -> float:
    """Wall-clock time of one call, for work that is done by other processes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(
    sides: dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    time_call: Callable[[Callable[[], Any]], float] = seconds,
) -> dict[str, list[float]]:
    """Seconds of each side's calls. The sides take turns, and every other turn runs in reverse order."""
    times = {name: [] for name in sides}
    for repeat in range(-warmup, repeats):
        for name in list(sides) if repeat % 2 == 0 else reversed(sides):
            elapsed = time_call(sides[name])
            if repeat >= 0:
                times[name].append(elapsed)
    return times


def peak_memory(function: Callable[[], Any]) -> int:
    """Peak memory of a call, in bytes above the memory before it."""
    gc.collect()
    if IS_CUDA:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # Return freed memory to the system first: allocations that reuse it would not be counted
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the process's peak (VmHWM) to its current size
    before = process_memory("VmRSS")
    function()
    return process_memory("VmHWM") - before


class CountKernels(TorchDispatchMode):
    """
    While active, counts the operations that launch a kernel; views and allocations do not. A norm counts as one,
    forward or backward, as on a GPU, where it is fused; on a CPU it consists of several operations.
    """

    WITHOUT_KERNEL = {
        *("view", "_unsafe_view", "reshape", "expand", "transpose", "permute", "t", "unsqueeze", "squeeze", "select"),
        *("slice", "split", "split_with_sizes", "unbind", "unfold", "as_strided", "detach", "alias", "lift_fresh"),
        *("empty", "empty_like", "new_empty", "new_empty_strided", "promote_types"),
    }

    def __init__(self):
        super().__init__()
        self.kernels: list[str] = []
        self.is_in_norm = False
        self.norms = patch.object(torch.nn.functional, "rms_norm", self._rms_norm)

    def __enter__(self):
        self.norms.start()
        return super().__enter__()

    def __exit__(self, *args):
        super().__exit__(*args)
        self.norms.stop()

    def _rms_norm(self, input, normalized_shape, weight=None, eps=None):
        return _CountedNorm.apply(self, input, normalized_shape, weight, eps)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if not self.is_in_norm and name not in self.WITHOUT_KERNEL:
            self.kernels.append(name)
        return function(*args, **(kwargs or {}))

    @contextmanager
    def one_kernel(self, name: str) -> Iterator[None]:
        self.kernels.append(name)
        self.is_in_norm = True
        try:
            yield
        finally:
            self.is_in_norm = False


class _CountedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, counter, inputs, shape, weight, eps):
        ctx.save_for_backward(inputs, weight)
        ctx.counter, ctx.shape, ctx.eps = counter, shape, eps
        with counter.one_kernel("rms_norm"):
            return torch.rms_norm(inputs, shape, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        needed = (ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        with ctx.counter.one_kernel("rms_norm_backward"), torch.enable_grad():
            saved = ctx.saved_tensors
            inputs = [
                each if each is None else each.detach().requires_grad_(need)
                for each, need in zip(saved, needed, strict=True)
            ]
            output = torch.rms_norm(inputs[0], ctx.shape, inputs[1], ctx.eps)
            grads = iter(
                torch.autograd.grad(output, [each for each, need in zip(inputs, needed, strict=True) if need], grad)
            )
        grad_inputs, grad_weight = (next(grads) if need else None for need in needed)
        return None, grad_inputs, None, grad_weight, None


def process_memory(field: str) -> int:
    """The process's memory in bytes: current (`"VmRSS"`), allocated (`"RssAnon"`) or at its peak (`"VmHWM"`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Median, lowest and highest of the ratios of all pairs of turns."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {"median": median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def save(name: str, results: dict[str, Any], figure: Figure) -> None:
    """Writes `results/NAME.json` and `results/NAME.png`."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(
        {"command": f"python benchmarks/run.py --only {name}", "machine": machine(), **results}, indent=2
    )
    (RESULTS / f"{name}.json").write_text(text + "\n")
    figure.savefig(RESULTS / f"{name}.png", dpi=120, bbox_inches="tight")
    print(f"Wrote {RESULTS / name}.json and .png", flush=True)
