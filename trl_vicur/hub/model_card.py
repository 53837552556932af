"""
The card of a trained model, from TRL's card.

TRL's says how to complete a text. Ours says how to load an adapter with its module and show it an image, and how it
was trained; the rest of TRL's (badges, versions, citations) stays.
"""

import json
import os
import re
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset, IterableDataset
from huggingface_hub import ModelCard
from jinja2 import Environment, StrictUndefined
from transformers.utils import ADAPTER_CONFIG_NAME

from ..trainer.vicur_config import ViCuRConfig
from .names import hub_model_name


_INTRODUCTION = """
# Model Card for {{ model_name }}

This model is {% if is_adapter %}an adapter for{% else %}a fine-tuned version of{% endif %} \
{% if base_model %}[{{ base_model }}](https://huggingface.co/{{ base_model }}){% else %}a model that is not on the Hub\
{% endif %}{% if dataset_name %}, trained on the [{{ dataset_name }}](https://huggingface.co/datasets/{{ dataset_name \
}}) dataset{% endif %}.
It has been trained using [TRL](https://github.com/huggingface/trl) and [trl-vicur](https://pypi.org/project/trl-vicur).

## Quick start

```bash
pip install {% if is_recovery %}trl-vicur{% else %}transformers{% if is_adapter %} peft{% endif %}{% endif %}

```

```python
{% if is_recovery %}
import trl_vicur  # tells PEFT what this adapter is
{% endif %}
{% if is_adapter %}
from peft import PeftModel
{% endif %}
from transformers import AutoModelForImageTextToText, AutoProcessor

{% if is_adapter %}
base_model = AutoModelForImageTextToText.from_pretrained("{{ base_model or 'path/to/its/base-model' }}", \
dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base_model, "{{ model_id }}")
{% else %}
model = AutoModelForImageTextToText.from_pretrained("{{ model_id }}", dtype="auto", device_map="auto")
{% endif %}
processor = AutoProcessor.from_pretrained("{{ model_id }}")

image = "https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/bee.jpg"
question = "What is in this picture?"
messages = [
    {"role": "user", "content": [{"type": "image", "url": image}, {"type": "text", "text": question}]},
]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
).to(model.device)
output = model.generate(**inputs, max_new_tokens=512)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

{% if is_recovery %}
Without `import trl_vicur`, PEFT stops with `KeyError: 'CUE_RECOVERY'`.
The recovery module reads the image in the prefill, all of it at once; inference engines that do not know it would \
leave it out. vLLM knows it where trl-vicur is installed (Qwen3-VL and Qwen2.5-VL):

```bash
vllm serve {{ base_model or 'path/to/its/base-model' }} --max-model-len {{ max_model_len }} \\
    --hf-overrides '{"cue_recovery": "{{ model_id }}"}'
```

{% elif not is_adapter %}
vLLM serves it as any model of its family:

```bash
vllm serve {{ model_id }} --max-model-len {{ max_model_len }}
```

{% endif %}
"""

_SETTINGS = """

### Settings

| | |
|---|---|
{% for name, value in settings %}
| {{ name }} | {{ value | string | replace("|", "\\\\|") }} |
{% endfor %}

{% if measured %}
### Measured in training

| | first logged | last logged |
|---|---|---|
{% for name, (first_step, first), (last_step, last) in measured %}
| `{{ name }}` | {{ "%.4g" % first }} (step {{ first_step }}) | {{ "%.4g" % last }} (step {{ last_step }}) |
{% endfor %}

{% endif %}
"""

# What is logged that tells how far a student has come
_METRICS = ("loss", "logprob_gap/mean", "entropy", "hint_leakage", "completions/mean_length")

_ENVIRONMENT = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)


