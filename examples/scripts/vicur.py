"""
Visual-cue-recovery distillation (ViCuR) of a vision-language model.

The same as `trl-vicur train`, as a script to begin with: `make_parser` and `main` are in `trl_vicur/train.py`.

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

from trl_vicur.train import main, make_parser


if __name__ == "__main__":
    main(*make_parser("vicur.py").parse_args_and_config())
