"""
The component study: trains every cell of the grid, on any of its domains, and goes on where it was stopped.

    python examples/study/run.py --domain easy_vqa --seeds 5

Each cell is trained at each of its learning rates with seed 0; the best on validation rows is then used for the other
seeds. A run is a process of its own and leaves one JSON file; what is there is not run again, so that the command may
be stopped at any time, and several may run side by side. `python examples/study/summary.py` makes the tables.
"""

import argparse
import fcntl
import json
import math
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from cells import GRID, REMOVED, Cell, objective_options
from datasets import Dataset, disable_progress_bars
from domains import DOMAINS, STUDY, Domain, evaluate, rows_domain, shortened
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer
from trl_vicur.cue_recovery import CueRecoveryLayer


NUM_CURVE_POINTS = 4
# GRPO's group; it has as many rollouts per step as the others, of fewer prompts
NUM_GENERATIONS = 4
# Linear layers of Qwen3-VL's text decoder and of the mergers between vision tower and decoder
TEXT_LINEAR = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
MERGER_LINEAR = r".*visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc\d"


class LearningCurve(TrainerCallback):
    """Evaluates on validation rows while training, the last time at its end."""

    def __init__(self, domain: Domain, processor: Any, dataset: Dataset):
        self.domain, self.processor, self.dataset = domain, processor, dataset
        self.points: list[dict[str, Any]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        due = round(state.max_steps * (len(self.points) + 1) / NUM_CURVE_POINTS)
        if state.global_step >= due:
            scores = evaluate(model, self.processor, self.domain, self.dataset)
            del scores["right"]
            self.points.append({"step": state.global_step, **scores})


def peft_config(cell: Cell, domain: Domain) -> CueRecoveryConfig | Any | None:
    """The adapter that the cell trains; `None` is full fine-tuning without the module."""
    lora = {}
    if cell.trains in ("lora", "lora_and_merger"):
        targets = TEXT_LINEAR if cell.trains == "lora" else f"{TEXT_LINEAR}|{MERGER_LINEAR}"
        lora = {"r": 16, "lora_alpha": 32, "target_modules": targets}
    if cell.module:
        layer_interval = domain.layer_interval
        if cell.one_layer:
            layer_interval = AutoConfig.from_pretrained(domain.base).get_text_config().num_hidden_layers
        return CueRecoveryConfig(
            layer_interval=layer_interval,
            num_heads=cell.num_heads,
            bottleneck_size=cell.bottleneck_size,
            train_base=cell.trains == "all",
            **lora,
        )
    return LoraConfig(**lora) if lora else None


def share_weights(model: torch.nn.Module) -> None:
    """Lets all layers have the first one's module. The adapter has a copy of it for each, and loads as any other."""
    first, *others = (layer for layer in model.modules() if isinstance(layer, CueRecoveryLayer))
    for layer in others:
        layer.sink_attention = first.sink_attention


def leakage_per_epoch(log: list[dict[str, Any]], rollouts_per_step: int) -> list[dict[str, int]]:
    """How many rollouts spoke of the hint, and how often, per epoch (ViCuR, Table 8), from the logged means."""
    epochs: dict[int, dict[str, int]] = {}
    last_step = 0
    for entry in log:
        if "hint_leakage" in entry:
            rollouts = (entry["step"] - last_step) * rollouts_per_step
            last_step = entry["step"]
            counts = epochs.setdefault(math.ceil(entry["epoch"]), {"rollouts": 0, "samples": 0, "occurrences": 0})
            counts["rollouts"] += rollouts
            counts["samples"] += round(entry["hint_leakage"] * rollouts)
            counts["occurrences"] += round(entry["hint_leakage/occurrences"] * rollouts)
    return list(epochs.values())


def train_cell(
    cell: Cell, domain: Domain, learning_rate: float, seed: int, output_dir: Path, stronger_teacher: str | None
) -> dict[str, Any]:
    """Trains and tests one student, and saves it in `output_dir`. Returns what the JSON file holds."""
    start = time.perf_counter()
    processor = AutoProcessor.from_pretrained(domain.base)
    curve = LearningCurve(domain, processor, domain.load("validation"))
    options = {
        "output_dir": str(output_dir),
        "learning_rate": learning_rate,
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 0.05,  # of all steps
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **domain.training,
    }
    common = {
        "model": domain.base,
        "train_dataset": domain.load("distillation"),
        "processing_class": processor,
        "peft_config": peft_config(cell, domain),
        "callbacks": [curve],
    }
    if cell.privilege == "reward":

        def is_right(completions: list, answer: list[str], **kwargs) -> list[float]:
            texts = [completion[0]["content"] for completion in completions]
            rows = [{"answer": each, "cue": cue} for each, cue in zip(answer, kwargs["cue"], strict=True)]
            return [float(domain.score(text, row)[0]) for text, row in zip(texts, rows, strict=True)]

        options["num_generations"] = NUM_GENERATIONS
        trainer = GRPOTrainer(reward_funcs=is_right, args=GRPOConfig(**options), **common)
    else:
        args = ViCuRConfig(
            privilege=cell.privilege,
            teacher_model_kind="ema" if cell.teacher == "ema" else "base",
            **objective_options(cell),
            **options,
        )
        teacher = stronger_teacher if cell.teacher == "stronger" else None
        trainer = ViCuRTrainer(args=args, teacher_model=teacher, **common)
    if cell.shared_weights:
        share_weights(trainer.model)
    sizes = {
        "trainable": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "module": sum(p.numel() for name, p in trainer.model.named_parameters() if "sink_attention" in name),
        "all": sum(p.numel() for p in trainer.model.parameters()),
    }
    trainer.train()
    training_seconds = time.perf_counter() - start
    trainer.save_model(str(output_dir))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = ("step", "loss", "reward", "logprob_gap/mean", "entropy", "completions/mean_length")
    ratios = [key for key in log[-1] if key.endswith("update_ratio")]
    return {
        "cell": cell._asdict(),
        "learning_rate": learning_rate,
        "seed": seed,
        "training": domain.training,
        "parameters": sizes,
        "training_seconds": round(training_seconds),
        "log": [{key: entry[key] for key in kept if key in entry} for entry in log],
        "update_ratio": {key.split("/")[1]: log[-1][key] for key in ratios},
        "leakage": leakage_per_epoch(log, trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps),
        "curve": curve.points,
        **{
            split: evaluate(trainer.model, processor, domain, domain.load(split))
            for split in ("validation", *domain.test_splits)
        },
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, trl)},
    }