def complete_model_card(
    path: str,
    model_name: str | None,
    model_id: str | None,
    base_model: str | None,
    dataset_name: str | None,
    settings: list[tuple[str, object]],
    measured: list[tuple[str, tuple[int, float], tuple[int, float]]],
    max_model_len: int,
    is_adapter: bool,
    is_recovery: bool,
) -> None:
    """
    Rewrite a card that TRL has made.

    Args:
        path (`str`):
            The card, a `README.md`.
        model_name (`str`, *optional*):
            Name of the model.
        model_id (`str`, *optional*):
            Its id on the Hub, if it has one.
        base_model (`str`, *optional*):
            Id of the base model on the Hub, if it is there.
        dataset_name (`str`, *optional*):
            Id of the dataset on the Hub, if it is there.
        settings (`list[tuple[str, object]]`):
            The main settings of the training, by name.
        measured (`list[tuple[str, tuple[int, float], tuple[int, float]]]`):
            What was measured, by name: step and value where it was first logged, and where it was last.
        max_model_len (`int`):
            Tokens of prompt and completion that it is to be served for.
        is_adapter (`bool`):
            Whether the model is a PEFT adapter.
        is_recovery (`bool`):
            Whether that adapter is cue recovery.
    """
    card = ModelCard.load(path)
    card.data.base_model, card.data.datasets = base_model, dataset_name
    card.data.pipeline_tag = "image-text-to-text"
    card.data.library_name = "peft" if is_adapter else "transformers"
    card.data.tags = sorted({*card.data.tags, *(["peft"] if is_adapter else [])})
    introduction = _ENVIRONMENT.from_string(_INTRODUCTION).render(
        model_name=model_name,
        model_id=model_id or model_name,
        base_model=base_model,
        dataset_name=dataset_name,
        max_model_len=max_model_len,
        is_adapter=is_adapter,
        is_recovery=is_recovery,
    )
    _, training, procedure = card.text.partition("## Training procedure")
    procedure, versions, rest = procedure.partition("### Framework versions")
    procedure = re.sub(r"\s*\n\s*\n", "\n\n", procedure).rstrip()  # room for badges that are not there
    table = _ENVIRONMENT.from_string(_SETTINGS).render(settings=settings, measured=measured)
    packages = "".join(f"- {name}: {version(name)}\n" for name in ("trl-vicur", "peft"))
    card.text = introduction + training + procedure + table + versions + rest.replace("- TRL", packages + "- TRL", 1)
    card.save(path)


def training_settings(args: ViCuRConfig, teacher: str, adapter: dict[str, object]) -> list[tuple[str, object]]:
    """
    The main settings of a training, for its card.

    Args:
        args ([`ViCuRConfig`]):
            The training configuration.
        teacher (`str`):
            What taught.
        adapter (`dict[str, object]`):
            Settings of the adapter.
    """
    settings = {
        "privilege of the teacher": args.privilege,
        "teacher": teacher,
        "`distillation_mode`": args.distillation_mode,
    }
    if args.distillation_mode != "sampled_token":
        settings["`beta`"] = args.beta
    settings |= adapter
    settings |= {
        "learning rate": args.learning_rate,
        "prompts per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "training": _plural(args.max_steps, "step") if args.max_steps > 0 else _plural(args.num_train_epochs, "epoch"),
        "temperature of rollouts": args.temperature,
        "longest completion": f"{args.max_completion_length} tokens",
    }
    return list(settings.items())


def _plural(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"


def measured_metrics(log_history: list[dict[str, float]]) -> list[tuple[str, tuple[int, float], tuple[int, float]]]:
    """
    What a training has measured, for its card.

    Args:
        log_history (`list[dict[str, float]]`):
            All that the trainer has logged, `trainer.state.log_history`.
    """
    logged = {}
    for log in log_history:
        for name, value in log.items():
            # Of evaluations the loss alone: TRL's other names are the same for all evaluation datasets
            if name in _METRICS or (name.startswith("eval_") and name.endswith("_loss")):
                logged.setdefault(name, []).append((log["step"], value))
    return [(name, values[0], values[-1]) for name, values in logged.items()]


def hub_dataset_name(dataset: Dataset | IterableDataset | None, name: str | None = None) -> str | None:
    """
    Id of a dataset on the Hub, from its given name or from where its files came; `None` if it did not come from there.

    A path on this machine is no name.
    """
    if name is not None:
        return None if os.path.exists(name) else name
    sources = (dataset.info.download_checksums if dataset is not None else None) or {}
    names = {match[1] for source in sources if (match := re.match(r"hf://datasets/([^@/]+/[^@/]+)[@/]", source))}
    return names.pop() if len(names) == 1 else None


def remove_local_base_model(directory: str) -> None:
    """Forget, in saved adapters' configs, the path of a base model on this machine; it would lead nowhere else."""
    # PEFT saves an adapter of another name than "default" into a folder of its name
    for path in [*Path(directory).glob(ADAPTER_CONFIG_NAME), *Path(directory).glob(f"*/{ADAPTER_CONFIG_NAME}")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        base_model = hub_model_name(config["base_model_name_or_path"])
        if config["base_model_name_or_path"] != base_model:
            config["base_model_name_or_path"] = base_model
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def ignore_training_files(directory: str) -> None:
    """
    Keep the training arguments from being uploaded: in a pickle, which nobody should load, and among TensorBoard's
    events, they hold paths, the machine's name and maybe tokens. The Hub leaves out what the `.gitignore` names.
    """
    path = Path(directory, ".gitignore")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines += [pattern for pattern in ("training_args.bin", "runs/") if pattern not in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
