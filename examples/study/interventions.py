"""
Does a student use its sink? Disables parts of a trained student's module, or hides parts of the image, and tests it.

    python examples/study/interventions.py --domain easy_vqa --run cue+module-lr0.001-seed0

In the module (for students that have one), leaving everything else unchanged:

- `zero`: the sink is not updated;
- `swap`: each sample gets the update of another sample, with another image;
- `hide evidence`: the sink cannot attend to the visual tokens that show the evidence;
- `hide others`: it cannot attend to as many other visual tokens instead.

In the image, so that ordinary attention is affected as well:

- `blank evidence`, `blank others`: the pixels of these visual tokens get the background colour;
- `shuffle`: the visual tokens' pixels are permuted.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from domains import DOMAINS, Domain, easy_vqa_dataset, evaluate
from peft import PeftModel
from PIL import Image
from records import RESULTS, append_record
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from trl_vicur.cue_recovery import SinkCrossAttention, sink_attention


def evidence_tokens(row: dict[str, Any], tokens_per_side: int) -> list[int]:
    """Visual tokens that show what the cue says: a column of the row, or all that differ from the background."""
    if "evidence_tokens" in row:
        return sorted(set(row["evidence_tokens"]))
    image = row["images"][0]
    background = torch.tensor(max(image.getcolors(maxcolors=2**24))[1]).view(3, 1, 1)
    differs = (pil_to_tensor(image) != background).any(0, keepdim=True).float()
    is_shown = torch.nn.functional.adaptive_avg_pool2d(differs, tokens_per_side).flatten() > 0.05
    return is_shown.nonzero().flatten().tolist()


def other_tokens(row: dict[str, Any], tokens_per_side: int) -> list[int]:
    """As many other visual tokens, or all others if they are fewer."""
    evidence = evidence_tokens(row, tokens_per_side)
    others = sorted(set(range(tokens_per_side**2)) - set(evidence))
    return random.Random(len(others)).sample(others, min(len(evidence), len(others)))


# --- In the module ---


@contextmanager
def changed_update(model: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While active, passes each module's update of the sinks, `(batch, hidden)`, through `change`."""
    modules = [module for module in model.modules() if isinstance(module, SinkCrossAttention)]
    hooks = [module.register_forward_hook(lambda module, args, update: change(update)) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def hidden_tokens(model: torch.nn.Module, tokens: list[list[int]], batch_size: int) -> Iterator[None]:
    """
    While active, the modules cannot attend to the given visual tokens of each row. Rows must come in order, in batches
    of `batch_size`. A row whose visual tokens would all be hidden is left unchanged.
    """
    modules = [module for module in model.modules() if isinstance(module, SinkCrossAttention)]
    calls = dict.fromkeys(modules, 0)

    def hide(module: SinkCrossAttention, args: tuple) -> tuple:
        sink, hidden_states, visual_mask = args
        start = calls[module] * batch_size
        calls[module] += 1
        mask = visual_mask == 0  # `visual_mask` is added to the attention scores
        for sample, hidden in enumerate(tokens[start : start + len(mask)]):
            positions = mask[sample].nonzero().flatten()
            if len(hidden) < len(positions):
                mask[sample, positions[hidden]] = False
        return sink, hidden_states, mask

    hooks = [module.register_forward_pre_hook(hide) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- In the image ---


def tile_boxes(image: Image.Image, tokens_per_side: int) -> list[tuple[int, int, int, int]]:
    """Each visual token's pixels, as `(left, upper, right, lower)`."""
    width, height = image.width / tokens_per_side, image.height / tokens_per_side
    corners = [(x * width, y * height) for y in range(tokens_per_side) for x in range(tokens_per_side)]
    return [(round(x), round(y), round(x + width), round(y + height)) for x, y in corners]


def blanked(row: dict[str, Any], tokens: list[int], tokens_per_side: int) -> dict[str, Any]:
    image = row["images"][0].copy()
    background = max(image.getcolors(maxcolors=2**24))[1]
    boxes = tile_boxes(image, tokens_per_side)
    for token in tokens:
        image.paste(background, boxes[token])
    return {**row, "images": [image]}


def shuffled(row: dict[str, Any], tokens_per_side: int, seed: int) -> dict[str, Any]:
    image = row["images"][0].copy()
    boxes = tile_boxes(image, tokens_per_side)
    tiles = [image.crop(box) for box in boxes]
    random.Random(seed).shuffle(tiles)
    for box, tile in zip(boxes, tiles, strict=True):
        image.paste(tile.resize((box[2] - box[0], box[3] - box[1])), box)
    return {**row, "images": [image]}


def attention_on_evidence(
    model: torch.nn.Module, processor: Any, rows: list[dict[str, Any]], tokens_per_side: int
) -> dict[str, float]:
    """For each layer, the sink's attention to the evidence, relative to a sink that attends uniformly."""
    inputs = easy_vqa_dataset.encode(rows, processor)
    is_visual = inputs["input_ids"] == processor.image_token_id
    evidence = [evidence_tokens(row, tokens_per_side) for row in rows]
    uniform = sum(len(tokens) for tokens in evidence) / tokens_per_side**2
    ratios = {}
    for layer, weights in sink_attention(model, **inputs).items():
        maps = weights.mean(1)[is_visual].view(len(rows), -1)
        ratios[layer] = sum(maps[i, tokens].sum().item() for i, tokens in enumerate(evidence)) / uniform
    return ratios


def intervene(model: torch.nn.Module, processor: Any, domain: Domain, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tests the student after each intervention."""
    batch_size = 250
    grid = processor.image_processor([rows[0]["images"][0]], return_tensors="pt")["image_grid_thw"][0]
    side = int(grid[1]) // processor.image_processor.merge_size
    evidence = [evidence_tokens(row, side) for row in rows]
    others = [other_tokens(row, side) for row in rows]

    def scores(rows: list[dict[str, Any]]) -> dict[str, float]:
        result = evaluate(model, processor, domain, rows, batch_size=batch_size)
        del result["right"]
        return result

    results = {"intact": scores(rows)}
    if any(isinstance(module, SinkCrossAttention) for module in model.modules()):
        with changed_update(model, torch.zeros_like):
            results["zero"] = scores(rows)
        with changed_update(model, lambda update: update.roll(1, dims=0)):
            results["swap"] = scores(rows)
        for name, tokens in (("hide evidence", evidence), ("hide others", others)):
            with hidden_tokens(model, tokens, batch_size):
                results[name] = scores(rows)
        results["attention on evidence, over uniform"] = attention_on_evidence(
            model, processor, rows[:batch_size], side
        )
    for name, tokens in (("blank evidence", evidence), ("blank others", others)):
        results[name] = scores([blanked(row, blank, side) for row, blank in zip(rows, tokens, strict=True)])
    results["shuffle"] = scores([shuffled(row, side, seed) for seed, row in enumerate(rows)])
    return results


def load_student(domain: Domain, folder: Path) -> torch.nn.Module:
    """Loads an adapter on the domain's base, or a whole model."""
    is_adapter = (folder / "adapter_config.json").is_file()
    model = AutoModelForImageTextToText.from_pretrained(domain.base if is_adapter else folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, folder).eval() if is_adapter else model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, required=True)
    parser.add_argument("--run", required=True, help="a trained student, e.g. cue+module-lr0.001-seed0")
    parser.add_argument("--num_rows", type=int, default=500, help="number of test rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--output_dir", type=Path, default=Path("study_output"), help="folder of the students")
    args = parser.parse_args()
    domain = DOMAINS[args.domain]
    processor = AutoProcessor.from_pretrained(domain.base)
    model = load_student(domain, args.output_dir / args.domain / args.run / "student")
    test = domain.load("test").select(range(args.num_rows))
    results = intervene(model, processor, domain, [test[row] for row in range(len(test))])
    append_record(args.results / f"{args.domain}.jsonl", "interventions", args.run, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