def score_base(domain: Domain) -> dict[str, Any]:
    """Tests the base, alone and with each of the hints that its teachers' prompts have."""
    model = AutoModelForImageTextToText.from_pretrained(domain.base, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(domain.base)
    hints = {"": None, "_with_cue": "cue", "_with_answer": "answer"}
    return {
        split + suffix: evaluate(model, processor, domain, domain.load(split), column)
        for split in domain.test_splits
        for suffix, column in hints.items()
    }


def result_path(results: Path, domain: str, name: str, learning_rate: float, seed: int) -> Path:
    return results / domain / f"{name}-lr{learning_rate:g}-seed{seed}.json"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def run_cell(args: argparse.Namespace, name: str, learning_rate: float, seed: int) -> bool:
    """Runs a cell in a process of its own, unless its result is there. Returns whether it is there now."""
    path = result_path(args.results, args.domain, name, learning_rate, seed)
    if path.exists():
        return True
    directory = args.output_dir / args.domain / path.stem
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # another process runs it
            return False
        if path.exists():
            return True
        command = [sys.executable, __file__, *sys.argv[1:], "--cell", name]
        command += ["--learning_rate", str(learning_rate), "--seed", str(seed)]
        print(f"{time.strftime('%H:%M:%S')} {path.stem}", flush=True)
        with open(directory / "log.txt", "w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code != 0:
            print(f"{path.stem} failed with exit code {code}; see {directory / 'log.txt'}", flush=True)
    return path.exists()


def searched_learning_rates(results: Path, domain: str, name: str, metric: str) -> dict[float, float]:
    """The learning rates that the cell was trained at with seed 0, and the score on validation rows."""
    paths = {rate: result_path(results, domain, name, rate, 0) for rate in (GRID | REMOVED)[name].learning_rates}
    return {rate: json.loads(path.read_text())["validation"][metric] for rate, path in paths.items() if path.exists()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="easy_vqa", help=f"one of {', '.join(DOMAINS)}, or a name for --dataset")
    parser.add_argument("--dataset", help="rows of your own: an id on the Hub or a folder of `save_to_disk`")
    parser.add_argument("--model", help="the model that students start from, for --dataset")
    parser.add_argument("--stronger_teacher", help="the model that teaches in the cells with a stronger teacher")
    parser.add_argument("--cells", nargs="+", choices=GRID, default=list(GRID), help="which cells, in this order")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds")
    parser.add_argument("--max_steps", type=int, help="optimizer steps of each student")
    parser.add_argument("--max_rows", type=int, help="rows of each split, for a quick try")
    parser.add_argument("--results", type=Path, default=STUDY / "results", help="where the JSON files go")
    parser.add_argument("--output_dir", type=Path, default=Path("study_output"), help="where students and logs go")
    parser.add_argument("--cell", choices=GRID, help="run this one cell, with --learning_rate and --seed")
    parser.add_argument("--learning_rate", type=float)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    if (args.dataset is None) != (args.model is None):
        parser.error("--dataset and --model go together")
    if args.dataset is None and args.domain not in DOMAINS:
        parser.error(f"--domain must be one of {', '.join(DOMAINS)} without --dataset, got {args.domain}")
    domain = DOMAINS[args.domain] if args.dataset is None else rows_domain(args.dataset, args.model)
    if args.max_steps is not None:
        domain = domain._replace(training={**domain.training, "max_steps": args.max_steps})
    if args.max_rows is not None:
        domain = shortened(domain, args.max_rows)

    if args.cell is not None:
        warnings.filterwarnings("ignore")
        transformers.logging.set_verbosity_error()
        disable_progress_bars()
        path = result_path(args.results, args.domain, args.cell, args.learning_rate, args.seed)
        students = args.output_dir / args.domain / path.stem / "student"
        write_json(
            path,
            train_cell(GRID[args.cell], domain, args.learning_rate, args.seed, students, args.stronger_teacher),
        )
        return

    base_path = args.results / args.domain / "base.json"
    if not base_path.exists():
        write_json(base_path, score_base(domain))
    cells = [name for name in args.cells if GRID[name].teacher != "stronger" or args.stronger_teacher is not None]
    for tried in range(max(len(GRID[name].learning_rates) for name in cells)):
        for name in cells:
            for learning_rate in GRID[name].learning_rates[tried : tried + 1]:
                run_cell(args, name, learning_rate, 0)
    for seed in range(1, args.seeds):
        for name in cells:
            scores = searched_learning_rates(args.results, args.domain, name, domain.metric)
            if len(scores) == len(GRID[name].learning_rates):
                run_cell(args, name, max(scores, key=scores.__getitem__), seed)


if __name__ == "__main__":
    main()
