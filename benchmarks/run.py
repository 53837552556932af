"""
Runs all benchmarks, or one of them. Each writes a JSON file and a plot into `benchmarks/results`.

    python benchmarks/run.py
    python benchmarks/run.py --only loss

They run on a GPU if there is one.
"""

import argparse
import importlib.util
import subprocess
import sys

from measure import save


# Modules of this folder, each with `run(quick) -> dict` and `plot(results) -> Figure`
BENCHMARKS = [
    "cue_recovery",
    "loss",
    "vision_sharing",
    "step_time",
    "growth",
    "cost_model",
    "cue_generation",
    "row_checks",
]
if importlib.util.find_spec("vllm"):  # needs its own environment
    BENCHMARKS.append("vllm_rollout")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=BENCHMARKS, help="run only this one")
    parser.add_argument("--quick", action="store_true", help="few repeats and small sizes, only to check that it runs")
    arguments = parser.parse_args()
    if arguments.only is None:
        for name in BENCHMARKS:  # each in its own process, so that none inherits another's memory
            print(f"--- {name} ---", flush=True)
            subprocess.run([sys.executable, __file__, "--only", name, *["--quick"] * arguments.quick], check=True)
        return
    benchmark = importlib.import_module(arguments.only)
    results = benchmark.run(arguments.quick)
    save(arguments.only, results, benchmark.plot(results))


if __name__ == "__main__":
    main()
