"""
Seconds per training step of `ViCuRTrainer` with everything of its own switched off (`privilege="none"`,
`distillation_mode="full_logits"`, external teacher, no module), against TRL's `DistillationTrainer`.

    python benchmarks/step_time.py

Each run is a process of its own, so that its peak memory is its own; the two sides alternate. Prints the medians and
the ratio of each pair. Runs on whatever device accelerate picks.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


SIDES = ("ViCuRTrainer", "DistillationTrainer")


def run_side(side: str, steps: int) -> dict[str, float]:
    """Train a tiny Qwen3-VL for some steps; the first two are not counted."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import datasets
    from tiny_models import make_image, make_processor, make_qwen3_vl
    from transformers import TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    from trl_vicur import ViCuRConfig, ViCuRTrainer

    class Clock(TrainerCallback):
        seconds: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds.append(time.perf_counter() - self.start)

    arguments = dict(
        output_dir="unused",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=steps + 2,
        max_completion_length=32,
        beta=0.5,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10,
    )
    rows = [
        {"prompt": [{"role": "user", "content": f"What is in picture {i}?"}], "images": [make_image(i, (96, 96))]}
        for i in range(64)
    ]
    trainer_class, args = (
        (ViCuRTrainer, ViCuRConfig(privilege="none", distillation_mode="full_logits", **arguments))
        if side == "ViCuRTrainer"
        else (DistillationTrainer, DistillationConfig(**arguments))
    )
    trainer = trainer_class(
        model=make_qwen3_vl(hidden_size=128),
        teacher_model=make_qwen3_vl(hidden_size=128, seed=1),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=make_processor(),
        callbacks=[clock := Clock()],
    )
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds_per_step": statistics.median(clock.seconds[2:]), "peak_mib": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="counted steps of each run")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each side")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # one run, used internally
    arguments = parser.parse_args()
    if arguments.side is not None:
        print(json.dumps(run_side(arguments.side, arguments.steps)))
        return

    results = {side: [] for side in SIDES}
    for repeat in range(arguments.repeats):
        for side in SIDES if repeat % 2 == 0 else reversed(SIDES):
            command = [sys.executable, "-W", "ignore", __file__, "--side", side, "--steps", str(arguments.steps)]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            results[side].append(json.loads(output.splitlines()[-1]))
            print(f"{repeat + 1}/{arguments.repeats} {side}: {results[side][-1]}", flush=True)
    for name, unit in (("seconds_per_step", "s"), ("peak_mib", "MiB")):
        ours, theirs = ([run[name] for run in results[side]] for side in SIDES)
        ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        print(
            f"{name}: ViCuRTrainer {statistics.median(ours):.4g} {unit}, "
            f"DistillationTrainer {statistics.median(theirs):.4g} {unit}, ratio {ratio:.3f}"
        )


if __name__ == "__main__":
    main()
