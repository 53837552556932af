"""
Makes the study's tables and plots from its results.

    python examples/study/summary.py

Writes `README.md` and a plot of learning curves for each domain into the folder of the results. With `--json FILE`,
also writes every figure of the tables and plots, and the differences and intervals of all splits and metrics.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from cells import GRID, REMOVED
from domains import DOMAINS
from matplotlib.figure import Figure
from records import RESULTS, read_records
from run import run_name, searched_learning_rates
from wrong_evidence import KINDS_OF_EVIDENCE


BASELINE = "answer"  # answer-privileged OPSD
NUM_BOOTSTRAP_SAMPLES = 2000
CURVES = ("answer", "cue", "answer+module", "cue+module")


def best_runs(runs: dict[str, dict[str, Any]], cell: str, metric: str) -> dict[int, dict[str, Any]]:
    """The cell's runs by seed, at the learning rate that is best on validation rows so far."""
    scores = searched_learning_rates(runs, cell, metric)
    if not scores:
        return {}
    best = max(scores, key=scores.__getitem__)
    names = {seed: run_name(cell, best, seed) for seed in range(100)}
    return {seed: runs[name] for seed, name in names.items() if name in runs}


def right_rows(run: dict[str, Any], split: str, metric: str) -> np.ndarray:
    """1 for each test row that counts as right, else 0."""
    wanted = "3" if metric == "grounded_accuracy" else "13"
    return np.array([digit in wanted for digit in run[split]["right"]], dtype=float)


def paired_difference(
    runs: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]], split: str, metric: str
) -> dict[str, Any] | None:
    """Mean difference to the baseline over common seeds, with a 95 % bootstrap interval over seeds and questions."""
    seeds = sorted(runs.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.stack(
        [right_rows(runs[seed], split, metric) - right_rows(baseline[seed], split, metric) for seed in seeds]
    )
    rng = np.random.default_rng(0)
    num_seeds, num_rows = differences.shape
    samples = [
        differences[rng.integers(num_seeds, size=num_seeds)][:, rng.integers(num_rows, size=num_rows)].mean()
        for _ in range(NUM_BOOTSTRAP_SAMPLES)
    ]
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"seeds": len(seeds), "mean": differences.mean(), "low": low, "high": high}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def summarize(path: Path, metric: str) -> dict[str, Any]:
    """Scores, differences to the baseline, leakage, searched learning rates and curves of one domain's cells."""
    all_runs = read_records(path, "run")
    runs = {cell: best_runs(all_runs, cell, metric) for cell in GRID | REMOVED}
    runs = {cell: by_seed for cell, by_seed in runs.items() if by_seed}
    base = read_records(path, "base")["base"]
    splits = [split for split in base if not split.endswith(("_with_cue", "_with_answer"))]
    metrics = [key for key in base[splits[0]] if key in ("accuracy", "grounded_accuracy")]
    summary = {
        "metric": metric,
        "base": {split: {key: base[split][key] for key in metrics} for split in base},
        "cells": {},
    }
    for cell, by_seed in runs.items():
        first = next(iter(by_seed.values()))
        parameters = first["parameters"]
        summary["cells"][cell] = {
            "learning_rate": first["learning_rate"],
            "seeds": sorted(by_seed),
            "added_parameters": parameters["module"] / (parameters["all"] - parameters["module"]),
            "scores": {
                split: {key: spread([run[split][key] for run in by_seed.values()]) for key in metrics}
                for split in splits
            },
            "differences": {
                split: {key: paired_difference(by_seed, runs.get(BASELINE, {}), split, key) for key in metrics}
                for split in splits
            },
            "leakage": [
                {key: sum(part[key] for part in parts) for key in ("rollouts", "samples", "occurrences")}
                for parts in zip(*(run["leakage"] for run in by_seed.values()), strict=False)
            ],
            "search": {f"{rate:g}": score for rate, score in searched_learning_rates(all_runs, cell, metric).items()},
            "curve": [
                {"step": points[0]["step"], **{key: spread([point[key] for point in points]) for key in metrics}}
                for points in zip(*(run["curve"] for run in by_seed.values()), strict=True)
            ],
        }
    return summary


def percent(value: dict[str, float], seeds: int) -> str:
    return f"{value['mean']:.1%}" + (f" ± {value['sd'] * 100:.1f}" if seeds > 1 else "")


