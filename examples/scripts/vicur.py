"""
Visual-cue-recovery distillation (ViCuR) of a vision-language model.

The dataset has the columns `prompt` (messages), `images` (or `image`), and `cue` (or `answer`).

The module alone, on one GPU:

```bash
python examples/scripts/vicur.py \
    --model_name_or_path Qwen/Qwen3-VL-2B-Instruct \
    --dataset_name me/geometry-with-cues \
    --privilege cue \
    --learning_rate 1e-4 \
    --output_dir Qwen3-VL-2B-ViCuR
```

With LoRA on the backbone: add `--use_peft --lora_r 16 --lora_alpha 32`. Without the module: `--cue_recovery False`.

The paper's recipes, full fine-tuning with the module, on eight GPUs:

```bash
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/scripts/vicur.py \
    --config examples/scripts/vicur_geometry3k.yaml --dataset_name me/geometry3k-with-cues

accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/scripts/vicur.py \
    --config examples/scripts/vicur_vision_r1.yaml --dataset_name me/vision-r1-with-cues
```
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import PeftConfig
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer


@dataclass
class CueRecoveryArguments:
    """The fields of `CueRecoveryConfig` that belong on a command line."""

    cue_recovery: bool = field(default=True, metadata={"help": "Whether the student gets the recovery module."})
    layer_interval: int = field(default=5, metadata={"help": "Decoder layers between two recovery modules."})
    sink_token: str = field(default="first", metadata={"help": "'first', 'assistant' or a token string."})
    num_heads: int | None = field(default=None, metadata={"help": "Heads of the module. Default: the text model's."})
    train_base: bool = field(
        default=False, metadata={"help": "Whether the backbone trains together with the module (the paper's setting)."}
    )


def make_peft_config(model_args: ModelConfig, recovery_args: CueRecoveryArguments) -> PeftConfig | None:
    """The module with TRL's LoRA options; TRL's own adapter without the module."""
    lora_config = get_peft_config(model_args)
    if not recovery_args.cue_recovery:
        return lora_config
    lora = {}
    if lora_config is not None:
        names = ("r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "modules_to_save")
        lora = {name: getattr(lora_config, name) for name in names}
        if model_args.lora_target_modules is not None:  # otherwise all linear layers of the decoder
            lora["target_modules"] = lora_config.target_modules
    return CueRecoveryConfig(
        layer_interval=recovery_args.layer_interval,
        sink_token=recovery_args.sink_token,
        num_heads=recovery_args.num_heads,
        train_base=recovery_args.train_base,
        **lora,
    )


def main(
    script_args: ScriptArguments,
    training_args: ViCuRConfig,
    model_args: ModelConfig,
    recovery_args: CueRecoveryArguments,
) -> None:
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

    dataset = load_dataset(
        script_args.dataset_name, name=script_args.dataset_config, streaming=script_args.dataset_streaming
    )
    trainer = ViCuRTrainer(
        model=model_args.model_name_or_path,
        teacher_model=training_args.teacher_model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        eval_dataset=dataset[script_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        quantization_config=get_quantization_config(model_args),
        peft_config=make_peft_config(model_args, recovery_args),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)
    trainer.accelerator.print(f"Model saved to {training_args.output_dir}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, ViCuRConfig, ModelConfig, CueRecoveryArguments))
    main(*parser.parse_args_and_config(fail_with_unknown_args=True))
