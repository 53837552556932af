"""
The card of a trained model: TRL's card, rewritten.

TRL's card shows how to complete a text. Ours shows how to load an adapter with its module and how to ask about an
image, and lists the training settings. TRL's badges, versions and citations stay.
"""

import re
from importlib.metadata import version

from huggingface_hub import ModelCard
from jinja2 import Environment, StrictUndefined


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
import trl_vicur  # registers the adapter's method with PEFT
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
The recovery module reads the whole image in the prefill; inference engines without support for it silently leave it \
out. vLLM supports it if trl-vicur is installed (Qwen3-VL and Qwen2.5-VL):

```bash
vllm serve {{ base_model or 'path/to/its/base-model' }} --max-model-len {{ max_model_len }} \\
    --hf-overrides '{"cue_recovery": "{{ model_id }}"}'
```

{% elif not is_adapter %}
vLLM serves it like any model of its family:

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

# Logged metrics that show a student's progress
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
    Rewrite a card that TRL has written.

    Args:
        path (`str`):
            The card, a `README.md`.
        model_name (`str`, *optional*):
            Name of the model.
        model_id (`str`, *optional*):
            Id of the model on the Hub.
        base_model (`str`, *optional*):
            Id of the base model on the Hub.
        dataset_name (`str`, *optional*):
            Id of the dataset on the Hub.
        settings (`list[tuple[str, object]]`):
            Names and values of the main training settings.
        measured (`list[tuple[str, tuple[int, float], tuple[int, float]]]`):
            Names of metrics, each with the step and value of its first and of its last log, from
            [`measured_metrics`].
        max_model_len (`int`):
            `--max-model-len` of the card's `vllm serve` command, in tokens.
        is_adapter (`bool`):
            Whether the model is a PEFT adapter.
        is_recovery (`bool`):
            Whether that adapter is cue recovery.
    """
    card = ModelCard.load(path)
    card.data["base_model"], card.data["datasets"] = base_model, dataset_name
    card.data["pipeline_tag"] = "image-text-to-text"
    card.data["library_name"] = "peft" if is_adapter else "transformers"
    card.data["tags"] = sorted({*card.data["tags"], *(["peft"] if is_adapter else [])})
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
    procedure = re.sub(r"\s*\n\s*\n", "\n\n", procedure).rstrip()  # TRL leaves blank lines for missing badges
    table = _ENVIRONMENT.from_string(_SETTINGS).render(settings=settings, measured=measured)
    packages = "".join(f"- {name}: {version(name)}\n" for name in ("trl-vicur", "peft"))
    card.text = introduction + training + procedure + table + versions + rest.replace("- TRL", packages + "- TRL", 1)
    card.save(path)


def measured_metrics(log_history: list[dict[str, float]]) -> list[tuple[str, tuple[int, float], tuple[int, float]]]:
    """
    First and last logged values of the metrics that the card shows.

    Args:
        log_history (`list[dict[str, float]]`):
            The trainer's logs, `trainer.state.log_history`.

    Returns:
        `list[tuple[str, tuple[int, float], tuple[int, float]]]`: Name, first step and value, last step and value.
    """
    logged = {}
    for log in log_history:
        for name, value in log.items():
            # Of evaluations, show only the loss: TRL's other metrics have the same name for every evaluation dataset
            if name in _METRICS or (name.startswith("eval_") and name.endswith("_loss")):
                logged.setdefault(name, []).append((log["step"], value))
    return [(name, values[0], values[-1]) for name, values in logged.items()]
