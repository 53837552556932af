"""
Training from the command line.

    trl-vicur train --config vicur.yaml
    accelerate launch --module trl_vicur.train --config vicur.yaml

The first is the second with what `accelerate launch` needs found among the arguments.
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
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from .cli import report
from .command_parser import CommandParser
from .cue_recovery import CueRecoveryConfig
from .data.loading import load_split
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


# TRL's words for these speak of mixtures of datasets, which are not offered here
HELP = {
    "model_name_or_path": "Id or folder of the model that becomes the student.",
    "teacher_model_name_or_path": "Id or folder of a larger teacher. By default the student teaches itself.",
    "dataset_name": "Id on the Hub, a folder that `trl-vicur cues generate` or `save_to_disk` made, or a file of JSON "
    "lines, CSV or Parquet.",
    "dataset_config": "Configuration of a dataset on the Hub.",
    "dataset_train_split": "Split to train on.",
    "dataset_test_split": "Split to evaluate on, with `--eval_strategy`.",
    "dataset_streaming": "Whether to read rows when they are trained on; they are checked then.",
}
REQUIRED = ("model_name_or_path", "dataset_name")
TRAINING_ARGUMENTS = [ScriptArguments, ModelConfig, ViCuRConfig, CueRecoveryArguments]


def make_parser(prog: str = "trl-vicur train") -> CommandParser:
    """The parser of all training options: TRL's of scripts and models, `ViCuRConfig`'s, and the module's."""
    parser = CommandParser(
        TRAINING_ARGUMENTS,
        prog=prog,
        usage="--model_name_or_path MODEL --dataset_name DATASET --output_dir FOLDER [options]",
        description="Distil a student from a teacher that sees visual cues. Takes the options of TRL's scripts, "
        "DistillationConfig and TrainingArguments, and whatever `accelerate launch` takes, e.g. --num_processes.",
        examples="""
            # an adapter of LoRA and the module; without `--use_peft …` the module alone
            trl-vicur train --model_name_or_path Qwen/Qwen3-VL-2B-Instruct --dataset_name geometry-cues \\
                --use_peft --lora_r 16 --lora_alpha 32 --learning_rate 1e-4 --output_dir Qwen3-VL-2B-ViCuR
            # LoRA alone
            trl-vicur train … --use_peft --lora_r 16 --lora_alpha 32 --cue_recovery false
            # options from a file, some of them replaced, on eight GPUs
            trl-vicur train --config vicur_geometry3k.yaml --dataset_name me/geometry3k-with-cues --num_processes 8
            # FSDP2 with TRL's own configuration of accelerate (or a file of yours)
            trl-vicur train --config vicur_geometry3k.yaml --accelerate_config fsdp2
            # before a GPU is rented: is this machine fit, and every row?
            trl-vicur doctor --config vicur_geometry3k.yaml
        """,
    )
    for action in parser._actions:
        action.help = HELP.get(action.dest, action.help)
        # Here, so that they are missed before anything is made of the other options
        action.required = action.dest in REQUIRED
    parser.show_first("what is trained, and on what", ["help", "config", *HELP, "output_dir"])
    parser.show_first("the teacher and the loss (ViCuRConfig)", ViCuRConfig.__annotations__)
    parser.show_first("the student's module (CueRecoveryConfig)", CueRecoveryArguments.__annotations__)
    parser._optionals.title = "all else (ModelConfig, DistillationConfig, TrainingArguments)"
    return parser


def make_peft_config(model_args: ModelConfig, recovery_args: CueRecoveryArguments) -> PeftConfig | None:
    """The module with TRL's LoRA options; TRL's own adapter without the module."""
    lora_config = get_peft_config(model_args)
    if not recovery_args.cue_recovery:
        return lora_config
    lora = {}
    if lora_config is not None:
        lora = {each.name: getattr(lora_config, each.name) for each in fields(LoraConfig) if each.init}
        if model_args.lora_target_modules is None:  # by default all linear layers of the decoder
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


