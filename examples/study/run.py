"""
The component study: trains every cell of the grid on one of the domains, and resumes where it was stopped.

    python examples/study/run.py --domain easy_vqa --seeds 5

Each cell is trained at each of its learning rates with seed 0; the other seeds use the one that scored best on
validation rows. Each run has its own process and appends one record to the domain's results (`records.py`). Runs
with a record are skipped, so the command can be stopped at any time, and several can run side by side.
`python examples/study/summary.py` makes the tables.
"""

import argparse
import fcntl
import math
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
from domains import DOMAINS, Domain, evaluate, rows_domain, shortened
from peft import LoraConfig
from records import RESULTS, append_record, read_records
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer
from trl_vicur.cue_recovery import CueRecoveryLayer


NUM_CURVE_POINTS = 4
# Size of a GRPO group: as many rollouts per step as in the other cells, from fewer prompts
NUM_GENERATIONS = 4
# Linear layers of Qwen3-VL's text decoder and of the mergers between vision tower and decoder
TEXT_LINEAR = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
MERGER_LINEAR = r".*visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc\d"


class LearningCurve(TrainerCallback):
    """Evaluates on validation rows during training, the last time at its end."""

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
    """Makes all layers share the first one's module. A saved adapter has one copy per layer and loads as usual."""
    first, *others = (layer for layer in model.modules() if isinstance(layer, CueRecoveryLayer))
    for layer in others:
        layer.sink_attention = first.sink_attention


def leakage_per_epoch(log: list[dict[str, Any]], rollouts_per_step: int) -> list[dict[str, int]]:
    """Rollouts that mention the hint, and all mentions, per epoch (ViCuR, Table 8), computed from logged means."""
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


def make_trainer(
    cell: Cell,
    domain: Domain,
    learning_rate: float,
    seed: int,
    output_dir: Path,
    stronger_teacher: str | None,
    callback: TrainerCallback,
) -> GRPOTrainer | ViCuRTrainer:
    """The cell's trainer, over the domain's base and its `"distillation"` rows."""
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
        "processing_class": AutoProcessor.from_pretrained(domain.base),
        "peft_config": peft_config(cell, domain),
        "callbacks": [callback],
    }
    if cell.privilege == "reward":

        def is_right(completions: list, answer: list[str], **kwargs) -> list[float]:
            texts = [completion[0]["content"] for completion in completions]
            rows = [{"answer": each, "cue": cue} for each, cue in zip(answer, kwargs["cue"], strict=True)]
            return [float(domain.score(text, row)[0]) for text, row in zip(texts, rows, strict=True)]

        config = GRPOConfig(num_generations=NUM_GENERATIONS, **options)
        return GRPOTrainer(reward_funcs=is_right, args=config, **common)
    config = ViCuRConfig(
        privilege=cell.privilege,
        teacher_model_kind="ema" if cell.teacher == "ema" else "base",
        **objective_options(cell),
        **options,
    )
    return ViCuRTrainer(args=config, teacher_model=stronger_teacher if cell.teacher == "stronger" else None, **common)


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    parameters = list(model.named_parameters())
    return {
        "trainable": sum(p.numel() for _, p in parameters if p.requires_grad),
        "module": sum(p.numel() for name, p in parameters if "sink_attention" in name),
        "all": sum(p.numel() for _, p in parameters),
    }


