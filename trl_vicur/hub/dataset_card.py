"""The card of a dataset with cues: columns, how the cues were generated, and how many are missing."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub import DatasetCard, DatasetCardData


TEMPLATE = """\
---
{{ card_data }}
---

# Dataset with visual cues

{{ num_rows }} rows, {{ num_cues }} of them with a *visual cue*: text that describes the evidence in the image that the
question needs, and neither the answer nor the way to it. In visual-cue-recovery distillation
([ViCuR](https://arxiv.org/abs/2606.05718)) only the teacher sees the cue; the student learns to find the evidence in
the image.

## Columns

| column | |
|---|---|
| `cue` | the cue; empty if it failed |
| `cue_error` | why it failed |
| `cue_provenance` | generator, model and its revision, version of the prompt, sampling settings and seed |
{%- if audit %}
| `cue_usable` | whether the text audit found neither a leak nor control text |
| `cue_answer_leak` | `none`, `possible` (the cue states the answer, but the image may show it) or `leak` |
| `cue_reasoning_leak`, `cue_control_text` | whether the cue has part of the solution, or text that steers a model |
| `cue_reasons` | the findings |
{%- endif %}

The other columns come from the dataset that the cues were written for.

## How the cues were made

| | |
|---|---|
{%- for name, value in settings.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}

{{ num_failed }} rows have no cue. The generator saw the images and the question, never the answer. Its prompt:

{% for text in prompt if text -%}
{% for line in text.splitlines() -%}
> {{ line }}
{% endfor -%}
>
{% endfor %}
{%- if audit %}
## Audit

| | rows |
|---|---|
{%- for name, value in audit.items() %}
| {{ name }} | {{ value }} |
{%- endfor %}
{% endif %}
## Training on it

```python
from datasets import load_dataset
from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer

trainer = ViCuRTrainer(
    model="Qwen/Qwen3-VL-2B-Instruct",
    args=ViCuRConfig(output_dir="Qwen3-VL-2B-ViCuR", learning_rate=1e-4),
    train_dataset=load_dataset("…", split="train").filter(lambda row: row["{{ 'cue_usable' if audit else 'cue' }}"]),
    peft_config=CueRecoveryConfig(r=16, lora_alpha=32),
)
trainer.train()
```
"""


def write_dataset_card(
    folder: Path, settings: dict[str, Any], dataset: Dataset, audit: dict[str, int | float] | None = None
) -> None:
    """
    Write the folder's `README.md`, which the Hub shows.

    Args:
        folder (`Path`):
            The folder of the dataset.
        settings (`dict[str, Any]`):
            Settings that the cues were generated with, including the prompt.
        dataset ([`~datasets.Dataset`]):
            The dataset.
        audit (`dict[str, int | float]`, *optional*):
            The totals of its audit.
    """
    num_failed = dataset.data.column("cue").null_count
    card = DatasetCard.from_template(
        DatasetCardData(
            task_categories=["image-text-to-text"], tags=["vicur", "visual-cues", "trl"], pretty_name="Visual cues"
        ),
        template_str=TEMPLATE,
        settings={
            # Escape for a table cell
            name: str(value).replace("|", r"\|").replace("\n", " ")
            for name, value in settings.items()
            if value is not None and name != "prompt"
        },
        prompt=settings["prompt"],
        num_rows=len(dataset),
        num_cues=len(dataset) - num_failed,
        num_failed=num_failed,
        audit=audit,
    )
    card.save(folder / "README.md")
