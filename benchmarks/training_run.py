"""
Training runs for the benchmarks of whole steps, each in its own process to measure its peak memory.

As a script, it runs one `TrainingRun`, given as JSON, and prints its measurements as JSON.
"""

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from measure import IS_CUDA, process_memory, ratio
from peft import LoraConfig
from tiny_models import make_image, make_processor, make_qwen3_vl
from transformers import Qwen3VLProcessor, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer
from trl_vicur.trainer.vision.features import get_backbone


# Warm-up steps, which are not counted
WARMUP_STEPS = 2
OUTPUT = TemporaryDirectory()  # nothing is saved, but a trainer creates its `output_dir`
# Changes to the text and vision configs of the tests' tiny Qwen3-VL
MODELS = {
    "tiny": dict(hidden_size=128, num_layers=6),
    # About 100M parameters, 78M of them in the embeddings of the real vocabulary
    "100M": dict(
        hidden_size=512,
        num_layers=8,
        intermediate_size=1536,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [12, 10, 10],
            "mrope_interleaved": True,
        },
        vocab_size=151936,
        vision_config=dict(depth=4, hidden_size=256, intermediate_size=1024, num_heads=4),
    ),
    # Large enough that fixed costs do not dominate a step
    "growth": dict(
        hidden_size=256, num_layers=6, vocab_size=16384, vision_config=dict(depth=4, hidden_size=128, num_heads=4)
    ),
    # The tower takes more than half of a forward pass with images of 256×256 pixels
    "image-heavy": dict(
        hidden_size=512, vision_config=dict(depth=6, hidden_size=256, intermediate_size=1024, num_heads=4)
    ),
}


@dataclass
class TrainingRun:
    """
    The settings of one run, which can be sent to a process as JSON.

    `trainer` is the name of the trainer's class and `arguments` are options of its config. `adapter` are the arguments
    of a `CueRecoveryConfig` (of a `LoraConfig` for TRL's trainer); `None` trains the whole model. `teacher_copy` gives
    the trainer a second copy of the model as teacher.
    """

    trainer: str
    model: str = "tiny"
    steps: int = 10
    batch_size: int = 8
    image_size: int = 96
    num_images: int = 1
    completion_length: int = 32
    teacher_copy: bool = False
    bf16: bool = IS_CUDA
    adapter: dict[str, Any] | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def measure(self) -> dict[str, float]:
        """Trains in a separate process and returns its measurements."""
        command = [sys.executable, "-W", "ignore", __file__, json.dumps(asdict(self))]
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        return json.loads(output.splitlines()[-1])


def alternate_runs(sides: dict[str, TrainingRun], repeats: int) -> dict[str, list[dict[str, float]]]:
    """Measurements of each side. The sides take turns, and every other turn runs in reverse order."""
    results = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides) if repeat % 2 == 0 else reversed(sides):
            results[name].append(sides[name].measure())
            figures = ", ".join(f"{key} {value:.4g}" for key, value in results[name][-1].items())
            print(f"{repeat + 1}/{repeats} {name}: {figures}", flush=True)
    return results


def compare(runs: dict[str, list[dict[str, float]]], ours: str) -> dict[str, Any]:
    """Medians of each side, and the ratios of `ours` to each other side."""
    sides = {side: {key: median(run[key] for run in results) for key in results[0]} for side, results in runs.items()}
    ratios = {
        side: {key: ratio([run[key] for run in runs[ours]], [run[key] for run in runs[side]]) for key in runs[ours][0]}
        for side in runs
        if side != ours
    }
    return {"sides": sides, "ratios": ratios, "runs": runs}


def make_large_image_processor() -> Qwen3VLProcessor:
    """The tests' processor, changed to accept images of up to 1,024 visual tokens."""
    processor = make_processor()
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 1024 * 1024}
    return processor


class Clock:
    """Collects seconds, and the process's CPU seconds, which other work on the machine disturbs less."""

    def __init__(self):
        self.seconds, self.cpu_seconds = [], []

    def start(self) -> None:
        self.started = self.now()

    def stop(self) -> None:
        (start, cpu_start), (end, cpu_end) = self.started, self.now()
        self.seconds.append(end - start)
        self.cpu_seconds.append(cpu_end - cpu_start)

    @staticmethod
    def now() -> tuple[float, float]:
        if IS_CUDA:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()


class StepClock(TrainerCallback):
    """Times each optimizer step of a run, including its rollouts."""

    def __init__(self):
        self.clock = Clock()

    def on_step_begin(self, args, state, control, **kwargs):
        self.clock.start()

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.stop()


class TurnTaker(TrainerCallback):
    """Lets several runs in this process take turns, one step at a time, and times this run's steps."""

    def __init__(self):
        self.turn = threading.Semaphore(0)
        self.next: TurnTaker | None = None
        self.clock = Clock()

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            self.clock.stop()
            self.next.turn.release()
        self.turn.acquire()
        self.clock.start()

    def on_train_end(self, args, state, control, **kwargs):
        self.next.turn.release()