def load_datasets(
    script_args: ScriptArguments, training_args: ViCuRConfig
) -> dict[str, Dataset | IterableDataset | None]:
    """The trainer's `train_dataset` and, where it is evaluated on, its `eval_dataset`."""
    splits = {"train_dataset": script_args.dataset_train_split}
    if training_args.eval_strategy != "no":
        splits["eval_dataset"] = script_args.dataset_test_split
    return {
        name: load_split(script_args.dataset_name, script_args.dataset_config, split, script_args.dataset_streaming)
        for name, split in splits.items()
    }


def make_trainer(
    script_args: ScriptArguments,
    model_args: ModelConfig,
    training_args: ViCuRConfig,
    recovery_args: CueRecoveryArguments,
) -> ViCuRTrainer:
    """
    The trainer, with its datasets checked and its models loaded.

    Raises:
        `ValueError` or `OSError`: If an option, a model or a row of a dataset is refused.
    """
    model_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    training_args.model_init_kwargs = {**model_kwargs, **(training_args.model_init_kwargs or {})}
    if training_args.teacher_model_name_or_path is not None:
        teacher_kwargs = {**model_kwargs, "revision": training_args.teacher_model_revision}
        training_args.teacher_model_init_kwargs = {
            **teacher_kwargs,
            **(training_args.teacher_model_init_kwargs or {}),
        }
    return ViCuRTrainer(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        args=training_args,
        **load_datasets(script_args, training_args),
        quantization_config=get_quantization_config(model_args),
        peft_config=make_peft_config(model_args, recovery_args),
    )


def main(
    script_args: ScriptArguments,
    model_args: ModelConfig,
    training_args: ViCuRConfig,
    recovery_args: CueRecoveryArguments,
) -> None:
    """Train, save and, where it is wanted, push."""
    try:
        trainer = make_trainer(script_args, model_args, training_args, recovery_args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(report(error))
    resume_from_checkpoint = training_args.resume_from_checkpoint  # a text on the command line
    resume_from_checkpoint = {"true": True, "false": False}.get(
        str(resume_from_checkpoint).lower(), resume_from_checkpoint
    )
    try:
        trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except CheckpointError as error:
        sys.exit(report(error))
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.accelerator.end_training()


def parse_launch_arguments(options: list[str], training_arguments: Iterable[str] = ()) -> argparse.Namespace:
    """
    What `accelerate launch` is told.

    Args:
        options (`list[str]`):
            Options that are none of the training's.
        training_arguments (iterable of `str`, *optional*):
            Options for this module, which it launches.

    Raises:
        `ValueError`: If it does not know one of the options either.
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
    What `accelerate launch` takes without a file, but that it would tell of at every start; and on CPUs as many
    processes as are asked for, where it would start one.
    """
    launch_args.num_processes = launch_args.num_processes or max(1, torch.accelerator.device_count())
    launch_args.num_machines = launch_args.num_machines or 1
    launch_args.mixed_precision = launch_args.mixed_precision or "no"  # `--bf16` and `--fp16` replace it
    launch_args.dynamo_backend = launch_args.dynamo_backend or "no"
    others = ("tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "mpirun_hostfile")
    if launch_args.num_processes > 1 and not any(getattr(launch_args, name) for name in others):
        launch_args.multi_gpu = True  # its name for several processes
        if launch_args.cpu or not torch.accelerator.is_available():
            launch_args.cpu = False
            launch_args.training_script_args.append("--use_cpu")


def train(arguments: list[str]) -> None:
    """Runs `trl-vicur train`: this module, under `accelerate launch`."""
    script_args, model_args, *_, of_config, of_command_line = make_parser().parse_args_and_config(
        arguments, return_remaining_strings=True, separate_remaining_strings=True
    )
    for name, value in zip(REQUIRED, (model_args.model_name_or_path, script_args.dataset_name), strict=True):
        if value is None:
            raise ValueError(f"`--{name}` is missing, on the command line and in the file of `--config`.")
    # What the training does not know is for accelerate; in the command line it is taken out, in its order
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
    except ChildFailedError as error:  # torchrun's, when a process of several has failed
        sys.exit(next(iter(error.failures.values())).exitcode)


if __name__ == "__main__":
    # What the file of `--config` has beyond these options is for accelerate, and was looked at by `train`
    main(*make_parser().parse_args_and_config(fail_with_unknown_args=False))
