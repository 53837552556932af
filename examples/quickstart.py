"""
ViCuR in a few minutes on a CPU: a tiny Qwen3-VL teaches itself to see.

    python examples/quickstart.py             # distils with visual cues
    python examples/quickstart.py --compare   # also distils with reference answers, to compare

The base model (see `train_base.py`) answers questions about easy-VQA images and states its evidence: "the image shows
a teal circle . the answer is no .". It reads hints in its prompt better than it reads images. The teacher is the same
model with a hint about the image ("a teal circle"); the student gets the image only, and learns to find the evidence.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from easy_vqa_dataset import complete, encode, evaluate, load_easy_vqa
from matplotlib.figure import Figure
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor, ProcessorMixin, Qwen3VLForConditionalGeneration
from transformers.trainer_callback import ProgressCallback

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer
from trl_vicur.cue_recovery import sink_attention


BASE = Path(__file__).parent / "quickstart_base"
NUM_TEST_QUESTIONS = 2000  # of 8,879, always the same ones
# Options of both training runs
TRAINING = {
    # The forward KL divergence over the whole vocabulary: the densest signal, best for short runs
    "distillation_mode": "full_logits",
    "beta": 0.0,
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 64,
    "max_completion_length": 24,
}


class LossProgressCallback(ProgressCallback):
    """The trainer's progress bar, with the loss at its end instead of all metrics printed below it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.training_bar.set_postfix(loss=logs["loss"])


def load_base() -> Qwen3VLForConditionalGeneration:
    return Qwen3VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)


def train(
    privilege: str, train_dataset: Dataset, processor: ProcessorMixin, args: argparse.Namespace
) -> tuple[ViCuRTrainer, float]:
    """
    Distils a student from the base model; the teacher is the base model that sees the `privilege` ("cue" or "answer").
    The student that learns from cues gets the recovery module; all weights train in both cases.

    Returns:
        `tuple[ViCuRTrainer, float]`: The trainer after training, and the seconds that training took.
    """
    trainer = ViCuRTrainer(
        model=str(BASE),
        args=ViCuRConfig(
            output_dir=str(args.output_dir / ("student" if privilege == "cue" else "answer_student")),
            privilege=privilege,
            max_steps=args.max_steps,
            seed=args.seed,
            use_cpu=True,
            disable_tqdm=False,  # keeps the progress bar although libraries are silenced
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            **TRAINING,
        ),
        train_dataset=train_dataset,
        processing_class=processor,
        # As in the paper, all weights train with the module. Two of the four layers have a module
        peft_config=CueRecoveryConfig(layer_interval=2, train_base=True) if privilege == "cue" else None,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossProgressCallback)
    start = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - start


def reload(
    adapter_dir: Path, student: PeftModel, processor: ProcessorMixin, sample: Dataset, console: Console
) -> PeftModel:
    """Loads the saved adapter with stock PEFT, and checks that it completes `sample` exactly like the student."""
    reloaded = PeftModel.from_pretrained(load_base(), adapter_dir)
    before, after = (
        complete(model, processor, sample, description=f"Completing with the {name} student")
        for name, model in (("trained", student), ("reloaded", reloaded))
    )
    if before != after:
        raise RuntimeError("The reloaded adapter completes test questions differently from the trained one.")
    console.print(
        f"Reloaded with PEFT: all {len(sample)} completions are the same, for example {after[0]!r}", soft_wrap=True
    )
    return reloaded


def draw_sink_attention(model: PeftModel, processor: ProcessorMixin, rows: list[dict], path: Path) -> None:
    """Draws the sink token's attention to the 3x3 visual tokens, averaged over heads, for each layer."""
    inputs = encode(rows, processor)
    weights = sink_attention(model, **inputs)  # for each layer (batch, heads, seq)
    is_visual = inputs["input_ids"] == processor.image_token_id
    images = [row["images"][0] for row in rows]
    figure = Figure(figsize=(1.5 * len(rows), 1.5 * len(weights) + 1.9), layout="constrained")
    axes = figure.subplots(1 + len(weights), len(rows))
    for axis, row, image in zip(axes[0], rows, images, strict=True):
        axis.imshow(image)
        axis.set_title(row["cue"], fontsize=9)
    for axes_of_layer, (layer, layer_weights) in zip(axes[1:], weights.items(), strict=True):
        heat_maps = layer_weights.mean(1)[is_visual].reshape(len(rows), 1, 3, 3)
        heat_maps = torch.nn.functional.interpolate(heat_maps, size=images[0].size[::-1], mode="bilinear")
        for axis, image, heat_map in zip(axes_of_layer, images, heat_maps, strict=True):
            axis.imshow(image)
            drawn = axis.imshow(heat_map[0], cmap="inferno", alpha=0.6, vmin=0.0, vmax=heat_maps.max())
        axes_of_layer[0].set_ylabel(f"input of\n{layer}", fontsize=9)
        figure.colorbar(drawn, ax=axes_of_layer.tolist(), label="attention")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.suptitle("Where the sink token looks in test images, before any word of the question", fontsize=10)
    figure.savefig(path, dpi=150)