def train_cell(
    cell: Cell, domain: Domain, learning_rate: float, seed: int, output_dir: Path, stronger_teacher: str | None
) -> dict[str, Any]:
    """Trains and tests one student, and saves it in `output_dir`. Returns the run's result."""
    start = time.perf_counter()
    processor = AutoProcessor.from_pretrained(domain.base)
    curve = LearningCurve(domain, processor, domain.load("validation"))
    trainer = make_trainer(cell, domain, learning_rate, seed, output_dir, stronger_teacher, curve)
    if cell.shared_weights:
        share_weights(trainer.model)
    parameters = parameter_counts(trainer.model)
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
        "parameters": parameters,
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
    """Test scores of the base: without a hint, and with each hint that a teacher's prompt can have."""
    model = AutoModelForImageTextToText.from_pretrained(domain.base, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(domain.base)
    hints = {"": None, "_with_cue": "cue", "_with_answer": "answer"}
    return {
        split + suffix: evaluate(model, processor, domain, domain.load(split), column)
        for split in domain.test_splits
        for suffix, column in hints.items()
    }


def run_name(cell: str, learning_rate: float, seed: int) -> str:
    return f"{cell}-lr{learning_rate:g}-seed{seed}"


def searched_learning_rates(runs: dict[str, dict[str, Any]], cell: str, metric: str) -> dict[float, float]:
    """The learning rates that the cell was trained at with seed 0, and their scores on validation rows."""
    names = {rate: run_name(cell, rate, 0) for rate in (GRID | REMOVED)[cell].learning_rates}
    return {rate: runs[name]["validation"][metric] for rate, name in names.items() if name in runs}


def run_cell(args: argparse.Namespace, cell: str, learning_rate: float, seed: int) -> None:
    """Trains a cell in its own process, unless it has a record or another process is training it."""
    results, name = args.results / f"{args.domain}.jsonl", run_name(cell, learning_rate, seed)
    if name in read_records(results, "run"):
        return
    directory = args.output_dir / args.domain / name
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        if name in read_records(results, "run"):  # another process has finished it meanwhile
            return
        command = [sys.executable, __file__, *sys.argv[1:], "--cell", cell]
        command += ["--learning_rate", str(learning_rate), "--seed", str(seed)]
        print(f"{time.strftime('%H:%M:%S')} {name}", flush=True)
        with open(directory / "log.txt", "w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code != 0:
            print(f"{name} failed with exit code {code}; see {directory / 'log.txt'}", flush=True)


def run_grid(args: argparse.Namespace, domain: Domain) -> None:
    """Scores the base and trains every cell: first all learning rates with seed 0, then the best with other seeds."""
    results = args.results / f"{args.domain}.jsonl"
    if not read_records(results, "base"):
        append_record(results, "base", "base", score_base(domain))
    cells = [name for name in args.cells if GRID[name].teacher != "stronger" or args.stronger_teacher is not None]
    for index in range(max(len(GRID[name].learning_rates) for name in cells)):
        for name in cells:
            for learning_rate in GRID[name].learning_rates[index : index + 1]:
                run_cell(args, name, learning_rate, 0)
    for seed in range(1, args.seeds):
        for name in cells:
            scores = searched_learning_rates(read_records(results, "run"), name, domain.metric)
            if len(scores) == len(GRID[name].learning_rates):
                run_cell(args, name, max(scores, key=scores.__getitem__), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="easy_vqa", help=f"one of {', '.join(DOMAINS)}, or a name for --dataset")
    parser.add_argument("--dataset", help="your own rows: an id on the Hub or a folder of `save_to_disk`")
    parser.add_argument("--model", help="the model that students start from, for --dataset")
    parser.add_argument("--stronger_teacher", help="the teacher of the cells that have a stronger one")
    parser.add_argument("--cells", nargs="+", choices=GRID, default=list(GRID), help="cells to train, in this order")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--max_steps", type=int, help="optimizer steps of each student")
    parser.add_argument("--max_rows", type=int, help="maximum number of rows per split, for a quick test")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--output_dir", type=Path, default=Path("study_output"), help="folder of students and logs")
    parser.add_argument("--cell", choices=GRID, help="train only this cell, with --learning_rate and --seed")
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

    if args.cell is None:
        run_grid(args, domain)
        return
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    disable_progress_bars()
    name = run_name(args.cell, args.learning_rate, args.seed)
    student = args.output_dir / args.domain / name / "student"
    result = train_cell(GRID[args.cell], domain, args.learning_rate, args.seed, student, args.stronger_teacher)
    append_record(args.results / f"{args.domain}.jsonl", "run", name, result)


if __name__ == "__main__":
    main()