def difference_text(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return ""
    return f"{difference['mean'] * 100:+.1f} ({difference['low'] * 100:+.1f} … {difference['high'] * 100:+.1f})"


def markdown(name: str, summary: dict[str, Any]) -> list[str]:
    """The tables of one domain."""
    metric = summary["metric"]
    splits = [split for split in summary["base"] if not split.endswith(("_with_cue", "_with_answer"))]
    metrics = list(summary["base"][splits[0]])
    columns = [(split, key) for split in splits for key in metrics]
    titles = [f"{split}: {key.replace('_', ' ')}" for split, key in columns]
    lines = [f"## {name}", "", "| | seeds | " + " | ".join(titles) + f" | {metric.replace('_', ' ')} − OPSD |"]
    lines.append("|" + "---|" * (len(columns) + 3))
    for suffix, label in (("", "base"), ("_with_cue", "base that reads the cue"), ("_with_answer", "… the answer")):
        shares = " | ".join(f"{summary['base'][split + suffix][key]:.1%}" for split, key in columns)
        lines.append(f"| {label} | | {shares} | |")
    for cell, figures in summary["cells"].items():
        seeds = len(figures["seeds"])
        shares = " | ".join(percent(figures["scores"][split][key], seeds) for split, key in columns)
        difference = "" if cell == BASELINE else difference_text(figures["differences"][splits[0]][metric])
        lines.append(f"| `{cell}` | {seeds} | {shares} | {difference} |")
    lines += ["", "| | added by the module | learning rates tried: on validation rows | leakage per epoch |"]
    lines.append("|---|---|---|---|")
    for cell, figures in summary["cells"].items():
        search = ", ".join(f"{rate}: {score:.1%}" for rate, score in figures["search"].items())
        leaks = ", ".join("{samples}/{occurrences}".format(**epoch) for epoch in figures["leakage"])
        lines.append(f"| `{cell}` | {figures['added_parameters']:.1%} | {search} | {leaks} |")
    return [*lines, "", f"![Learning curves]({name}.png)", ""]


def interventions_markdown(path: Path, metric: str) -> list[str]:
    """The table of `interventions.py`; empty if it was not run on students of the domain."""
    students = dict(sorted(read_records(path, "interventions").items()))
    if not students:
        return []
    columns = list(dict.fromkeys(key for found in students.values() for key in found if metric in found[key]))
    lines = [f"{metric.replace('_', ' ').capitalize()} after [interventions](../interventions.py):", ""]
    lines.append("| | " + " | ".join(columns) + " | attention on evidence, over uniform |")
    lines.append("|" + "---|" * (len(columns) + 2))
    for run, found in students.items():
        shares = " | ".join(f"{found[key][metric]:.1%}" if key in found else "" for key in columns)
        attention = found.get("attention on evidence, over uniform", {})
        lines.append(f"| `{run}` | {shares} | {', '.join(f'{ratio:.2f}' for ratio in attention.values())} |")
    return [*lines, ""]


def wrong_evidence_markdown(path: Path) -> list[str]:
    """The tables of `wrong_evidence.py`; empty if it was not run on students of the domain."""
    students = dict(sorted(read_records(path, "wrong_evidence").items()))
    if not students:
        return []
    lines = ["Completions by [kind of evidence](../wrong_evidence.py):", ""]
    lines.append("| split and run | figure | " + " | ".join(KINDS_OF_EVIDENCE) + " |")
    lines.append("|" + "---|" * (len(KINDS_OF_EVIDENCE) + 2))
    for run, found in students.items():
        for figure, counts in found["evidence"].items():
            lines.append(
                f"| `{run}` | {figure} | " + " | ".join(str(counts[kind]) for kind in KINDS_OF_EVIDENCE) + " |"
            )
    lines += ["", "Probability of the cue's second name after its first name / after a wrong one:", ""]
    lines += ["| split and run | figure | teacher | student |", "|---|---|---|---|"]
    for run, found in students.items():
        for kind, sides in found["second name"].items():
            cells = " | ".join("{right:.2f} / {wrong:.2f}".format(**side) for side in sides.values())
            lines.append(f"| `{run}` | {kind} | {cells} |")
    return [*lines, ""]


def draw_curves(name: str, summary: dict[str, Any], path: Path) -> None:
    """Plots validation scores during training: mean over seeds, and standard deviation."""
    metric = summary["metric"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for cell in CURVES:
        if cell in summary["cells"]:
            figures = summary["cells"][cell]
            steps = [point["step"] for point in figures["curve"]]
            means = np.array([point[metric]["mean"] for point in figures["curve"]])
            deviations = np.array([point[metric]["sd"] for point in figures["curve"]])
            (line,) = axis.plot(steps, 100 * means, marker="o", label=f"{cell} ({len(figures['seeds'])} seeds)")
            low, high = 100 * (means - deviations), 100 * (means + deviations)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    axis.set(xlabel="optimizer steps", ylabel=f"{metric.replace('_', ' ')}, %", title=f"{name}: validation rows")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--json", type=Path, help="file to write all figures to")
    args = parser.parse_args()
    paths = {path.stem: path for path in sorted(args.results.glob("*.jsonl")) if read_records(path, "base")}
    metrics = {name: DOMAINS[name].metric if name in DOMAINS else "accuracy" for name in paths}
    summaries = {name: summarize(path, metrics[name]) for name, path in paths.items()}
    if args.json is not None:
        args.json.write_text(json.dumps(summaries, indent=1) + "\n")
    lines = [
        "# Results of the component study",
        "",
        "Written by `python examples/study/summary.py` from the `.jsonl` file of each domain. Mean ± standard "
        f"deviation over seeds; the difference to OPSD (`{BASELINE}`) is paired by seed and question, with a 95 % "
        "bootstrap interval over both (for one seed: over questions only). Leakage is the number of rollouts that "
        "contain the word Hint / its occurrences, over all seeds. [cells.py](../cells.py) defines the cells.",
        "",
    ]
    for name, summary in summaries.items():
        lines += markdown(name, summary)
        lines += interventions_markdown(paths[name], summary["metric"])
        lines += wrong_evidence_markdown(paths[name])
        draw_curves(name, summary, args.results / f"{name}.png")
    (args.results / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
