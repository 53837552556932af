"""
Trains the tiny Qwen3-VL that the study's geometry domain starts from, and saves it with its processor.

    python examples/study/train_geometry_base.py --output_dir examples/study/geometry_base

Like the quickstart's base (`examples/train_base.py`), it reads its prompt well, and is worse at putting into words
what its vision tower sees. It is taught in the same three steps:

1. *Eyes.* The vision tower alone, with a linear head on each visual token, learns which label the token shows, and
   which part of the figure the label names.
2. *Reading.* The language model alone learns to calculate from a cue.
3. *Words.* Both together learn to describe a figure, from few figures. Most prompts also contain a hint, mostly one
   of another figure, so the model learns to trust hints more than its eyes.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from geometry import IMAGE_SIZE, KINDS, STYLES, TOKENS_PER_SIDE, Scene, sample_scene, sample_split
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration, Qwen3VLProcessor


sys.path.append(str(Path(__file__).parents[1]))

from train_base import SPECIAL_TOKENS, build_model, build_processor, encode_lessons, fit  # noqa: E402

from trl_vicur import ViCuRConfig  # noqa: E402


NUM_VISUAL_TOKENS = TOKENS_PER_SIDE**2
ALL_COMBINATIONS = tuple((kind, style) for kind in KINDS for style in STYLES)


def with_hint(question: str, hint: str) -> str:
    return ViCuRConfig.teacher_prompt_template.format(prompt=question, privilege=hint)


def train_eyes(model, processor, drawn, steps: int, batch_size: int = 64) -> dict[str, float]:
    """
    Teaches the vision tower labels and parts.

    Returns:
        `dict[str, float]`: A running mean of the last losses, and the shares of labels and parts that the head reads
            correctly in 1,000 held-out figures.
    """
    texts = ["", *sorted({label.text for scene, _ in drawn for label in scene.figure.labels})]
    parts = ["", *sorted({label.part for scene, _ in drawn for label in scene.figure.labels})]
    targets = torch.zeros(len(drawn), NUM_VISUAL_TOKENS, 2, dtype=torch.long)
    for row, (scene, _) in enumerate(drawn):
        for label, token in zip(scene.figure.labels, scene.label_tokens, strict=True):
            targets[row, token] = torch.tensor([texts.index(label.text), parts.index(label.part)])
    head = torch.nn.Linear(model.config.text_config.hidden_size, len(texts) + len(parts))

    def read(rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = processor.image_processor([drawn[row][1] for row in rows], return_tensors="pt")
        logits = head(torch.stack(model.model.get_image_features(**pixels).pooler_output))
        return logits.split([len(texts), len(parts)], dim=-1)

    num_held_out = min(1000, len(drawn) // 8)

    def compute_loss():
        rows = random.choices(range(num_held_out, len(drawn)), k=batch_size)
        logits = read(rows)
        return sum(cross_entropy(each.flatten(0, 1), targets[rows, :, i].flatten()) for i, each in enumerate(logits))

    loss = fit([*model.model.visual.parameters(), *head.parameters()], compute_loss, steps, 2e-3, "Eyes   ")
    with torch.no_grad():
        rows = list(range(num_held_out))
        is_label = targets[rows, :, 0] > 0
        right = [
            (each.argmax(-1) == targets[rows, :, i])[is_label].float().mean().item()
            for i, each in enumerate(read(rows))
        ]
    return {"loss": loss, "labels_right": right[0], "parts_right": right[1]}


def lesson(kind: str, scene: Scene) -> tuple[str, str]:
    """
    A scene's prompt and completion.

    - `"plain"`: the prompt is the question only.
    - `"cue"`: the prompt ends with the scene's cue.
    - `"answer"`: the prompt ends with an answer, and so does the completion: the right answer in two of three lessons,
      else that of another scene of the same kind.
    """
    question, completion = scene.figure.question, scene.completion
    if kind == "plain":
        return question, completion
    hint = scene.figure.cue
    if kind == "answer":
        other = scene if random.random() < 2 / 3 else sample_scene(random, ((scene.kind, scene.style),))
        hint = str(other.figure.answer)
        completion = scene.completion_ending_in(hint)
    return with_hint(question, hint), completion


def train_reading(model, processor, steps: int, batch_size: int = 32) -> float:
    """Teaches the language model, without images, to calculate from a cue, and to end with a hinted answer."""

    def compute_loss():
        scenes = [sample_scene(random, ALL_COMBINATIONS) for _ in range(batch_size)]
        lessons = [lesson(random.choice(("plain", "cue", "cue", "answer")), scene) for scene in scenes]
        return model(**encode_lessons(lessons, processor, with_image=False)).loss

    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    return fit(parameters, compute_loss, steps, 3e-3, "Reading")


def train_words(model, processor, drawn, steps: int, batch_size: int = 32) -> float:
    """
    Teaches the model to put into words what it sees, from few figures, and to trust a hint more than its eyes: nine of
    ten cues belong to another figure.
    """
    pixels = processor.image_processor([image for _, image in drawn], return_tensors="pt")
    visual = model.model.visual
    frozen = {*visual.patch_embed.parameters(), *visual.pos_embed.parameters(), *visual.blocks.parameters()}
    for parameter in frozen:
        parameter.requires_grad_(False)
    pixel_values = pixels["pixel_values"].unflatten(0, (len(drawn), -1))

    def compute_loss():
        rows = random.choices(range(len(drawn)), k=batch_size)
        lessons = []
        for row in rows:
            kind = random.choices(["plain", "cue", "answer"], weights=[0.4, 0.3, 0.3])[0]
            is_other = kind == "cue" and random.random() < 0.9
            lessons.append(lesson(kind, sample_scene(random, ALL_COMBINATIONS) if is_other else drawn[row][0]))
        inputs = encode_lessons(lessons, processor, with_image=True, num_visual_tokens=NUM_VISUAL_TOKENS)
        return model(
            **inputs,
            pixel_values=pixel_values[rows].flatten(0, 1),
            image_grid_thw=pixels["image_grid_thw"][rows],
            mm_token_type_ids=(inputs["input_ids"] == processor.image_token_id).int(),
        ).loss

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = fit(parameters, compute_loss, steps, 1e-3, "Words  ")
    model.requires_grad_(True)
    return loss


def make_processor() -> Qwen3VLProcessor:
    """A Qwen3-VL processor whose vocabulary has one token for each word and each number."""
    scenes = [sample_scene(random, ALL_COMBINATIONS) for _ in range(10000)]
    texts = [text for scene in scenes for text in lesson("cue", scene)]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    # Qwen's own pattern would cut numbers into digits
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r" ?\S+|\s+"), "isolated")
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, to_bytes])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=768,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # Everything but the tokenizer; special tokens have the same ids in both tokenizers
    processor = build_processor(texts[:1], IMAGE_SIZE)
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        padding_side="left",
        model_max_length=1024,
    )
    return processor


def reseed(seed: int, step: str) -> None:
    """Seeds each step separately, so that a step does not depend on the length of the one before it."""
    random.seed(f"{seed} {step}")
    torch.manual_seed(random.getrandbits(32))


def start_model(seed: int) -> tuple[Qwen3VLForConditionalGeneration, Qwen3VLProcessor]:
    """The untrained model and its processor."""
    reseed(seed, "start")
    processor = make_processor()
    return build_model(processor, IMAGE_SIZE), processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/study/geometry_base"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eyes_steps", type=int, default=1200)
    parser.add_argument("--reading_steps", type=int, default=2200)
    parser.add_argument("--words_steps", type=int, default=600)
    parser.add_argument(
        "--words_figures",
        type=int,
        default=400,
        help="figures that the words are learned from; more of them make a stronger teacher",
    )
    args = parser.parse_args()
    datasets.disable_progress_bars()

    start = time.perf_counter()
    model, processor = start_model(args.seed)
    drawn = sample_split("vision")
    reseed(args.seed, "eyes")
    eyes = train_eyes(model, processor, drawn, args.eyes_steps)
    reseed(args.seed, "reading")
    reading = train_reading(model, processor, args.reading_steps)
    reseed(args.seed, "words")
    words = train_words(model, processor, drawn[: args.words_figures], args.words_steps)
    seconds = time.perf_counter() - start

    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)
    versions = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, datasets)}
    record = {
        "command": " ".join(["python", *sys.argv]),
        "settings": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "versions": versions,
        "parameters": model.num_parameters(),
        "training_seconds": round(seconds),
        "eyes": eyes,
        "losses": {"reading": reading, "words": words},
    }
    (args.output_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"Saved the base model in {args.output_dir}. Next: python examples/study/run.py --domain geometry")


if __name__ == "__main__":
    main()
