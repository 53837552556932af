"""
Visual-cue-recovery distillation (ViCuR) of a vision-language model.

The same as `trl-vicur train`, as a script to start from: `make_parser` and `main` are in `trl_vicur/train.py`.

The dataset needs the columns `prompt` (messages), `images` (or `image`), and `cue` (or `answer`).

An adapter with LoRA and the module, on one GPU:

```bash
python examples/scripts/vicur.py \
    --model_name_or_path Qwen/Qwen3-VL-2B-Instruct \
    --dataset_name me/geometry-with-cues \
    --use_peft --lora_r 16 --lora_alpha 32 --learning_rate 1e-4 \
    --output_dir Qwen3-VL-2B-ViCuR
```

The module alone: omit `--use_peft` and the `--lora_…` options. LoRA alone: add `--cue_recovery False`.

The paper's recipes (full fine-tuning with the module) on eight GPUs:

```bash
accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/scripts/vicur.py \
    --config examples/scripts/vicur_geometry3k.yaml --dataset_name me/geometry3k-with-cues

accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/scripts/vicur.py \
    --config examples/scripts/vicur_vision_r1.yaml --dataset_name me/vision-r1-with-cues
```
"""

from trl_vicur.train import main, make_parser


if __name__ == "__main__":
    main(*make_parser("vicur.py").parse_args_and_config())
