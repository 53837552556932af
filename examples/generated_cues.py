"""
The quickstart with cues written by a model, compared with the quickstart's own cues, which are derived from the known
scene of each image.

    python examples/generated_cues.py

1. Train a cue generator: the quickstart's base learns to name what it sees, from the 1,000 images that its vision
   tower was trained on.
2. Let it write a cue for every row of the distillation data, whose images it never saw (`generate_cues`).
3. Audit the cues, and drop rows whose cue is not usable (`audit_cues`).
4. Distil and test two students, one with these cues and one with the scenes' cues.
"""

import argparse
import json
import random
import time
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from easy_vqa_dataset import evaluate, load_easy_vqa
from quickstart import BASE, NUM_TEST_QUESTIONS, TRAINING, load_base, train
from rich.console import Console
from rich.table import Table
from train_base import encode_images, fit, loss_on_images, unique_images
from transformers import AutoProcessor, ProcessorMixin, Qwen3VLForConditionalGeneration

from trl_vicur.cues import CuePrompt, TransformersGenerator, audit_cues, generate_cues
from trl_vicur.cues.audit_summary import summarize_audit


# The package's default prompt is longer than this model's context
PROMPT = CuePrompt(version="easy-vqa", user="{question} what does the image show ?")


def train_generator(
    processor: ProcessorMixin, steps: int, batch_size: int = 32
) -> tuple[Qwen3VLForConditionalGeneration, float]:
    """
    Teaches the base to name what an image shows, whatever the question is.

    Returns:
        `tuple[Qwen3VLForConditionalGeneration, float]`: The generator, and a running mean of its last losses.
    """
    model = load_base()
    dataset = load_easy_vqa("vision")
    questions = [message["content"] for [message] in dataset["prompt"]]
    images, scenes = unique_images(dataset)
    pixels = processor.image_processor(images, return_tensors="pt")
    # The vision tower is good, but the model cannot yet name what it sees
    model.model.visual.requires_grad_(False)
    with torch.no_grad():
        features = encode_images(model, pixels)

    def compute_loss():
        batch = random.choices(range(len(images)), k=batch_size)
        lessons = [(PROMPT.user.replace("{question}", random.choice(questions)), scenes[index].cue) for index in batch]
        return loss_on_images(model, processor, lessons, batch, pixels, features)

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, fit(parameters, compute_loss, steps, 5e-4, "Generator")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("generated_cues_output"), help="folder of the results")
    parser.add_argument("--generator_steps", type=int, default=400, help="optimizer steps of the generator")
    parser.add_argument("--max_steps", type=int, default=150, help="optimizer steps of each student")
    parser.add_argument("--seed", type=int, default=0, help="seed of all training runs")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console()
    processor = AutoProcessor.from_pretrained(BASE)
    scene_dataset = load_easy_vqa("distillation")
    num_rows = min(args.max_steps * TRAINING["per_device_train_batch_size"], len(scene_dataset))
    scene_dataset = scene_dataset.select(range(num_rows))
    test_dataset = load_easy_vqa("test").select(range(NUM_TEST_QUESTIONS))

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    model, _ = train_generator(processor, args.generator_steps)
    generator = TransformersGenerator(model, processor, batch_size=64, max_new_tokens=24)
    start = time.perf_counter()
    dataset = generate_cues(
        scene_dataset.remove_columns(["cue"]), generator, args.output_dir / "cues", prompt=PROMPT, seed=args.seed
    )
    seconds = time.perf_counter() - start
    right = [cue == expected for cue, expected in zip(dataset["cue"], scene_dataset["cue"], strict=True)]
    dataset = audit_cues(dataset)
    totals = summarize_audit(dataset)
    generated_dataset = dataset.filter(lambda is_usable: is_usable, input_columns="cue_usable")
    console.print(
        f"{len(dataset):,} rows in {seconds:.0f} s; {sum(right) / len(right):.1%} of the cues equal the scene's "
        f"cue, {len(generated_dataset):,} are usable"
    )

    results = {}
    for name, train_dataset in {"generated": generated_dataset, "scene": scene_dataset}.items():
        console.print(f"Distilling with {name} cues, {args.max_steps} steps")
        trainer, seconds = train("cue", train_dataset, processor, args)
        results[name] = evaluate(trainer.model, processor, test_dataset, description=f"Evaluating, {name} cues")
        results[name]["training_seconds"] = seconds
    results["base"] = evaluate(load_base(), processor, test_dataset, description="Evaluating the base")
    results["cues"] = {"right": sum(right) / len(right), "usable": len(generated_dataset), **totals}
    results["settings"] = {name: value for name, value in vars(args).items() if name != "output_dir"} | TRAINING
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")

    table = Table(title=f"easy-VQA, {NUM_TEST_QUESTIONS:,} test questions, greedy decoding")
    table.add_column("student of")
    for column in ("accuracy", "grounded accuracy"):
        table.add_column(column, justify="right")
    names = {"base": "nobody (the base)", "generated": "generated, audited cues", "scene": "cues from the scene"}
    for key, name in names.items():
        table.add_row(name, *(f"{results[key][column]:.1%}" for column in ("accuracy", "grounded_accuracy")))
    console.print(table)


if __name__ == "__main__":
    main()
