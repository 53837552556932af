"""Short training runs of tiny models on mixed rows, and helpers that read their results."""

import torch
from datasets import Dataset
from tiny_models import encode, make_image, make_qwen3_vl, with_completion

from trl_vicur import ViCuRConfig, ViCuRTrainer
from trl_vicur.trainer.vision.features import get_backbone


ADAPTER = dict(layer_interval=1)


def make_rows(count: int = 8, mixed: bool = True) -> list[dict]:
    """Rows with one image, two images and, if `mixed`, none."""
    rows = []
    for i in range(count):
        images = [make_image(i)]
        if i % 4 == 1:
            images.append(make_image(100 + i, (32, 64)))
        elif i % 4 == 2 and mixed:
            images = []
        prompt = [{"role": "user", "content": f"What is in picture {i}?" + "?" * i}]
        if i % 2:
            prompt.insert(0, {"role": "system", "content": "Be brief."})
        rows.append({"prompt": prompt, "images": images, "cue": f"noise number {i}", "answer": "yes" * (1 + i % 2)})
    return rows


def make_config(tmp_path, **arguments) -> ViCuRConfig:
    defaults = dict(
        output_dir=str(tmp_path),
        bf16=False,
        use_cpu=True,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=False,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_steps=2,
        max_completion_length=8,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return ViCuRConfig(**{**defaults, **arguments})


def make_trainer(tmp_path, processor, model=None, rows=None, peft_config=None, teacher_model=None, **arguments):
    return ViCuRTrainer(
        model=make_qwen3_vl() if model is None else model,
        teacher_model=teacher_model,
        args=make_config(tmp_path, **arguments),
        train_dataset=Dataset.from_list(make_rows() if rows is None else rows),
        processing_class=processor,
        peft_config=peft_config,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed(before, after) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def train_logs(trainer) -> list[dict]:
    return [log for log in trainer.state.log_history if "loss" in log]


def row_of(prompt_ids, rows, processor):
    text = processor.tokenizer.decode(prompt_ids)
    return next(row for row in rows if f"{row['prompt'][-1]['content']}<|im_end|>" in text)


def logprobs_alone(model, processor, row, hint, completion):
    content = [{"type": "image", "image": image} for image in row["images"]]
    text = row["prompt"][-1]["content"] + (f"\n\n[Hint]: {hint}" if hint else "")
    messages = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in row["prompt"][:-1]
    ] + [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]
    inputs = encode(processor, [messages])
    length = inputs["input_ids"].shape[1]
    inputs = with_completion(inputs, completion[None])
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0, length - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completion[:, None]).squeeze(-1)


class count_encoded_images:
    """Context manager that counts the images that a model's vision tower encodes."""

    def __init__(self, model):
        self.tower = get_backbone(model).visual
        self.count = 0

    def __enter__(self):
        def note(_, args, kwargs):
            self.count += len(kwargs["grid_thw"])

        self.handle = self.tower.register_forward_pre_hook(note, with_kwargs=True)
        return self

    def __exit__(self, *_):
        self.handle.remove()
