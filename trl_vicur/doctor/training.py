"""What the trainer would refuse, found without a model's weights."""

import argparse
from collections.abc import Iterator
from dataclasses import fields

import torch
from accelerate.commands.config import load_config_from_file
from accelerate.utils import DistributedType
from datasets import IterableDataset
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, ScriptArguments

from ..command_parser import CommandParser
from ..cue_recovery import CueRecoveryConfig
from ..train import TRAINING_ARGUMENTS, CueRecoveryArguments, load_datasets, make_peft_config, parse_launch_arguments
from ..trainer import ViCuRConfig, ViCuRTrainer
from ..trainer.dataset_validation import RowChecker, find_bad_rows


# Options that `--help` shows. The others of `trl-vicur train` are understood as well, since they may stand in its file
SHOWN = {
    *("help", "config", "model_name_or_path", "model_revision", "max_completion_length", "chat_template_kwargs"),
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "eval_strategy"),
    *("privilege", "cue_column", "answer_column", "missing_privilege", "teacher_prompt_template"),
    *(field.name for field in fields(CueRecoveryArguments)),
}


def parse_arguments(
    arguments: list[str],
) -> tuple[ScriptArguments, ModelConfig, ViCuRConfig, CueRecoveryArguments, int]:
    """
    The arguments of `trl-vicur doctor`: those of `trl-vicur train`, two of them with a short name, too; and the number
    of processes that would train.
    """
    parser = CommandParser(
        TRAINING_ARGUMENTS,
        prog="trl-vicur doctor",
        usage="[--config FILE] [--model MODEL] [--dataset DATASET] [options]",
        description="Tell what is installed and what this machine can do; and, for a model and a dataset, whether a "
        "training would start: the model is built without its weights, the adapter is attached, and every row is "
        "checked as the trainer does it. Needs no GPU. All options of `trl-vicur train` are understood; those below "
        "matter here. The exit status is 1 if something would stop a training.",
        examples="""
            # this machine
            trl-vicur doctor
            # and every row of a dataset
            trl-vicur doctor --dataset geometry-cues --model Qwen/Qwen3-VL-2B-Instruct --max_completion_length 2048
            # what a training is going to be given
            trl-vicur doctor --config vicur_geometry3k.yaml --dataset me/geometry3k-with-cues
        """,
    )
    for action in parser._actions:
        if action.dest not in SHOWN:
            action.help = argparse.SUPPRESS
    for name, dest in (("--model", "model_name_or_path"), ("--dataset", "dataset_name")):
        parser.add_argument(name, dest=dest, default=argparse.SUPPRESS, help=f"The same as `--{dest}`.")
    # Options for a GPU are no errors where there is none yet
    *training_arguments, of_launch = parser.parse_args_and_config(
        [*arguments, "--use_cpu"], return_remaining_strings=True
    )
    launch_args = parse_launch_arguments(of_launch)
    num_processes = launch_args.num_processes
    if num_processes is None and launch_args.config_file is not None:
        launch_config = load_config_from_file(launch_args.config_file)
        if launch_config.distributed_type != DistributedType.NO:
            num_processes = launch_config.num_processes
    return *training_arguments, num_processes or 1


class TrainingCheck:
    """
    A training that is looked at before it is begun.

    Args:
        script_args ([`~trl.ScriptArguments`]), model_args ([`~trl.ModelConfig`]), training_args ([`ViCuRConfig`]) and
            recovery_args ([`CueRecoveryArguments`]):
            Its options.
        num_processes (`int`):
            How many processes would train.

    Raises:
        `ValueError`: If the trainer would refuse the model or the options.
    """

    def __init__(
        self,
        script_args: ScriptArguments,
        model_args: ModelConfig,
        training_args: ViCuRConfig,
        recovery_args: CueRecoveryArguments,
        num_processes: int,
    ):
        self.training_args = training_args
        self.num_processes = num_processes
        name = {"pretrained_model_name_or_path": model_args.model_name_or_path, "revision": model_args.model_revision}
        self.config = AutoConfig.from_pretrained(**name)
        self.processor = AutoProcessor.from_pretrained(**name)
        self.peft_config = make_peft_config(model_args, recovery_args)
        self.datasets = {} if script_args.dataset_name is None else load_datasets(script_args, training_args)
        ViCuRTrainer.check_arguments(
            self.config,
            training_args.teacher_model_name_or_path,
            training_args,
            self.datasets.get("train_dataset"),
            self.processor,
            [self.peft_config] if isinstance(self.peft_config, CueRecoveryConfig) else [],
        )

    def describe_model(self) -> list[tuple[str, str]]:
        """
        The model's size and what of it trains, from a model without weights that the adapter is attached to.

        Raises:
            `ValueError`: If the adapter cannot be attached.
        """
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(self.config)
            size = sum(parameter.numel() for parameter in model.parameters())
            trained = "all of them"
            if self.peft_config is not None:
                if isinstance(self.peft_config, CueRecoveryConfig):
                    self.peft_config.resolve_sink_token(
                        self.processor, **(self.training_args.chat_template_kwargs or {})
                    )
                model = get_peft_model(model, self.peft_config)
                number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
                trained = f"{number / 1e6:,.1f}M, {self.peft_config.peft_type.value}"
        return [
            ("architecture", type(model.get_base_model() if self.peft_config else model).__name__),
            ("parameters", f"{size / 1e6:,.1f}M"),
            ("trained", trained),
            ("context", f"{self.config.get_text_config().max_position_embeddings:,} tokens"),
        ]

    def describe_datasets(self) -> list[tuple[str, str]]:
        """How many rows each dataset has, and how many a step takes."""
        args = self.training_args
        factors = (args.per_device_train_batch_size, args.gradient_accumulation_steps, self.num_processes)
        return [
            *(
                (name, "streamed: its rows are checked when they are trained on")
                if isinstance(dataset, IterableDataset)
                else (name, f"{len(dataset):,} rows")
                for name, dataset in self.datasets.items()
            ),
            (
                "each step",
                "{:,} rows: {} at a time, {} time(s), in {} process(es)".format(self.rows_per_step, *factors),
            ),
        ]

    @property
    def rows_per_step(self) -> int:
        """How many rows of the training dataset a step takes, over all processes."""
        args = self.training_args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.num_processes

    def find_bad_rows(self) -> Iterator[ValueError]:
        """
        The errors of too few rows, and of each row that cannot be trained on.

        Raises:
            `ValueError`: If a column is missing.
        """
        checker = RowChecker(self.training_args, self.processor, self.config.get_text_config().max_position_embeddings)
        for name, dataset in self.datasets.items():
            min_rows = self.rows_per_step if name == "train_dataset" else 1
            yield from find_bad_rows(dataset, name, checker, self.training_args, min_rows)
