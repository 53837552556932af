"""What the trainer would refuse, found without a model's weights."""

import argparse
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

import torch
from accelerate.commands.launch import _validate_launch_command
from accelerate.utils import is_deepspeed_available
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from datasets import IterableDataset
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl import ModelConfig, ScriptArguments, get_quantization_config

from ..command_parser import CommandParser
from ..cue_recovery import CueRecoveryConfig
from ..hub.names import naming_model
from ..train import TRAINING_ARGUMENTS, CueRecoveryArguments, load_datasets, make_peft_config, parse_launch_arguments
from ..trainer import ViCuRConfig
from ..trainer.checks.datasets import find_bad_rows
from ..trainer.checks.options import check_options, check_something_trains
from ..trainer.checks.rows import RowChecker
from ..trainer.checks.sharding import Sharding, find_sharding
from ..trainer.teachers.teacher_server import TeacherServer


# Options that `--help` shows. The others of `trl-vicur train` are understood as well, since they may stand in its file
SHOWN = {
    *("help", "config", "model_name_or_path", "model_revision", "max_completion_length", "chat_template_kwargs"),
    *("dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "eval_strategy"),
    *("teacher_model_name_or_path", "teacher_model_server_url", "teacher_model_kind", "use_vllm", "load_in_4bit"),
    *("privilege", "cue_column", "answer_column", "missing_privilege", "teacher_prompt_template"),
    "dataset_num_proc",
    *(field.name for field in fields(CueRecoveryArguments)),
}


class LaunchPlan(NamedTuple):
    """
    What `accelerate launch` would start.

    Args:
        num_processes (`int`):
            How many processes would train.
        sharding (`str`, *optional*):
            How they would share the weights among them.
    """

    num_processes: int
    sharding: Sharding | None

    @classmethod
    def from_arguments(cls, launch_args: argparse.Namespace) -> "LaunchPlan":
        """
        From the arguments of `accelerate launch`, and the file that they may name.

        Raises:
            `ValueError` or `OSError`: If it would not start.
        """
        launch_args, *_ = _validate_launch_command(launch_args)
        if launch_args.cpu:
            return cls(1, None)
        if launch_args.use_deepspeed:
            is_zero3 = launch_args.zero_stage == 3
            if launch_args.deepspeed_config_file is not None:
                is_zero3 = HfDeepSpeedConfig(launch_args.deepspeed_config_file).is_zero3()
            return cls(launch_args.num_processes, "ZeRO-3" if is_zero3 else "DeepSpeed")
        if launch_args.use_fsdp:
            return cls(launch_args.num_processes, f"FSDP{launch_args.fsdp_version}")
        return cls(launch_args.num_processes if launch_args.multi_gpu else 1, None)


def parse_arguments(
    arguments: list[str],
) -> tuple[ScriptArguments, ModelConfig, ViCuRConfig, CueRecoveryArguments, LaunchPlan]:
    """
    The arguments of `trl-vicur doctor`: those of `trl-vicur train`, two of them with a short name, too; and what would
    be launched.
    """
    parser = CommandParser(
        TRAINING_ARGUMENTS,
        prog="trl-vicur doctor",
        usage="[--config FILE] [--model MODEL] [--dataset DATASET] [options]",
        description="Tell what is installed and what this machine can do; and, for a model and a dataset, whether a "
        "training would start: options and teacher are looked at, the model is built without its weights, the adapter "
        "is attached, and every row is checked as the trainer does it. Needs no GPU. All options of `trl-vicur train` "
        "are understood, those for accelerate as well; those below matter here. The exit status is 1 if something "
        "would stop a training.",
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
    return *training_arguments, LaunchPlan.from_arguments(parse_launch_arguments(of_launch))


class TrainingCheck:
    """
    A training that is looked at before it is begun.

    Args:
        script_args ([`~trl.ScriptArguments`]), model_args ([`~trl.ModelConfig`]), training_args ([`ViCuRConfig`]) and
            recovery_args ([`CueRecoveryArguments`]):
            Its options.
        launch_plan ([`LaunchPlan`]):
            What would be launched.

    Raises:
        `ValueError`: If the trainer would refuse the models or the options, or the teacher's server.
        `OSError`: If there is no such model or dataset, or if the teacher's server cannot be reached.
        `ImportError`: If a package is missing that the options ask for.
    """

    def __init__(
        self,
        script_args: ScriptArguments,
        model_args: ModelConfig,
        training_args: ViCuRConfig,
        recovery_args: CueRecoveryArguments,
        launch_plan: LaunchPlan,
    ):
        self.training_args = training_args
        self.num_processes = launch_plan.num_processes
        self.sharding = launch_plan.sharding or find_sharding(training_args)
        name, revision = model_args.model_name_or_path, model_args.model_revision
        with naming_model(name):
            options = {"revision": revision, "trust_remote_code": training_args.trust_remote_code}
            self.config = AutoConfig.from_pretrained(name, **options)
            self.processor = AutoProcessor.from_pretrained(name, **options)
        self.peft_config = make_peft_config(model_args, recovery_args)
        self.datasets = {} if script_args.dataset_name is None else load_datasets(script_args, training_args)
        teacher = training_args.teacher_model_name_or_path
        check_options(
            training_args,
            name,
            self.config,
            self.processor,
            teacher_model=teacher,
            train_dataset=self.datasets.get("train_dataset"),
            peft_config=self.peft_config,
            quantization_config=get_quantization_config(model_args),
            sharding=self.sharding,
        )
        if self.sharding in ("DeepSpeed", "ZeRO-3") and not is_deepspeed_available():
            raise ImportError(
                "DeepSpeed is not installed. Install it with `pip install deepspeed`, or use FSDP2 or DDP."
            )
        self.max_length = self.config.get_text_config().max_position_embeddings
        if training_args.teacher_model_server_url is not None:
            training_args.vllm_server_timeout = 0.0  # a training would wait for it
            server = TeacherServer.from_config(training_args, self.processor, teacher)
            self.max_length = min(self.max_length, server.max_length)

    def describe_model(self) -> list[tuple[str, str]]:
        """
        The model's size and what of it trains, from a model without weights that the adapter is attached to.

        Raises:
            `ValueError`: If the adapter cannot be attached.
        """
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                self.config, trust_remote_code=self.training_args.trust_remote_code
            )
            size = sum(parameter.numel() for parameter in model.parameters())
            trained = "all of them"
            if self.peft_config is not None:
                if isinstance(self.peft_config, CueRecoveryConfig):
                    self.peft_config.resolve_sink_token(self.processor)
                model = get_peft_model(model, self.peft_config)
                if isinstance(model.get_output_embeddings(), BaseTunerLayer):
                    raise ValueError(
                        "The adapter has LoRA on `lm_head`, which TRL refuses: its losses read the weight of the head "
                        "itself. Leave `lm_head` out of `lora_target_modules`."
                    )
                check_something_trains(model)
                number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
                trained = f"{number / 1e6:,.1f}M, {self.peft_config.peft_type.value}"
        return [
            ("architecture", type(model.get_base_model() if self.peft_config else model).__name__),
            ("parameters", f"{size / 1e6:,.1f}M"),
            ("trained", trained),
            ("context", f"{self.max_length:,} tokens"),
        ]

    def describe_datasets(self) -> list[tuple[str, str]]:
        """How many rows each dataset has, and how many a step takes."""
        args = self.training_args
        factors = (args.per_device_train_batch_size, args.gradient_accumulation_steps, self.num_processes)
        return [
            *(
                (name, "streamed: its rows are checked as they are used")
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
        checker = RowChecker(
            self.training_args,
            self.processor,
            self.max_length,
            is_sharded=self.sharding is not None,
            recovery_configs=[self.peft_config] if isinstance(self.peft_config, CueRecoveryConfig) else [],
        )
        for name, dataset in self.datasets.items():
            min_rows = self.rows_per_step if name == "train_dataset" else 1
            yield from find_bad_rows(dataset, name, checker, self.training_args, min_rows)
