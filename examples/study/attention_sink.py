"""
Gives a tiny base an attention sink, as large language models have.

    python examples/study/attention_sink.py --domain easy_vqa

Large language models put most of their attention on the first token, which is how later tokens read what the recovery
module writes there. The tiny bases were trained on one task only, and spread their attention evenly. This script
trains a copy of a base to put most of its attention on the first token, from the second layer on, and to answer as
before: it distils the base into the copy, on the base's own completions for images that no student is trained or
tested on. So results on the base and on the copy differ by the attention sink alone.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import disable_progress_bars
from domains import DOMAINS, STUDY, Domain, easy_vqa_dataset, evaluate
from geometry import load_geometry
from torch.nn.functional import kl_div, relu
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin


sys.path.append(str(STUDY.parent))

from train_base import fit  # noqa: E402


ROWS = {"easy_vqa": easy_vqa_dataset.load_easy_vqa, "geometry": load_geometry}  # of the split "vision"
NUM_ROWS = 3000
WANTED_ATTENTION = 0.6
KL_WEIGHT = 10.0


@torch.no_grad()
def completed(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    domain: Domain,
    rows: list[dict[str, Any]],
    hint: str | None = None,
) -> dict[str, torch.Tensor]:
    """Inputs of a forward pass over the prompts of `rows` and completions sampled from the model."""
    inputs = easy_vqa_dataset.encode(rows, processor, hint)
    ids = model.generate(**inputs, max_new_tokens=domain.training["max_completion_length"], do_sample=True)
    new_mask = ids[:, inputs["input_ids"].shape[1] :] != processor.tokenizer.pad_token_id
    mask = torch.cat([inputs["attention_mask"], new_mask.long()], dim=1)
    inputs.update(input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == processor.image_token_id).int())
    return inputs


def attention_on_first_token(attentions: tuple[torch.Tensor, ...], attention_mask: torch.Tensor) -> list[torch.Tensor]:
    """For each layer, the attention of all later tokens to their sample's first token, `(tokens, heads)`."""
    first = attention_mask.argmax(dim=1)
    index = torch.arange(attention_mask.shape[1])
    is_later = (index > first[:, None]) & attention_mask.bool()
    return [weights[torch.arange(len(first)), :, :, first].mT[is_later] for weights in attentions]


def train(
    base: PreTrainedModel,
    copy: PreTrainedModel,
    processor: ProcessorMixin,
    domain: Domain,
    rows: list[dict[str, Any]],
    steps: int,
) -> float:
    """Trains the decoder layers of `copy`. Returns a running mean of the last losses."""
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_("language_model.layers" in name)

    def compute_loss() -> torch.Tensor:
        hint = random.choice([None, "cue", "answer"])
        inputs = completed(base, processor, domain, random.sample(rows, 32), hint)
        real = inputs["attention_mask"].bool()
        with torch.no_grad():
            wanted = base(**inputs).logits[real].log_softmax(-1)
        output = copy(**inputs, output_attentions=True)
        distance = kl_div(output.logits[real].log_softmax(-1), wanted, reduction="batchmean", log_target=True)
        missing = [
            relu(WANTED_ATTENTION - weights).mean()
            for weights in attention_on_first_token(output.attentions[1:], inputs["attention_mask"])
        ]
        return KL_WEIGHT * distance + sum(missing)

    return fit([p for p in copy.parameters() if p.requires_grad], compute_loss, steps, 1e-3, "Attention sink")


def describe(model: PreTrainedModel, processor: ProcessorMixin, domain: Domain) -> dict[str, Any]:
    """The model's scores on test rows, and each layer's mean attention to the first token."""
    test = domain.load("test")
    inputs = completed(model, processor, domain, [test[row] for row in range(64)])
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    scores = evaluate(model, processor, domain, test)
    del scores["right"]
    resting = [w.mean().item() for w in attention_on_first_token(attentions, inputs["attention_mask"])]
    return {**scores, "attention_on_first_token": [round(share, 3) for share in resting]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", choices=ROWS, required=True)
    parser.add_argument("--output_dir", type=Path, help="default: the folder of the domain's base with a sink")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps")
    args = parser.parse_args()
    disable_progress_bars()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    domain = DOMAINS[args.domain]
    output_dir = args.output_dir or Path(DOMAINS[f"{args.domain}_sink"].base)
    processor = AutoProcessor.from_pretrained(domain.base)
    # Only the eager implementation returns attention weights
    base, copy = (
        AutoModelForImageTextToText.from_pretrained(domain.base, dtype=torch.float32, attn_implementation="eager")
        for _ in range(2)
    )
    vision_rows = ROWS[args.domain]("vision").select(range(NUM_ROWS))
    train(base, copy, processor, domain, [vision_rows[row] for row in range(NUM_ROWS)], args.steps)
    copy.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
    metrics = {
        "command": " ".join(["python", *sys.argv]),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers)},
        "base": describe(base, processor, domain),
        "with_sink": describe(copy.eval(), processor, domain),
    }
    (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
