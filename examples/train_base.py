"""
Trains the tiny Qwen3-VL that the quickstart starts from, and saves it with its processor.

    python examples/train_base.py --output_dir examples/quickstart_base

The quickstart needs a base model with the weakness of real ones: it reads its prompt well, and is worse at putting
into words what its vision tower sees. So it is taught in three steps:

1. *Eyes.* The vision tower alone, with a linear head, learns colours and shapes, like a pretrained vision encoder.
2. *Reading.* The language model alone learns to state its evidence from a hint, then answer: "the image shows a teal
   circle . the answer is no ."
3. *Words.* Both together learn to say what an image shows, from only 20 images. Most prompts also contain a hint,
   mostly one that contradicts the image, so the model learns to trust hints more than its eyes.

It takes about a quarter of an hour on two cores.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import datasets
import tokenizers
import torch
import transformers
from datasets import Dataset, Image, List
from easy_vqa_dataset import (
    COLORS,
    HINT_TEMPLATE,
    SHAPES,
    Scene,
    answer_question,
    evaluate,
    find_word,
    load_easy_vqa,
)
from rich.progress import Progress, TextColumn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from torchvision.transforms.v2.functional import pil_to_tensor
from transformers import (
    Qwen2TokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    get_cosine_schedule_with_warmup,
)

from trl_vicur.trainer.vision.features import lend_features, split_by_sample


ALL_SCENES = [Scene(color, shape) for color in COLORS for shape in SHAPES]
IMAGE_SIZE = 96  # pixels per side: 6x6 patches of 16 pixels, merged 2x2
NUM_VISUAL_TOKENS = 9
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif part.type == 'text' %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def completion_text(scene: Scene, answer: str) -> str:
    """The completion that the model is taught for a scene."""
    return f"the image shows {scene.cue} . the answer is {answer} ."


def build_processor(texts: list[str], image_size: int = IMAGE_SIZE) -> Qwen3VLProcessor:
    """Builds a Qwen3-VL processor whose byte-level BPE vocabulary is learned from `texts`."""
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=512, special_tokens=SPECIAL_TOKENS, show_progress=False)
    model = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2TokenizerFast(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL_TOKENS,
        padding_side="left",
        model_max_length=1024,
    )
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"shortest_edge": image_size**2, "longest_edge": image_size**2}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=pixels, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(
            size={"shortest_edge": image_size**2, "longest_edge": 8 * image_size**2}, **patches
        ),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: Qwen3VLProcessor, image_size: int = IMAGE_SIZE) -> Qwen3VLForConditionalGeneration:
    """Builds a randomly initialized Qwen3-VL with 0.9M parameters for the processor's vocabulary and images."""
    tokenizer = processor.tokenizer
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5]},
            "initializer_range": 0.05,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_heads": 2,
            "patch_size": 16,
            "out_hidden_size": 96,
            "num_position_embeddings": (image_size // 16) ** 2,
            "deepstack_visual_indexes": [0],
            "initializer_range": 0.05,
        },
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=processor.vision_start_token_id,
        vision_end_token_id=processor.vision_end_token_id,
    )
    model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def unique_images(dataset: Dataset) -> tuple[list[torch.Tensor], list[Scene]]:
    """The dataset's distinct images, `uint8` of shape `(3, height, width)`, and their scenes."""
    paths = [image["path"] for [image] in dataset.cast_column("images", List(Image(decode=False)))["images"]]
    rows = [dataset[row] for row in {path: row for row, path in enumerate(paths)}.values()]
    images = [pil_to_tensor(row["images"][0]) for row in rows]
    return images, [Scene(*row["cue"].split()[1:]) for row in rows]


