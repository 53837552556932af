"""
Runs the paper's benchmarks with lmms-eval, and prints the paper's averages next to yours.

    python examples/benchmarks/run.py --model Qwen/Qwen3-VL-2B-Instruct --adapter me/Qwen3-VL-2B-ViCuR

It needs lmms-eval in a separate environment (see trl_vicur/lmms_eval/README.md). lmms-eval scores MathVista and
MathVerse with a judge at OpenAI's API, with the key in OPENAI_API_KEY. Vision-R1-Test is included if the current
folder has a vision_r1_test.parquet. Benchmarks with results in the output folder are skipped.

The paper evaluated with VLMEvalKit, whose prompts and judges differ: compare differences between models, not scores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table


class Benchmark(NamedTuple):
    """A benchmark, lmms-eval's task and metric, and the factor that converts the metric to percent."""

    name: str
    task: str
    metric: str
    scale: float


BENCHMARKS = [
    Benchmark("Vision-R1-Test", "vision_r1_test", "accuracy", 100.0),
    Benchmark("DynaMath", "dynamath_reasoning", "dynamath_average", 100.0),
    Benchmark("MathVista", "mathvista_testmini_cot", "llm_as_judge_eval", 1.0),
    Benchmark("WeMath", "wemath_testmini_reasoning", "wemath_strict", 1.0),
    Benchmark("MathVerse", "mathverse_testmini", "gpt_eval_score", 100.0),
    Benchmark("MMMU-Val", "mmmu_val", "mmmu_acc", 100.0),
    Benchmark("Video-MME", "videomme", "videomme_perception_score", 1.0),
]
# Average over the seven (ViCuR, arXiv 2606.05718, Table 1), of Qwen3-VL 2B and 8B
PAPER = {
    "base": (45.42, 60.76),
    "GRPO": (48.51, 65.35),
    "OPSD (answer)": (44.88, 58.15),
    "OPSD + ViCuR": (46.07, 59.39),
    "OPD (8B / 32B teacher)": (46.93, 63.88),
    "OPD + ViCuR": (47.57, 64.96),
}
VISION_R1_FILE = Path("vision_r1_test.parquet")


def evaluate(benchmark: Benchmark, model_args: str, args: argparse.Namespace) -> float:
    """The score in percent, from an earlier run's results or else by running lmms-eval."""
    folder = args.output_dir / benchmark.task
    if not list(folder.rglob("*_results.json")):
        command = [sys.executable, "-m", "lmms_eval", "--model", "trl_vicur", "--model_args", model_args]
        command += ["--tasks", benchmark.task, "--include_path", str(Path(__file__).parent)]
        command += ["--batch_size", str(args.batch_size), "--output_path", str(folder), "--log_samples"]
        if args.limit is not None:
            command += ["--limit", str(args.limit)]
        subprocess.run(command, check=True)
    results = max(folder.rglob("*_results.json"), key=lambda path: path.stat().st_mtime)
    score = json.loads(results.read_text())["results"][benchmark.task][f"{benchmark.metric},none"]
    # WeMath reports a string with a percent sign; MathVista reports None if no answer is right
    return benchmark.scale * float(str(score or 0).rstrip("%"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="id or folder of the base model")
    parser.add_argument("--adapter", help="id or folder of its adapter")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark_results"), help="folder of the results")
    parser.add_argument("--batch_size", type=int, default=8, help="requests per batch")
    parser.add_argument("--limit", type=int, help="number of questions of each benchmark (default: all)")
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="benchmarks to run")
    args = parser.parse_args()
    model_args = f"pretrained={args.model}" + ("" if args.adapter is None else f",adapter={args.adapter}")
    chosen = [benchmark for benchmark in BENCHMARKS if benchmark.name in args.only]
    if not VISION_R1_FILE.exists():
        chosen = [benchmark for benchmark in chosen if benchmark.task != "vision_r1_test"]
    if not chosen:
        parser.error(f"--only Vision-R1-Test needs {VISION_R1_FILE} in the current folder")
    scores = {benchmark.name: evaluate(benchmark, model_args, args) for benchmark in chosen}

    console = Console()
    console.print(args.model if args.adapter is None else f"{args.model} with {args.adapter}", soft_wrap=True)
    table = Table()
    table.add_column("benchmark")
    table.add_column("score", justify="right")
    for name, score in scores.items():
        table.add_row(name, f"{score:.2f}")
    table.add_row(f"average over these {len(scores)}", f"{sum(scores.values()) / len(scores):.2f}", style="bold")
    console.print(table)
    console.print(f"The paper's averages over its {len(BENCHMARKS)}")
    table = Table()
    for column in ("", "2B", "8B"):
        table.add_column(column, justify="right" if column else "left")
    for name, (small, large) in PAPER.items():
        table.add_row(name, f"{small:.2f}", f"{large:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
