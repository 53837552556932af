"""The card of a merged model: how to load it with its recovery module."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .names import hub_model_name


PLACEHOLDER = "[More Information Needed]"  # in transformers' card template

INTRODUCTION = """
# Model Card for {name}

This model is {base}, trained by visual-cue-recovery distillation
([ViCuR](https://huggingface.co/papers/2606.05718)) with [trl-vicur](https://pypi.org/project/trl-vicur).
"""

SECTION = """
## The recovery module

LoRA is merged into the weights. The cue recovery module is attention over the image and cannot become a weight: it is
an adapter, in the folder `{subfolder}`. Without it the model is the backbone alone. With it, after
`pip install trl-vicur`:

```python
import trl_vicur  # registers the PEFT method
from peft import PeftModel
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{model_id}", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(model, "{model_id}", subfolder="{subfolder}")
```
"""


def complete_merged_card(path: Path, model_id: str, base_model: str | None, subfolder: str) -> None:
    """
    Add a section to a card that says where the recovery module is and how to load it. An empty template is replaced.

    Args:
        path (`Path`):
            The card, a `README.md`.
        model_id (`str`):
            Id of the model on the Hub.
        base_model (`str`, *optional*):
            Name of the model that was trained. A local path is left out.
        subfolder (`str`):
            The module's folder inside the model's.
    """
    card = ModelCard.load(path)
    assert isinstance(card.data, ModelCardData)
    section = SECTION.format(model_id=model_id, subfolder=subfolder)
    if PLACEHOLDER in card.text:
        base_model = hub_model_name(base_model)
        base = "a model" if base_model is None else f"[{base_model}](https://huggingface.co/{base_model})"
        card.text = INTRODUCTION.format(name=Path(model_id).name, base=base)
        card.data.base_model = base_model
        card.data.pipeline_tag = "image-text-to-text"
    if section not in card.text:
        card.text += section
    tags: set[str] = {*(card.data.tags or []), "vicur"}
    card.data.tags = sorted(tags)
    card.save(path)
