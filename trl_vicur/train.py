"""
Training from the command line.

    trl-vicur train --config vicur.yaml
    accelerate launch --module trl_vicur.train --config vicur.yaml

The first command runs the second, after splitting its arguments into those for `accelerate launch` and those for
training.
"""

import argparse
import os
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, fields

import torch
from accelerate.commands.config import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftConfig
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from trl.cli.accelerate_config import resolve_accelerate_config_argument
from trl.scripts.utils import ScriptArguments
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_peft_config, get_quantization_config

from .cli import report
from .command_parser import CommandParser
from .cue_recovery import CueRecoveryConfig
from .data.layouts import parse_columns
from .data.loading import load_rows
from .trainer import ViCuRConfig, ViCuRTrainer
from .trainer.checkpoints import CheckpointError


@dataclass
class CueRecoveryArguments:
    """The fields of `CueRecoveryConfig` that belong on a command line."""

    cue_recovery: bool = field(default=True, metadata={"help": "Whether the student gets the recovery module."})
    layer_interval: int = field(default=5, metadata={"help": "Decoder layers between two recovery modules."})
    sink_token: str = field(default="first", metadata={"help": "'first' or a token string."})
    num_heads: int | None = field(default=None, metadata={"help": "Heads of the module. Default: the text model's."})
    bottleneck_size: int | None = field(
        default=None, metadata={"help": "Width of queries, keys and values. Default: the model's hidden size."}
    )
    train_base: bool = field(
        default=False, metadata={"help": "Whether the backbone trains together with the module (the paper's setting)."}
    )


# TRL's help texts for these options mention mixtures of datasets, which are not supported here
HELP = {
    "model_name_or_path": "Id or folder of the model that becomes the student.",
    "teacher_model_name_or_path": "Id or folder of a larger teacher. By default, the student teaches itself.",
    "dataset_name": "Id on the Hub, a folder written by `trl-vicur cues generate` or `save_to_disk`, or a file "
    "in JSON lines, CSV or Parquet.",
    "dataset_config": "Configuration of a dataset on the Hub.",
    "dataset_train_split": "Split to train on.",
    "dataset_test_split": "Split to evaluate on, with `--eval_strategy`.",
    "dataset_streaming": "Whether to stream the dataset: rows are read and checked only when training needs them.",
}
REQUIRED = ("model_name_or_path", "dataset_name")
TRAINING_ARGUMENTS = [ScriptArguments, ModelConfig, ViCuRConfig, CueRecoveryArguments]


def make_parser(prog: str = "trl-vicur train") -> CommandParser:
    """Make the parser of all training options: TRL's script and model options, `ViCuRConfig`, and the module."""
    parser = CommandParser(
        TRAINING_ARGUMENTS,
        prog=prog,
        usage="--model_name_or_path MODEL --dataset_name DATASET --output_dir FOLDER [options]",
        description="Distil a student from a teacher that sees visual cues. Accepts the options of TRL's scripts, "
        "DistillationConfig and TrainingArguments, and all of `accelerate launch`, e.g. --num_processes.",
        examples="""
            # train LoRA and the module; without `--use_peft …` the module alone
            trl-vicur train --model_name_or_path Qwen/Qwen3-VL-2B-Instruct --dataset_name geometry-cues \\
                --use_peft --lora_r 16 --lora_alpha 32 --learning_rate 1e-4 --output_dir Qwen3-VL-2B-ViCuR
            # LoRA alone
            trl-vicur train … --use_peft --lora_r 16 --lora_alpha 32 --cue_recovery false
            # options from a file, one of them overridden, on eight GPUs
            trl-vicur train --config vicur_geometry3k.yaml --dataset_name me/geometry3k-with-cues --num_processes 8
            # FSDP2 with TRL's configuration of accelerate (or a file of yours)
            trl-vicur train --config vicur_geometry3k.yaml --accelerate_config fsdp2
            # before you rent a GPU: check this machine, the options and every row
            trl-vicur doctor --config vicur_geometry3k.yaml
        """,
    )
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
        # Let the parser check these, so that a missing one is reported before errors in other options
        action.required = action.dest in REQUIRED
    parser.show_first("models, data and output", ["help", "config", *HELP, "output_dir"])
    parser.show_first("the teacher and the loss (ViCuRConfig)", ViCuRConfig.__annotations__)
    parser.show_first("the student's module (CueRecoveryConfig)", CueRecoveryArguments.__annotations__)
    parser._optionals.title = "all other options (ModelConfig, DistillationConfig, TrainingArguments)"
    return parser


def make_peft_config(model_args: ModelConfig, recovery_args: CueRecoveryArguments) -> PeftConfig | None:
    """Make the config of the recovery module with TRL's LoRA options; without the module, TRL's own adapter config."""
    lora_config = get_peft_config(model_args)
    if not recovery_args.cue_recovery:
        return lora_config
    lora = {}
    if lora_config is not None:
        lora = {each.name: getattr(lora_config, each.name) for each in fields(LoraConfig) if each.init}
        if model_args.lora_target_modules is None:  # the module's default: all linear layers of the decoder
            del lora["target_modules"]
        if model_args.lora_task_type == ModelConfig.lora_task_type:  # TRL's default, for language models
            lora["task_type"] = None  # PEFT's `AutoPeftModel` refuses adapters that have one
    return CueRecoveryConfig(
        layer_interval=recovery_args.layer_interval,
        sink_token=recovery_args.sink_token,
        num_heads=recovery_args.num_heads,
        bottleneck_size=recovery_args.bottleneck_size,
        train_base=recovery_args.train_base,
        **lora,
    )