def interleave(runs: dict[str, TrainingRun]) -> tuple[dict[str, list[float]], dict[str, dict[str, list[str]]]]:
    """
    Runs training runs in turns, step by step, in this process. Returns the seconds of each step (CPU seconds on a CPU)
    and the dtypes that each run computed in. This detects differences of a few percent, even if the machine's speed
    changes from minute to minute.
    """
    turns = {name: TurnTaker() for name in runs}
    for taker, following in zip(turns.values(), [*list(turns.values())[1:], next(iter(turns.values()))], strict=True):
        taker.next = following
    trainers = [make_trainer(run, turns[name]) for name, run in runs.items()]
    dtypes = {name: watch_dtypes(trainer) for name, trainer in zip(runs, trainers, strict=True)}
    threads = [threading.Thread(target=trainer.train) for trainer in trainers]
    for thread in threads:
        thread.start()
    next(iter(turns.values())).turn.release()
    for thread in threads:
        thread.join()
    clocks = {name: taker.clock for name, taker in turns.items()}
    times = {name: (c.seconds if IS_CUDA else c.cpu_seconds)[WARMUP_STEPS:] for name, c in clocks.items()}
    return times, {name: {key: sorted(values) for key, values in seen.items()} for name, seen in dtypes.items()}


def watch_dtypes(trainer: DistillationTrainer) -> dict[str, set[str]]:
    """The dtypes of a decoder layer's matrix products in rollouts and in the loss, collected during training."""
    seen = {}
    is_in_loss = False
    compute_loss = trainer.compute_loss

    def watched_loss(*args, **kwargs):
        nonlocal is_in_loss
        is_in_loss = True
        try:
            return compute_loss(*args, **kwargs)
        finally:
            is_in_loss = False

    trainer.compute_loss = watched_loss

    def note(_, args, output: torch.Tensor) -> None:
        with_gradient = "student" if torch.is_grad_enabled() else "teacher"
        key = f"loss, {with_gradient}" if is_in_loss else "rollout"
        seen.setdefault(key, set()).add(str(output.dtype).removeprefix("torch."))

    for model in (trainer.model, trainer.teacher_model):
        if model is not None:
            get_backbone(model).get_decoder().layers[0].mlp.down_proj.register_forward_hook(note)
    return seen


def make_trainer(run: TrainingRun, callback: TrainerCallback) -> DistillationTrainer:
    size = (run.image_size, run.image_size)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is in picture {row}?"}],
            "images": [make_image(run.num_images * row + i, size) for i in range(run.num_images)],
            "cue": "noise in many colours, with no shape in it",
        }
        for row in range(64)
    ]
    trainer_class, config_class, adapter_class = {
        "ViCuRTrainer": (ViCuRTrainer, ViCuRConfig, CueRecoveryConfig),
        "DistillationTrainer": (DistillationTrainer, DistillationConfig, LoraConfig),
    }[run.trainer]
    arguments = dict(
        output_dir=OUTPUT.name,
        per_device_train_batch_size=run.batch_size,
        gradient_accumulation_steps=2,
        max_steps=run.steps + WARMUP_STEPS,
        max_completion_length=run.completion_length,
        generation_kwargs=dict(min_new_tokens=run.completion_length),  # the same length in every run
        bf16=run.bf16,
        use_cpu=not IS_CUDA,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
    )
    return trainer_class(
        model=make_qwen3_vl(**MODELS[run.model]),
        teacher_model=make_qwen3_vl(**MODELS[run.model]) if run.teacher_copy else None,
        args=config_class(**{**arguments, **run.arguments}),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_large_image_processor(),
        peft_config=None if run.adapter is None else adapter_class(**run.adapter),
        callbacks=[callback],
    )


def train(run: TrainingRun) -> dict[str, float]:
    before = process_memory("VmRSS")
    trainer = make_trainer(run, callback := StepClock())
    models = [model for model in (trainer.model, trainer.teacher_model) if model is not None]
    weights = {parameter for model in models for parameter in model.parameters()}
    num_encoded = 0

    def count(_, args, kwargs):
        nonlocal num_encoded
        num_encoded += len(kwargs["grid_thw"])

    for model in models:
        get_backbone(model).visual.register_forward_pre_hook(count, with_kwargs=True)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if IS_CUDA else process_memory("VmHWM") - before
    num_images = 2 * run.batch_size * run.num_images * trainer.state.global_step
    return {
        "seconds_per_step": median(callback.clock.seconds[WARMUP_STEPS:]),
        "cpu_seconds_per_step": median(callback.clock.cpu_seconds[WARMUP_STEPS:]),
        "peak_mib": peak / 2**20,
        "weights_mib": sum(weight.numel() * weight.element_size() for weight in weights) / 2**20,
        "encodings_per_image": num_encoded / num_images,
    }


if __name__ == "__main__":
    print(json.dumps(train(TrainingRun(**json.loads(sys.argv[1])))))
