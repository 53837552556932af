"""Refuses unsupported models and combinations of options, before any weights are loaded."""

import os
import warnings
from collections.abc import Callable, Sequence

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.utils.quantization_config import QuantizationMethod
from trl.import_utils import is_vllm_available
from trl.trainer.utils import get_config_model_id

from ...cue_recovery import CueRecoveryConfig
from ...cue_recovery.positions import visual_token_ids
from ...data.teacher_prompt import hint_marker
from ...hub.names import naming_model
from ..vicur_config import ViCuRConfig
from .adapter_base import check_attached_adapters
from .sharding import Sharding, check_sharding
from .thinking import load_thinking_mode, warn_about_thinking, warn_about_thinking_teacher


def check_options(
    args: ViCuRConfig,
    model: "str | PreTrainedModel | PeftModel",
    config: PreTrainedConfig,
    processing_class: ProcessorMixin,
    *,
    teacher_model: str | PreTrainedModel | None = None,
    train_dataset: Dataset | IterableDataset | None = None,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    tools: Sequence[Callable] | None = None,
    sharding: Sharding | None = None,
) -> None:
    """
    Run all checks that need neither weights nor dataset rows. The trainer and `trl-vicur doctor` both call it.

    Args:
        args ([`ViCuRConfig`]):
            Training configuration.
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The student, or its id or path.
        config ([`~transformers.PreTrainedConfig`]):
            The student's configuration.
        processing_class ([`~transformers.ProcessorMixin`]):
            The student's processor.
        teacher_model, train_dataset, peft_config, quantization_config, tools (*optional*):
            The arguments of [`ViCuRTrainer`].
        sharding (`str`, *optional*):
            Result of [`~trl_vicur.trainer.checks.sharding.find_sharding`].

    Raises:
        `ValueError`: If the model or an option is not supported, or if options contradict each other.
        `OSError`: If the teacher's configuration cannot be read.
        `ImportError`: If `use_vllm=True`, but vLLM is not installed.
    """
    peft_configs = adapter_configs(model, peft_config)
    check_student(config, processing_class)
    warn_about_thinking(processing_class, args)
    warn_about_hint_marker(args)
    check_sharding(sharding, args, peft_configs)
    # `accelerate launch --dynamo_backend` sets this variable and compiles without `torch_compile`
    check_compilation(args, os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO"))
    check_choice_of_teacher(args, model, teacher_model, tools)
    check_vllm(args, peft_configs)
    check_quantization(config, quantization_config, peft_configs)
    if teacher_model is not None and args.teacher_model_server_url is None:
        check_separate_teacher(args, teacher_model, config, processing_class)
    check_vocabulary(args, config)
    if isinstance(train_dataset, IterableDataset):
        check_streaming(args)


def adapter_configs(
    model: "str | PreTrainedModel | PeftModel", peft_config: PeftConfig | None
) -> list[PeftConfig | None]:
    """Configs of the student's adapters; `[None]` if there are none and the model's own weights are trained."""
    return [*model.peft_config.values()] if isinstance(model, PeftModel) else [peft_config]


def check_student(config: PreTrainedConfig, processing_class: ProcessorMixin) -> None:
    has_visual_tokens = bool(visual_token_ids(config))
    if not isinstance(processing_class, ProcessorMixin) or not has_visual_tokens:
        raise ValueError(
            f"ViCuRTrainer trains vision-language models, but got a model of type '{config.model_type}' "
            f"{'with' if has_visual_tokens else 'without'} visual tokens and a "
            f"{type(processing_class).__name__}. Use a vision-language model with its processor, or "
            "`trl.DistillationTrainer` for text."
        )
    if processing_class.chat_template is None:
        raise ValueError(
            f"The processor ({type(processing_class).__name__}) has no chat template, which prompts are rendered "
            "with. Use the processor of an instruction-tuned model, or set `processor.chat_template`."
        )


def warn_about_hint_marker(args: ViCuRConfig) -> None:
    if args.privilege != "none" and not hint_marker(args.teacher_prompt_template):
        warnings.warn(
            f"`teacher_prompt_template={args.teacher_prompt_template!r}` has no word before `{{privilege}}` that "
            "would identify a completion that mentions the hint, so `hint_leakage` is not logged. Introduce the "
            "privilege, as in '[Hint]: {privilege}'."
        )


def check_compilation(args: ViCuRConfig, dynamo_backend: str) -> None:
    if args.torch_compile or dynamo_backend.upper() != "NO":
        option = "torch_compile=True" if args.torch_compile else f"dynamo_backend={dynamo_backend}"
        raise ValueError(
            f"`{option}` is not supported: TRL replaces the compiled forward with one that calls the backbone, so no "
            "layer would run compiled, and TRL cannot find the adapter of a compiled model. Leave the option out."
        )


def check_choice_of_teacher(
    args: ViCuRConfig,
    model: "str | PreTrainedModel | PeftModel",
    teacher_model: str | PreTrainedModel | None,
    tools: Sequence[Callable] | None,
) -> None:
    is_served = args.teacher_model_server_url is not None
    if teacher_model is not None and args.teacher_model_kind != "base":
        raise ValueError(
            f"`teacher_model_kind={args.teacher_model_kind!r}` makes the student its own teacher, but a "
            "`teacher_model` was passed as well. Leave out one of the two."
        )
    if is_served and not isinstance(teacher_model, str | None):
        raise ValueError(
            f"`teacher_model_server_url={args.teacher_model_server_url!r}` is set, but a loaded `teacher_model` "
            f"({type(teacher_model).__name__}) was passed as well. Leave out one of the two."
        )
    if is_served and tools:
        raise ValueError(
            "`tools` with `teacher_model_server_url` are not supported: the images that they return would not reach "
            "the server. Pass the teacher as `teacher_model`."
        )
    teaches_itself = teacher_model is None and not is_served
    if teaches_itself and args.teacher_model_kind == "base" and isinstance(model, PeftModel):
        check_attached_adapters(model.peft_config)


def check_vllm(args: ViCuRConfig, peft_configs: Sequence[PeftConfig | None]) -> None:
    num_modules = sum(isinstance(each, CueRecoveryConfig) for each in peft_configs)
    if args.use_vllm and num_modules > 1:
        raise ValueError(
            f"`use_vllm=True` with {num_modules} recovery modules is not supported: vLLM can run only one. Remove the "
            "other adapters with `model.delete_adapter`."
        )
    if args.use_vllm and not is_vllm_available():
        raise ImportError(
            "`use_vllm=True` needs vLLM, which is not installed. Install it with `pip install 'trl[vllm]'`, or leave "
            "`use_vllm` out to generate rollouts with transformers."
        )


def check_quantization(
    config: PreTrainedConfig,
    quantization_config: BitsAndBytesConfig | None,
    peft_configs: Sequence[PeftConfig | None],
) -> None:
    is_quantized = isinstance(quantization_config, BitsAndBytesConfig) or (
        config.to_dict().get("quantization_config", {}).get("quant_method") == QuantizationMethod.BITS_AND_BYTES
    )
    trains_base = any(each is None or isinstance(each, CueRecoveryConfig) and each.train_base for each in peft_configs)
    if is_quantized and trains_base:
        raise ValueError(
            "The model is quantized by bitsandbytes, but its own weights would be trained, because there is no "
            "adapter or one with `train_base=True`. Quantized weights cannot be trained. Train an adapter without "
            "`train_base` (`r=16` adds LoRA), or load the model without quantization."
        )


def check_separate_teacher(
    args: ViCuRConfig,
    teacher_model: str | PreTrainedModel,
    config: PreTrainedConfig,
    processing_class: ProcessorMixin,
) -> None:
    """Check the configuration and chat template of a teacher that this process will load."""
    init_kwargs = args.teacher_model_init_kwargs or {}
    assert isinstance(init_kwargs, dict)  # `TrainingArguments` has parsed a string
    revision = init_kwargs.get("revision", args.teacher_model_revision)
    if isinstance(teacher_model, str):
        with naming_model(teacher_model):
            teacher_config = AutoConfig.from_pretrained(
                teacher_model, revision=revision, trust_remote_code=args.trust_remote_code
            )
    else:
        teacher_config = teacher_model.config
    vocab_size, teacher_vocab_size = (each.get_text_config().vocab_size for each in (config, teacher_config))
    if teacher_vocab_size != vocab_size:
        raise ValueError(
            f"The student model has vocab_size {vocab_size} but the teacher model has vocab_size "
            f"{teacher_vocab_size}, so it cannot score the student's tokens. Use a teacher with the same vocabulary."
        )
    teacher_name = teacher_model if isinstance(teacher_model, str) else get_config_model_id(teacher_config)
    thinking_mode = load_thinking_mode(teacher_name, revision, args)
    warn_about_thinking_teacher(teacher_name, thinking_mode, processing_class, args)


def check_vocabulary(args: ViCuRConfig, config: PreTrainedConfig) -> None:
    vocab_size = config.get_text_config().vocab_size
    if args.distillation_mode == "topk_logits" and args.distillation_topk > vocab_size:
        raise ValueError(
            f"`distillation_topk={args.distillation_topk}` exceeds the vocabulary of {vocab_size} tokens. Lower it, "
            "or use `distillation_mode='full_logits'`."
        )


def check_streaming(args: ViCuRConfig) -> None:
    """Refuse options that a stream does not support. Trainer and TRL refuse some, but only after loading weights."""
    if args.max_steps <= 0:
        raise ValueError(
            f"`max_steps={args.max_steps}`, but the length of a streamed dataset is unknown. Set `max_steps` to the "
            "number of steps to train."
        )
    if args.num_iterations > 1:
        raise ValueError(
            f"`num_iterations={args.num_iterations}` needs a `Dataset`; with an `IterableDataset` it must be 1."
        )
    assert isinstance(args.accelerator_config, AcceleratorConfig)  # `TrainingArguments` has converted it
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "`accelerator_config={'dispatch_batches': True}` is not supported with a streamed dataset: rows are not "
            "tensors, so one rank cannot send them to the others. Leave `dispatch_batches` out."
        )


def check_something_trains(model: PreTrainedModel | PeftModel) -> None:
    """Check that the student, with its adapters attached, has trainable parameters. Reads no weights."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "The model has no trainable parameters, e.g. because its adapter was loaded with `inference_mode=True`. "
            "To train an adapter further, load it with `PeftModel.from_pretrained(..., is_trainable=True)`."
        )