def load_datasets(script_args: ScriptArguments, training_args: ViCuRConfig) -> dict[str, Dataset | IterableDataset]:
    """Load the trainer's `train_dataset` and, if evaluation is enabled, its `eval_dataset`."""
    name = script_args.dataset_name
    assert name is not None  # the callers check it
    splits = {"train_dataset": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        splits["eval_dataset"] = script_args.dataset_test_split
    columns = parse_columns(training_args.columns)
    training_args.columns = None  # the trainer gets datasets with TRL's columns
    return {
        key: load_rows(name, script_args.dataset_config, split, script_args.dataset_streaming, columns)[0]
        for key, split in splits.items()
    }


def make_trainer(
    script_args: ScriptArguments,
    model_args: ModelConfig,
    training_args: ViCuRConfig,
    recovery_args: CueRecoveryArguments,
) -> ViCuRTrainer:
    """
    Make the trainer, which checks its datasets and loads its models.

    Raises:
        `ValueError` or `OSError`: If an option, a model or a row of a dataset is refused.
    """
    assert model_args.model_name_or_path is not None  # the parser requires it
    model_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    teacher_kwargs = {**model_kwargs, "revision": training_args.teacher_model_revision}
    init_kwargs, teacher_init_kwargs = training_args.model_init_kwargs, training_args.teacher_model_init_kwargs
    # `TrainingArguments` has parsed strings
    assert isinstance(init_kwargs, dict | None) and isinstance(teacher_init_kwargs, dict | None)
    training_args.model_init_kwargs = {**model_kwargs, **(init_kwargs or {})}
    if training_args.teacher_model_name_or_path is not None:
        training_args.teacher_model_init_kwargs = {**teacher_kwargs, **(teacher_init_kwargs or {})}
    datasets = load_datasets(script_args, training_args)
    return ViCuRTrainer(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=datasets["train_dataset"],
        eval_dataset=datasets.get("eval_dataset"),
        quantization_config=get_quantization_config(model_args),
        peft_config=make_peft_config(model_args, recovery_args),
    )


def main(
    script_args: ScriptArguments,
    model_args: ModelConfig,
    training_args: ViCuRConfig,
    recovery_args: CueRecoveryArguments,
) -> None:
    """Train and save the model, and push it to the Hub if requested."""
    try:
        trainer = make_trainer(script_args, model_args, training_args, recovery_args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(report(error))
    try:
        trainer.train(resume_from_checkpoint=read_resume_option(training_args))
    except CheckpointError as error:
        sys.exit(report(error))
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()


def read_resume_option(training_args: ViCuRConfig) -> str | bool | None:
    """`resume_from_checkpoint`, with "true" and "false" from the command line read as booleans, not as folders."""
    value = training_args.resume_from_checkpoint
    return {"true": True, "false": False}.get(str(value).lower(), value)


def parse_launch_arguments(options: list[str], training_arguments: Iterable[str] = ()) -> argparse.Namespace:
    """
    Parse the options that are meant for `accelerate launch`.

    Args:
        options (`list[str]`):
            Options that the training parser does not know.
        training_arguments (iterable of `str`, *optional*):
            Training options, which `accelerate launch` passes on to this module.

    Raises:
        `ValueError`: If `accelerate launch` does not know one of the options either.
    """
    launch_args, unknown = launch_command_parser().parse_known_args(
        ["--quiet", *resolve_accelerate_config_argument(options), "--module", __name__, *training_arguments]
    )
    if unknown or launch_args.training_script != __name__:
        raise ValueError(
            f"Neither the training nor `accelerate launch` knows all of these options: {' '.join(options)}. "
            "`trl-vicur train --help` and `accelerate launch --help` list them."
        )
    if launch_args.config_file is None and (launch_args.cpu or not os.path.isfile(default_config_file)):
        set_launch_defaults(launch_args)
    return launch_args


def set_launch_defaults(launch_args: argparse.Namespace) -> None:
    """
    Set the defaults that `accelerate launch` uses without a configuration file, so that it does not warn about them at
    every start. On CPUs, start as many processes as requested; `accelerate launch` would start only one.
    """
    launch_args.num_processes = launch_args.num_processes or max(1, torch.accelerator.device_count())
    launch_args.num_machines = launch_args.num_machines or 1
    launch_args.mixed_precision = launch_args.mixed_precision or "no"  # `--bf16` and `--fp16` override it
    launch_args.dynamo_backend = launch_args.dynamo_backend or "no"
    others = ("tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "mpirun_hostfile")
    if launch_args.num_processes > 1 and not any(getattr(launch_args, name) for name in others):
        launch_args.multi_gpu = True  # accelerate's name for several processes, on CPUs as well
        if launch_args.cpu or not torch.accelerator.is_available():
            launch_args.cpu = False
            launch_args.training_script_args.append("--use_cpu")


def train(arguments: list[str]) -> None:
    """Run `trl-vicur train`: launch this module with accelerate."""
    script_args, model_args, *_, of_config, of_command_line = make_parser().parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    for name, value in zip(REQUIRED, (model_args.model_name_or_path, script_args.dataset_name), strict=True):
        if value is None:
            raise ValueError(f"`--{name}` is missing, on the command line and in the `--config` file.")
    # Options that the training parser does not know are for accelerate. Remove them, in order, from the command line
    left = deque(of_command_line)
    training_arguments = []
    for argument in arguments:
        if left and argument == left[0]:
            left.popleft()
        else:
            training_arguments.append(argument)
    launch_args = parse_launch_arguments(of_config + of_command_line, training_arguments)
    try:
        launch_command(launch_args)
    except ChildFailedError as error:  # raised by torchrun if one of several processes fails
        sys.exit(next(iter(error.failures.values())).exitcode)


if __name__ == "__main__":
    # Unknown options in the `--config` file are for accelerate; `train` has checked them
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
