"""Remove local paths and private files from a model's folder before it is published."""

import json
from pathlib import Path

from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from .names import hub_model_name


def remove_local_base_model(directory: str) -> None:
    """Remove the base model's local path from the configs of saved adapters, because no other machine has it."""
    # PEFT saves an adapter named other than "default" in a subfolder of that name
    for path in [*Path(directory).glob(ADAPTER_CONFIG_NAME), *Path(directory).glob(f"*/{ADAPTER_CONFIG_NAME}")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        base_model = hub_model_name(config["base_model_name_or_path"])
        if config["base_model_name_or_path"] != base_model:
            config["base_model_name_or_path"] = base_model
            path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def ignore_training_files(directory: str) -> None:
    """
    Exclude the training arguments from uploads with a `.gitignore`, which the Hub's client reads.

    The pickle `training_args.bin` (which nobody should load) and TensorBoard's events contain paths, the host name and
    possibly tokens.
    """
    path = Path(directory, ".gitignore")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines += [pattern for pattern in ("training_args.bin", "runs/") if pattern not in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