def fit(
    parameters: Iterable[torch.nn.Parameter],
    compute_loss: Callable[[], torch.Tensor],
    steps: int,
    learning_rate: float,
    description: str,
) -> float:
    """Minimizes `compute_loss()`, which draws its own batch, with AdamW. Returns a running mean of the last losses."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 50, steps)
    mean_loss = None
    with Progress(*Progress.get_default_columns(), TextColumn("loss {task.fields[loss]:.4f}")) as progress:
        task = progress.add_task(description, total=steps, loss=float("nan"))
        for _ in range(steps):
            loss = compute_loss()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            mean_loss = loss.item() if mean_loss is None else 0.95 * mean_loss + 0.05 * loss.item()
            progress.update(task, advance=1, loss=mean_loss)
    return mean_loss


def train_eyes(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, steps: int, batch_size: int = 64
) -> float:
    """Teaches the vision tower colour and shape, with a linear head over the mean of an image's visual tokens."""
    images, scenes = unique_images(load_easy_vqa("vision"))
    colors = torch.tensor([COLORS.index(scene.color) for scene in scenes])
    shapes = torch.tensor([SHAPES.index(scene.shape) for scene in scenes])
    head = torch.nn.Linear(model.config.text_config.hidden_size, len(COLORS) + len(SHAPES))

    def compute_loss():
        batch = random.choices(range(len(scenes)), k=batch_size)
        # Mirrored and shifted (the background is plain), so that the tower does not memorize the images.
        varied = [images[index].flip(-1) if random.random() < 0.5 else images[index] for index in batch]
        varied = [image.roll((random.randint(-8, 8), random.randint(-8, 8)), dims=(-2, -1)) for image in varied]
        features = model.model.get_image_features(**processor.image_processor(varied, return_tensors="pt"))
        logits = head(torch.stack(features.pooler_output).mean(1))
        color_logits, shape_logits = logits.split([len(COLORS), len(SHAPES)], dim=-1)
        return cross_entropy(color_logits, colors[batch]) + cross_entropy(shape_logits, shapes[batch])

    return fit([*model.model.visual.parameters(), *head.parameters()], compute_loss, steps, 2e-3, "Eyes   ")


def closest_scene(seen: Scene, question: str, answer: str) -> Scene:
    """Among the scenes in which the question has the given answer, the one most like the scene seen."""
    scenes = [scene for scene in ALL_SCENES if answer_question(question, scene) == answer]
    random.shuffle(scenes)  # ties are broken at random
    return max(scenes, key=lambda scene: (scene.color == seen.color) + (scene.shape == seen.shape))


def make_lesson(kind: str, seen: Scene | None, questions: list[str]) -> tuple[str, str]:
    """
    Makes one prompt and completion about an image that shows `seen`, or about no image (`None`).

    - `"plain"`: the prompt is the question only; the completion says what the image shows. Without an image it states
      a random scene, and the answer follows from that.
    - `"cue"`: the prompt ends with a cue, and the completion repeats the cue, whatever the image shows.
    - `"answer"`: the prompt ends with an answer, and so does the completion. In half of these lessons the answer is
      right, and the completion says what the image shows. In the others it is another scene's answer, and the
      completion states the scene most like the image that leads to this answer.
    """
    question = random.choice(questions)
    if seen is not None and (kind == "plain" or (kind == "answer" and random.random() < 0.5)):
        scene = seen
    else:
        # In half of these lessons the scene contains what is asked about; else the answer would mostly be "no".
        scene = random.choice(ALL_SCENES)
        if random.random() < 0.5:
            scene = Scene(find_word(question, COLORS) or scene.color, find_word(question, SHAPES) or scene.shape)
    answer = answer_question(question, scene)
    if answer is None:  # the question does not apply to the scene: ask another one
        return make_lesson(kind, seen, questions)
    if kind == "answer":
        scene = closest_scene(seen, question, answer)
    hint = {"plain": None, "cue": scene.cue, "answer": answer}[kind]
    prompt = question if hint is None else HINT_TEMPLATE.format(prompt=question, privilege=hint)
    return prompt, completion_text(scene, answer)


