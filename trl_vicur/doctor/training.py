"""Find what the trainer would refuse, without loading a model's weights."""

import argparse
from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

import torch
from accelerate.commands.launch import _validate_launch_command
from accelerate.utils import is_deepspeed_available
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from datasets import IterableDataset
from peft import PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from trl.scripts.utils import ScriptArguments
from trl.trainer.model_config import ModelConfig
from trl.trainer.utils import get_quantization_config

from ..command_parser import CommandParser
from ..cue_recovery import CueRecoveryConfig
from ..hub.names import naming_model
from ..train import (
    TRAINING_ARGUMENTS,
    CueRecoveryArguments,
    load_datasets,
    make_peft_config,
    parse_launch_arguments,
    read_resume_option,
)
from ..trainer import ViCuRConfig
from ..trainer.checkpoints import check_checkpoint
from ..trainer.checks.datasets import find_bad_rows
from ..trainer.checks.options import check_compilation, check_options, check_something_trains
from ..trainer.checks.rows import RowChecker
from ..trainer.checks.sharding import Sharding, find_sharding
from ..trainer.lm_head import check_head
from ..trainer.teachers.teacher_server import TeacherServer


# Options that `--help` shows. All other options of `trl-vicur train` are also accepted, so that its files work here
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
    The training run that `accelerate launch` would start.

    Args:
        num_processes (`int`):
            Number of processes.
        sharding (`str`, *optional*):
            How the processes would shard the weights.
        dynamo_backend (`str`, *optional*, defaults to `"no"`):
            Backend of `torch.compile`, if `accelerate launch` would enable it.
    """

    num_processes: int
    sharding: Sharding | None
    dynamo_backend: str = "no"

    @classmethod
    def from_arguments(cls, launch_args: argparse.Namespace) -> "LaunchPlan":
        """
        Read the arguments of `accelerate launch`, and its configuration file.

        Raises:
            `ValueError` or `OSError`: If `accelerate launch` would not start.
        """
        launch_args, *_ = _validate_launch_command(launch_args)
        num_processes, sharding = launch_args.num_processes, None
        if launch_args.cpu:
            num_processes = 1
        elif launch_args.use_deepspeed:
            is_zero3 = launch_args.zero_stage == 3
            if launch_args.deepspeed_config_file is not None:
                is_zero3 = HfDeepSpeedConfig(launch_args.deepspeed_config_file).is_zero3()
            sharding = "ZeRO-3" if is_zero3 else "DeepSpeed"
        elif launch_args.use_fsdp:
            sharding = f"FSDP{launch_args.fsdp_version}"
        elif not launch_args.multi_gpu:
            num_processes = 1
        return cls(num_processes, sharding, launch_args.dynamo_backend or "no")


def parse_arguments(
    arguments: list[str],
) -> tuple[ScriptArguments, ModelConfig, ViCuRConfig, CueRecoveryArguments, LaunchPlan]:
    """
    Parse the arguments of `trl-vicur doctor`: those of `trl-vicur train`, with short names for two of them.
    """
    parser = CommandParser(
        TRAINING_ARGUMENTS,
        prog="trl-vicur doctor",
        usage="[--config FILE] [--model MODEL] [--dataset DATASET] [options]",
        description="Report what is installed and what this machine can do; and, for a model and a dataset, whether "
        "training would start: check options and teacher, build the model without its weights, attach the adapter, "
        "and check every row as the trainer does. Needs no GPU. Accepts all options of `trl-vicur train`, including "
        "those for accelerate; the ones below matter here. The exit status is 1 if anything would stop training.",
        examples="""
            # this machine
            trl-vicur doctor
            # this machine, and every row of a dataset
            trl-vicur doctor --dataset geometry-cues --model Qwen/Qwen3-VL-2B-Instruct --max_completion_length 2048
            # the options of a training run
            trl-vicur doctor --config vicur_geometry3k.yaml --dataset me/geometry3k-with-cues
        """,
    )
    for action in parser._actions:
        if action.dest not in SHOWN:
            action.help = argparse.SUPPRESS
    for name, dest in (("--model", "model_name_or_path"), ("--dataset", "dataset_name")):
        parser.add_argument(name, dest=dest, default=argparse.SUPPRESS, help=f"The same as `--{dest}`.")
    # Add `--use_cpu`, so that a machine without a GPU does not refuse options for GPUs
    *training_arguments, of_launch = parser.parse_args_and_config(
        [*arguments, "--use_cpu"], return_remaining_strings=True
    )
    return *training_arguments, LaunchPlan.from_arguments(parse_launch_arguments(of_launch))


class TrainingCheck:
    """
    Checks a training run before it starts.

    Args:
        script_args ([`~trl.ScriptArguments`]), model_args ([`~trl.ModelConfig`]), training_args ([`ViCuRConfig`]) and
            recovery_args ([`CueRecoveryArguments`]):
            Options of the training run.
        launch_plan ([`LaunchPlan`]):
            The processes that would be launched.

    Raises:
        `ValueError`: If the trainer would refuse the models, the options, the teacher's server, or the checkpoint to
            resume from.
        `OSError`: If the model or the dataset does not exist, or if the teacher's server cannot be reached.
        `ImportError`: If a package that the options need is missing.
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
        assert name is not None  # the caller checks it
        with naming_model(name):
            trusts_code = training_args.trust_remote_code
            self.config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trusts_code)
            self.processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=trusts_code)
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
        check_compilation(training_args, launch_plan.dynamo_backend)
        checkpoint = read_resume_option(training_args)
        if isinstance(checkpoint, str):
            check_checkpoint(checkpoint)
        if self.sharding in ("DeepSpeed", "ZeRO-3") and not is_deepspeed_available():
            raise ImportError(
                "DeepSpeed is not installed. Install it with `pip install deepspeed`, or use FSDP2 or DDP."
            )
        self.max_length = self.config.get_text_config().max_position_embeddings
        if training_args.teacher_model_server_url is not None:
            training_args.vllm_server_timeout = (
                0.0  # fail at once instead of waiting for the server, as training would
            )
            server = TeacherServer.from_config(training_args, self.processor, teacher)
            self.max_length = min(self.max_length, server.max_length)

    def describe_model(self) -> list[tuple[str, str]]:
        """
        Report the model's size and its trainable part, from a model without weights to which the adapter is attached.

        Raises:
            `ValueError`: If the adapter cannot be attached, or if the losses cannot compute the model's logits.
        """
        adapter = self.peft_config
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(
                self.config, trust_remote_code=self.training_args.trust_remote_code
            )
            size = sum(parameter.numel() for parameter in model.parameters())
            trained = "all of them"
            if adapter is not None:
                if isinstance(adapter, CueRecoveryConfig):
                    adapter.resolve_sink_token(self.processor)
                model = get_peft_model(model, adapter)
                if isinstance(model.get_output_embeddings(), BaseTunerLayer):
                    raise ValueError(
                        "The adapter has LoRA on `lm_head`, which TRL refuses: its losses read the weight of the head "
                        "itself. Leave `lm_head` out of `lora_target_modules`."
                    )
                check_something_trains(model)
                number = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
                trained = f"{number / 1e6:,.1f}M, {PeftType(adapter.peft_type).value}"
        check_head(model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        return [
            ("architecture", type(base).__name__),
            ("parameters", f"{size / 1e6:,.1f}M"),
            ("trained", trained),
            ("context", f"{self.max_length:,} tokens"),
        ]

    def describe_datasets(self) -> list[tuple[str, str]]:
        """Report the number of rows in each dataset and per step."""
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
        """Number of rows of the training dataset in a step, over all processes."""
        args = self.training_args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * self.num_processes

    def find_bad_rows(self) -> Iterator[ValueError]:
        """
        Errors for a dataset with too few rows, and for each row that cannot be trained on.

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
