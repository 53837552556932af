"""
Makes the study's tables and pictures from the JSON files that `run.py` left.

    python examples/study/summary.py

Writes `summary.json`, a picture of learning curves for each domain, and `README.md` into the folder of the results.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from cells import GRID, REMOVED
from domains import DOMAINS, STUDY
from matplotlib.figure import Figure
from run import result_path, searched_learning_rates
from wrong_evidence import KINDS_OF_EVIDENCE


BASELINE = "answer"  # answer-privileged OPSD
NUM_BOOTSTRAP_SAMPLES = 2000
CURVES = ("answer", "cue", "answer+module", "cue+module")


def load_runs(results: Path, domain: str, name: str, metric: str) -> dict[int, dict[str, Any]]:
    """The runs of a cell by seed, all with the learning rate that was best on validation rows so far."""
    scores = searched_learning_rates(results, domain, name, metric)
    if not scores:
        return {}
    best = max(scores, key=scores.__getitem__)
    paths = {seed: result_path(results, domain, name, best, seed) for seed in range(100)}
    return {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.exists()}


def right_rows(run: dict[str, Any], split: str, metric: str) -> np.ndarray:
    """For each test row, whether it counts as right."""
    wanted = "3" if metric == "grounded_accuracy" else "13"
    return np.array([digit in wanted for digit in run[split]["right"]], dtype=float)


def paired_difference(
    runs: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]], split: str, metric: str
) -> dict[str, Any] | None:
    """
    Difference to the baseline over the seeds that both have, with a 95 % bootstrap interval over seeds and questions.
    """
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
    """Mean and sample standard deviation (0 of a single value)."""
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0}


def summarize(results: Path, name: str, metric: str) -> dict[str, Any]:
    """Everything that is known about one domain."""
    runs = {cell: load_runs(results, name, cell, metric) for cell in GRID | REMOVED}
    runs = {cell: by_seed for cell, by_seed in runs.items() if by_seed}
    base = json.loads((results / name / "base.json").read_text())
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
            "search": {
                f"{rate:g}": score for rate, score in searched_learning_rates(results, name, cell, metric).items()
            },
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
    for cell, known in summary["cells"].items():
        seeds = len(known["seeds"])
        shares = " | ".join(percent(known["scores"][split][key], seeds) for split, key in columns)
        difference = "" if cell == BASELINE else difference_text(known["differences"][splits[0]][metric])
        lines.append(f"| `{cell}` | {seeds} | {shares} | {difference} |")
    lines += ["", "| | added by the module | learning rates tried: on validation rows | leakage per epoch |"]
    lines.append("|---|---|---|---|")
    for cell, known in summary["cells"].items():
        search = ", ".join(f"{rate}: {score:.1%}" for rate, score in known["search"].items())
        leaks = ", ".join("{samples}/{occurrences}".format(**epoch) for epoch in known["leakage"])
        lines.append(f"| `{cell}` | {known['added_parameters']:.1%} | {search} | {leaks} |")
    return [*lines, "", f"![Learning curves]({name}.png)", ""]


def interventions_markdown(results: Path, name: str, metric: str) -> list[str]:
    """What `interventions.py` found in students of the domain; nothing if it was not run."""
    paths = sorted((results / name / "interventions").glob("*.json"))
    known = {path.stem: json.loads(path.read_text()) for path in paths}
    if not known:
        return []
    columns = list(dict.fromkeys(key for found in known.values() for key in found if metric in found[key]))
    lines = [f"{metric.replace('_', ' ').capitalize()} after [interventions](../interventions.py):", ""]
    lines.append("| | " + " | ".join(columns) + " | attention on evidence, over uniform |")
    lines.append("|" + "---|" * (len(columns) + 2))
    for run, found in known.items():
        shares = " | ".join(f"{found[key][metric]:.1%}" if key in found else "" for key in columns)
        attention = found.get("attention on evidence, over uniform", {})
        lines.append(f"| `{run}` | {shares} | {', '.join(f'{ratio:.2f}' for ratio in attention.values())} |")
    return [*lines, ""]


def wrong_evidence_markdown(results: Path, name: str) -> list[str]:
    """What `wrong_evidence.py` found in students of the domain; nothing if it was not run."""
    known = {path.stem: json.loads(path.read_text()) for path in (results / name / "wrong_evidence").glob("*.json")}
    if not known:
        return []
    lines = ["[What the evidence is](../wrong_evidence.py), in numbers of completions:", ""]
    lines.append("| split and run | figure | " + " | ".join(KINDS_OF_EVIDENCE) + " |")
    lines.append("|" + "---|" * (len(KINDS_OF_EVIDENCE) + 2))
    for run, found in sorted(known.items()):
        for figure, counts in found["evidence"].items():
            lines.append(
                f"| `{run}` | {figure} | " + " | ".join(str(counts[kind]) for kind in KINDS_OF_EVIDENCE) + " |"
            )
    lines += ["", "Probability of the cue's second name behind its first name / a wrong one:", ""]
    lines += ["| split and run | figure | teacher | student |", "|---|---|---|---|"]
    for run, found in sorted(known.items()):
        for kind, sides in found["second name"].items():
            cells = " | ".join("{right:.2f} / {wrong:.2f}".format(**side) for side in sides.values())
            lines.append(f"| `{run}` | {kind} | {cells} |")
    return [*lines, ""]


def draw_curves(name: str, summary: dict[str, Any], path: Path) -> None:
    """Validation scores while training, mean over seeds with their standard deviation."""
    metric = summary["metric"]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for cell in CURVES:
        if cell in summary["cells"]:
            known = summary["cells"][cell]
            steps = [point["step"] for point in known["curve"]]
            means = np.array([point[metric]["mean"] for point in known["curve"]])
            deviations = np.array([point[metric]["sd"] for point in known["curve"]])
            (line,) = axis.plot(steps, 100 * means, marker="o", label=f"{cell} ({len(known['seeds'])} seeds)")
            low, high = 100 * (means - deviations), 100 * (means + deviations)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2)
    axis.set(xlabel="optimizer steps", ylabel=f"{metric.replace('_', ' ')}, %", title=f"{name}: validation rows")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=STUDY / "results", help="where the JSON files are")
    args = parser.parse_args()
    names = sorted(path.parent.name for path in args.results.glob("*/base.json"))
    metrics = {name: DOMAINS[name].metric if name in DOMAINS else "accuracy" for name in names}
    summaries = {name: summarize(args.results, name, metric) for name, metric in metrics.items()}
    (args.results / "summary.json").write_text(json.dumps(summaries, indent=1) + "\n")
    lines = [
        "# Results of the component study",
        "",
        "Written by `python examples/study/summary.py`. Mean ± standard deviation over seeds; the difference to OPSD "
        f"(`{BASELINE}`) is paired by seed and question, with a 95 % bootstrap interval over both (of one seed: over "
        "questions alone). Leakage is rollouts with the word Hint / occurrences of it, over all seeds. What each cell "
        "is stands in [cells.py](../cells.py).",
        "",
    ]
    for name, summary in summaries.items():
        lines += markdown(name, summary)
        lines += interventions_markdown(args.results, name, summary["metric"])
        lines += wrong_evidence_markdown(args.results, name)
        draw_curves(name, summary, args.results / f"{name}.png")
    (args.results / "README.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