def print_table(console: Console, results: dict[str, dict[str, float]]) -> None:
    """Prints one line per model."""
    names = {
        "base": "base",
        "cue_teacher": "cue teacher",
        "student": "ViCuR student",
        "answer_student": "OPSD student",
    }
    table = Table(title=f"easy-VQA, {NUM_TEST_QUESTIONS:,} test questions, greedy decoding")
    table.add_column("model", no_wrap=True)
    for column in ("accuracy", "grounded\naccuracy", "hint\nleakage", "training", "evaluation"):
        table.add_column(column, justify="right")
    for key, result in results.items():
        shares = [f"{result[name]:.1%}" for name in ("accuracy", "grounded_accuracy", "hint_leakage")]
        seconds = [f"{result[name]:.0f} s" if name in result else "" for name in ("training_seconds", "seconds")]
        table.add_row(names[key], *shares, *seconds)
    console.print(table)
    console.print("grounded accuracy: both the answer and the evidence that the text states for it are right")
    console.print("cue teacher: the base with the cue in its prompt. ViCuR student: distilled from it")
    if "answer_student" in results:
        console.print("OPSD student: distilled from the base with the answer in its prompt. Same steps and options")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("quickstart_output"), help="folder of the results")
    parser.add_argument("--max_steps", type=int, default=150, help="optimizer steps of each student")
    parser.add_argument("--seed", type=int, default=0, help="seed of rollouts and data order")
    parser.add_argument("--compare", action="store_true", help="also train the answer-privileged baseline")
    args = parser.parse_args()
    if args.max_steps < 1:
        parser.error(f"--max_steps must be at least 1, got {args.max_steps}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    console = Console()

    processor = AutoProcessor.from_pretrained(BASE)
    num_rows = args.max_steps * TRAINING["per_device_train_batch_size"]
    train_dataset = load_easy_vqa("distillation")
    train_dataset = train_dataset.select(range(min(num_rows, len(train_dataset))))  # no more than it uses
    test_dataset = load_easy_vqa("test").select(range(NUM_TEST_QUESTIONS))
    base = load_base()
    results = {
        "base": evaluate(base, processor, test_dataset, description="Evaluating the base"),
        "cue_teacher": evaluate(base, processor, test_dataset, "cue", description="Evaluating the cue teacher"),
    }

    console.print(f"Distilling with cues, {args.max_steps} steps")
    trainer, seconds = train("cue", train_dataset, processor, args)
    student = trainer.model
    results["student"] = evaluate(student, processor, test_dataset, description="Evaluating the student")
    results["student"]["training_seconds"] = seconds
    adapter_dir = args.output_dir / "student"
    trainer.save_model(str(adapter_dir))

    reloaded = reload(adapter_dir, student, processor, test_dataset.select(range(256)), console)
    plot = args.output_dir / "sink_attention.png"
    draw_sink_attention(reloaded, processor, [test_dataset[row] for row in range(6)], plot)

    if args.compare:
        console.print(f"Distilling with answers, {args.max_steps} steps")
        trainer, seconds = train("answer", train_dataset, processor, args)
        results["answer_student"] = evaluate(
            trainer.model, processor, test_dataset, description="Evaluating the answer student"
        )
        results["answer_student"]["training_seconds"] = seconds

    settings = {"seed": args.seed, "max_steps": args.max_steps, "test_questions": NUM_TEST_QUESTIONS, **TRAINING}
    (args.output_dir / "results.json").write_text(json.dumps(results | {"settings": settings}, indent=2) + "\n")
    print_table(console, results)
    console.print(
        f"Saved the adapter in {adapter_dir}, the numbers in {args.output_dir / 'results.json'} and the sink's "
        f"attention in {plot}. Next: {'' if args.compare else 'compare with learning from answers (--compare), or '}"
        "train your own model with examples/scripts/vicur.py.",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
