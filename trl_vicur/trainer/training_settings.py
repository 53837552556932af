"""The training settings that a model card lists."""

from .vicur_config import ViCuRConfig


def training_settings(args: ViCuRConfig, teacher: str, adapter: dict[str, object]) -> list[tuple[str, object]]:
    """
    Names and values of the main training settings, for the model card.

    Args:
        args ([`ViCuRConfig`]):
            The training configuration.
        teacher (`str`):
            Description of the teacher.
        adapter (`dict[str, object]`):
            Settings of the adapter.
    """
    settings: dict[str, object] = {
        "privilege of the teacher": args.privilege,
        "teacher": teacher,
        "`distillation_mode`": args.distillation_mode,
    }
    if args.distillation_mode != "sampled_token":
        settings["`beta`"] = args.beta
    settings |= adapter
    settings |= {
        "learning rate": args.learning_rate,
        "prompts per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "training": _plural(args.max_steps, "step") if args.max_steps > 0 else _plural(args.num_train_epochs, "epoch"),
        "temperature of rollouts": args.temperature,
        "longest completion": f"{args.max_completion_length} tokens",
    }
    return list(settings.items())


def _plural(number: float, noun: str) -> str:
    return f"{number:g} {noun}{'' if number == 1 else 's'}"
