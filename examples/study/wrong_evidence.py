"""
Where a student's evidence is wrong, what does it say? Sorts the first sentences of completions on geometry diagrams.

    python examples/study/wrong_evidence.py --split test_ood --run cue-lr0.0005-seed4

Without `--run`, those of the base. A sentence binds names or values in the figure to its parts ("the half is k and the
angle is b"), and is

- `right`;
- `swapped`: the right names, of which some change places;
- `repeated`: one name twice, where the figure has another;
- `other`.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

from domains import DOMAINS, STUDY, easy_vqa_dataset
from interventions import load_student
from transformers import AutoProcessor


KINDS_OF_EVIDENCE = ("right", "swapped", "repeated", "other")


def kind_of_evidence(completion: str, cue: str) -> str:
    """Which of `KINDS_OF_EVIDENCE` the completion begins with."""
    said, expected = completion.split(" . ")[0].split(), cue.split()
    if said == expected:
        return "right"
    if sorted(said) == sorted(expected):
        return "swapped"
    return "repeated" if len(said) == len(expected) and set(said) < set(expected) else "other"


def sort_evidence(model: Any, processor: Any, rows: list[dict[str, Any]], max_new_tokens: int) -> dict[str, dict]:
    """For each kind of figure and label style, how many completions have which kind of evidence."""
    texts = easy_vqa_dataset.complete_batch(model, processor, rows, None, max_new_tokens)
    counts: dict[str, Counter] = {}
    for text, row in zip(texts, rows, strict=True):
        figure = f"{row['kind']}, {row['style']}"
        counts.setdefault(figure, Counter())[kind_of_evidence(text, row["cue"])] += 1
    return {figure: {kind: found[kind] for kind in KINDS_OF_EVIDENCE} for figure, found in sorted(counts.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=("geometry", "geometry_sink"), default="geometry")
    parser.add_argument("--split", choices=("test", "test_ood"), default="test_ood")
    parser.add_argument("--run", help="a trained student, e.g. cue-lr0.0005-seed4; without it, the base")
    parser.add_argument("--output_dir", type=Path, default=Path("study_output"), help="where the students are")
    parser.add_argument("--results", type=Path, default=STUDY / "results", help="where the JSON file goes")
    args = parser.parse_args()
    domain = DOMAINS[args.domain]
    folder = Path(domain.base) if args.run is None else args.output_dir / args.domain / args.run / "student"
    model, processor = load_student(domain, folder), AutoProcessor.from_pretrained(domain.base)
    test = domain.load(args.split)
    rows = [test[row] for row in range(len(test))]
    found = sort_evidence(model, processor, rows, domain.training["max_completion_length"])
    path = args.results / args.domain / "wrong_evidence" / f"{args.split}-{args.run or 'base'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
