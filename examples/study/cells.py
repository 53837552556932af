"""The study's grid: the paper's component analysis (Table 2), then one change at a time to its last cell."""

from typing import Any, Literal, NamedTuple


class Cell(NamedTuple):
    """
    One way to train a student.

    Args:
        privilege: What the teacher sees. `"reward"` has no teacher: TRL's GRPO, rewarded for the right answer.
        module: Whether the student has the recovery module.
        teacher: The frozen base, a moving average of the student, or the model of `--stronger_teacher`.
        objective: Forward or reverse KL over the vocabulary, or the paper's sampled token.
        num_heads: As in `CueRecoveryConfig`.
        bottleneck_size: As in `CueRecoveryConfig`.
        one_layer: Whether only the first decoder layer has a module, instead of one in every `layer_interval`.
        shared_weights: Whether the modules of all layers share their weights.
        trains: What trains besides the module: everything, nothing, LoRA on the text decoder, or LoRA on the text
            decoder and the linear layers of the vision merger.
        learning_rates: Learning rates to try with seed 0.
    """

    privilege: Literal["cue", "answer", "none", "reward"] = "cue"
    module: bool = True
    teacher: Literal["base", "ema", "stronger"] = "base"
    objective: Literal["forward_kl", "reverse_kl", "sampled_token"] = "forward_kl"
    num_heads: int | None = None
    bottleneck_size: int | None = None
    one_layer: bool = False
    shared_weights: bool = False
    trains: Literal["all", "nothing", "lora", "lora_and_merger"] = "all"
    learning_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)


# A module with less than one percent of the model's parameters; twice as wide if two layers share it
BOTTLENECK = 9
SHARED_BOTTLENECK = 18
ADAPTER_RATES = (1e-3, 3e-3, 1e-2)
# The smaller the module, the larger its best rate
MODULE_RATES = (*ADAPTER_RATES, 3e-2)
GRPO_RATES = (3e-5, 1e-4, 3e-4)

GRID = {
    # The paper's Table 2, and cells without any privilege
    "answer": Cell(privilege="answer", module=False),
    "cue": Cell(module=False),
    "answer+module": Cell(privilege="answer"),
    "cue+module": Cell(),
    "none": Cell(privilege="none", module=False),
    "none+module": Cell(privilege="none"),
    # The size of the module
    "one-head": Cell(num_heads=1),
    "one-layer": Cell(one_layer=True),
    "bottleneck": Cell(bottleneck_size=BOTTLENECK),
    # What an adapter needs
    "module-alone": Cell(trains="nothing", learning_rates=MODULE_RATES),
    "module-alone-one-head": Cell(trains="nothing", num_heads=1, learning_rates=MODULE_RATES),
    "module-alone-one-layer": Cell(trains="nothing", one_layer=True, learning_rates=MODULE_RATES),
    "module-alone-shared": Cell(trains="nothing", shared_weights=True, learning_rates=MODULE_RATES),
    "module-alone-bottleneck": Cell(trains="nothing", bottleneck_size=BOTTLENECK, learning_rates=MODULE_RATES),
    "module-alone-bottleneck-one-head": Cell(
        trains="nothing", bottleneck_size=BOTTLENECK, num_heads=1, learning_rates=MODULE_RATES
    ),
    "module-alone-shared-bottleneck": Cell(
        trains="nothing", bottleneck_size=SHARED_BOTTLENECK, shared_weights=True, learning_rates=MODULE_RATES
    ),
    "lora": Cell(module=False, trains="lora", learning_rates=ADAPTER_RATES),
    "lora+module": Cell(trains="lora", learning_rates=ADAPTER_RATES),
    "lora-merger": Cell(module=False, trains="lora_and_merger", learning_rates=ADAPTER_RATES),
    "lora-merger+module": Cell(trains="lora_and_merger", learning_rates=ADAPTER_RATES),
    "lora-merger-answer": Cell("answer", module=False, trains="lora_and_merger", learning_rates=ADAPTER_RATES),
    # Objectives
    "sampled-token": Cell(objective="sampled_token", learning_rates=(5e-5, 1.5e-4, 5e-4)),
    "reverse-kl": Cell(objective="reverse_kl"),
    # Teachers
    "ema-teacher": Cell(teacher="ema"),
    "stronger-teacher": Cell(teacher="stronger"),
    "stronger-teacher-no-cue": Cell(privilege="none", module=False, teacher="stronger"),
    # Reward
    "grpo": Cell(privilege="reward", module=False, learning_rates=GRPO_RATES),
    "grpo+module": Cell(privilege="reward", learning_rates=GRPO_RATES),
}


def objective_options(cell: Cell) -> dict[str, Any]:
    """The options of `ViCuRConfig` for the cell's objective."""
    if cell.objective == "sampled_token":
        return {"distillation_mode": "sampled_token"}
    return {"distillation_mode": "full_logits", "beta": {"forward_kl": 0.0, "reverse_kl": 1.0}[cell.objective]}


# Cells with recorded results whose option was removed: the sink in the header of the generated turn
REMOVED = {
    "sink-assistant": Cell(),
    "module-alone-assistant": Cell(trains="nothing", learning_rates=MODULE_RATES),
}