def encode_lessons(
    lessons: list[tuple[str, str]],
    processor: Qwen3VLProcessor,
    with_image: bool,
    num_visual_tokens: int = NUM_VISUAL_TOKENS,
) -> dict:
    """Tokenizes lessons as chats, right-padded. Only completions have labels."""
    tokenizer = processor.tokenizer
    image = [{"type": "image"}] if with_image else []
    prompts = [[{"role": "user", "content": [*image, {"type": "text", "text": prompt}]}] for prompt, _ in lessons]
    prompts = processor.apply_chat_template(prompts, add_generation_prompt=True)
    prompts = [prompt.replace("<|image_pad|>", "<|image_pad|>" * num_visual_tokens) for prompt in prompts]
    input_ids, labels = [], []
    for prompt, (_, completion) in zip(prompts, lessons, strict=True):
        prompt_ids = tokenizer(prompt)["input_ids"]
        completion_ids = tokenizer(completion + "<|im_end|>")["input_ids"]
        input_ids.append(torch.tensor(prompt_ids + completion_ids))
        labels.append(torch.tensor([-100] * len(prompt_ids) + completion_ids))
    input_ids = pad_sequence(input_ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_ids": input_ids, "attention_mask": (input_ids != tokenizer.pad_token_id).long(), "labels": labels}


def encode_images(model: Qwen3VLForConditionalGeneration, pixels: dict[str, torch.Tensor]) -> list[dict]:
    """The vision features of each image."""
    features = model.model.get_image_features(**pixels)
    return split_by_sample(features, [len(image) for image in features.pooler_output])


def loss_on_images(
    model: Qwen3VLForConditionalGeneration,
    processor: Qwen3VLProcessor,
    lessons: list[tuple[str, str]],
    shown: list[int],
    pixels: dict[str, torch.Tensor],
    features: list[dict],
) -> torch.Tensor:
    """The loss on lessons; each shows the image whose index is in `shown`, with its precomputed features."""
    inputs = encode_lessons(lessons, processor, with_image=True)
    with lend_features(model, {"image": [features[index] for index in shown]}):
        return model(
            **inputs,
            pixel_values=pixels["pixel_values"],
            image_grid_thw=pixels["image_grid_thw"][shown],
            mm_token_type_ids=(inputs["input_ids"] == processor.image_token_id).int(),
        ).loss


def train_reading(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, steps: int, batch_size: int = 32
) -> float:
    """
    Teaches the language model, without images, to repeat a cue and to answer questions about it. Half of the lessons
    have no cue, so that the model learns to answer from the evidence that it has stated itself.
    """
    questions = [message["content"] for [message] in load_easy_vqa("vision")["prompt"]]

    def compute_loss():
        kinds = random.choices(["plain", "cue"], k=batch_size)
        lessons = [make_lesson(kind, None, questions) for kind in kinds]
        return model(**encode_lessons(lessons, processor, with_image=False)).loss

    parameters = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    return fit(parameters, compute_loss, steps, 2e-3, "Reading")


def train_words(
    model: Qwen3VLForConditionalGeneration, processor: Qwen3VLProcessor, steps: int, batch_size: int = 32
) -> float:
    """Teaches the model to put into words what it sees, from few images, and to trust a hint more than its eyes."""
    questions = [message["content"] for [message] in load_easy_vqa("vision")["prompt"]]
    images, scenes = unique_images(load_easy_vqa("base"))
    pixels = processor.image_processor(images, return_tensors="pt")
    # The tower's blocks are frozen; its mergers, the connection to the language model, are trained.
    visual = model.model.visual
    frozen = {*visual.patch_embed.parameters(), *visual.pos_embed.parameters(), *visual.blocks.parameters()}
    for parameter in frozen:
        parameter.requires_grad_(False)

    def compute_loss():
        batch = random.choices(range(len(images)), k=batch_size)
        kinds = random.choices(["plain", "cue", "answer"], weights=[0.2, 0.5, 0.3], k=batch_size)
        lessons = [make_lesson(kind, scenes[index], questions) for kind, index in zip(kinds, batch, strict=True)]
        # There are fewer images than lessons, so each image is encoded once and its features are shared.
        return loss_on_images(model, processor, lessons, batch, pixels, encode_images(model, pixels))

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = fit(parameters, compute_loss, steps, 5e-4, "Words  ")
    model.requires_grad_(True)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("examples/quickstart_base"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eyes_steps", type=int, default=1500)
    parser.add_argument("--reading_steps", type=int, default=2600)
    parser.add_argument("--words_steps", type=int, default=700)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    random.seed(args.seed)
    torch.manual_seed(args.seed)

    start = time.perf_counter()
    questions = sorted({message["content"] for [message] in load_easy_vqa("vision")["prompt"]})
    answered = [(question, scene, answer_question(question, scene)) for question in questions for scene in ALL_SCENES]
    processor = build_processor(
        [
            HINT_TEMPLATE.format(prompt=question, privilege=scene.cue) + " " + completion_text(scene, answer)
            for question, scene, answer in answered
            if answer is not None
        ]
    )
    model = build_model(processor)
    losses = {
        "eyes": train_eyes(model, processor, args.eyes_steps),
        "reading": train_reading(model, processor, args.reading_steps),
        "words": train_words(model, processor, args.words_steps),
    }
    seconds = time.perf_counter() - start
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    test_dataset = load_easy_vqa("test")
    metrics = {
        "command": " ".join(["python", *sys.argv]),
        "settings": {name: value for name, value in vars(args).items() if name != "output_dir"},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, datasets)},
        "parameters": model.num_parameters(),
        "training_seconds": round(seconds),
        "losses": losses,
        "test_questions": len(test_dataset),
        "test": {
            "plain": evaluate(model, processor, test_dataset, description="Plain prompts"),
            "with_cue": evaluate(model, processor, test_dataset, "cue", description="With the cue"),
            "with_answer": evaluate(model, processor, test_dataset, "answer", description="With the answer"),
        },
    }
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics["test"], indent=2))
    print(f"Saved the base model in {args.output_dir}. Next: python examples/quickstart.py")


if __name__ == "__main__":
    main()
