"""
Classifies the evidence that a student states for geometry diagrams, and how it is wrong.

    python examples/study/wrong_evidence.py --split test_ood --run cue-lr0.0005-seed4

Without `--run`, the base is examined. The first sentence of a completion assigns names or values in the figure to its
parts ("the half is k and the angle is b"). It is

- `right`;
- `swapped`: the right names in the wrong places;
- `repeated`: one name twice instead of two names;
- `other`: wrong in another way.

For triangles with two letters, the script also measures the probability of the cue's second name after its first name,
and after a wrong first name (the second itself), for the teacher (the base that reads the cue) and for the student.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from domains import DOMAINS, easy_vqa_dataset
from interventions import load_student
from records import RESULTS, append_record
from transformers import AutoProcessor


KINDS_OF_EVIDENCE = ("right", "swapped", "repeated", "other")
TRIANGLES = ("isosceles triangle", "right triangle")
FIRST_NAME = 3  # index of its token in the cues of triangles


def kind_of_evidence(completion: str, cue: str) -> str:
    """The one of `KINDS_OF_EVIDENCE` that the completion begins with."""
    said, expected = completion.split(" . ")[0].split(), cue.split()
    if said == expected:
        return "right"
    if sorted(said) == sorted(expected):
        return "swapped"
    return "repeated" if len(said) == len(expected) and set(said) < set(expected) else "other"


def sort_evidence(model: Any, processor: Any, rows: list[dict[str, Any]], max_new_tokens: int) -> dict[str, dict]:
    """For each kind of figure and label style, the number of completions with each kind of evidence."""
    texts = easy_vqa_dataset.complete_batch(model, processor, rows, None, max_new_tokens)
    counts: dict[str, Counter] = {}
    for text, row in zip(texts, rows, strict=True):
        figure = f"{row['kind']}, {row['style']}"
        counts.setdefault(figure, Counter())[kind_of_evidence(text, row["cue"])] += 1
    return {figure: {kind: found[kind] for kind in KINDS_OF_EVIDENCE} for figure, found in sorted(counts.items())}


@torch.no_grad()
def probability_of_second_name(
    model: torch.nn.Module, processor: Any, rows: list[dict[str, Any]], hint_column: str | None
) -> dict[str, float]:
    """Mean probability of the cue's second name after its first name, and after a wrong first name."""
    inputs = easy_vqa_dataset.encode(rows, processor, hint_column)
    cues = processor.tokenizer([row["cue"] for row in rows], add_special_tokens=False, return_tensors="pt").input_ids
    said, second = cues[:, :-1], cues[:, -1]  # "the half is k and the angle is", "b"
    prompts, mask = inputs["input_ids"], torch.cat([inputs["attention_mask"], torch.ones_like(said)], dim=1)
    found = {}
    for first, name in (("right", said[:, FIRST_NAME]), ("wrong", second)):
        said[:, FIRST_NAME] = name
        ids = torch.cat([prompts, said], dim=1)
        visual = (ids == processor.image_token_id).int()
        inputs.update(input_ids=ids, attention_mask=mask, mm_token_type_ids=visual)
        probabilities = model(**inputs).logits[:, -1].softmax(dim=-1)
        found[first] = probabilities.gather(1, second.unsqueeze(1)).mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=("geometry", "geometry_sink"), default="geometry")
    parser.add_argument("--split", choices=("test", "test_ood"), default="test_ood")
    parser.add_argument("--run", help="a trained student, e.g. cue-lr0.0005-seed4; without it, the base")
    parser.add_argument("--output_dir", type=Path, default=Path("study_output"), help="folder of the students")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    domain = DOMAINS[args.domain]
    folder = Path(domain.base) if args.run is None else args.output_dir / args.domain / args.run / "student"
    model, processor = load_student(domain, folder), AutoProcessor.from_pretrained(domain.base)
    test = domain.load(args.split)
    rows = [test[row] for row in range(len(test))]
    evidence = sort_evidence(model, processor, rows, domain.training["max_completion_length"])
    found: dict[str, Any] = {"evidence": evidence, "second name": {}}
    teacher = load_student(domain, Path(domain.base))
    for kind in TRIANGLES:
        if lettered := [row for row in rows if row["kind"] == kind and row["style"] == "indirect"]:
            found["second name"][kind] = {
                "teacher": probability_of_second_name(teacher, processor, lettered, "cue"),
                "student": probability_of_second_name(model, processor, lettered, None),
            }
    name = f"{args.split}-{args.run or 'base'}"
    append_record(args.results / f"{args.domain}.jsonl", "wrong_evidence", name, found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
