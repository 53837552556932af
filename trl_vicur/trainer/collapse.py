"""Warns when the student collapses: its completions become very short, or nearly identical."""

import warnings
from typing import Any, NamedTuple

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .trackers import alert


class Collapse(NamedTuple):
    """
    A metric that must not fall far below its initial value, and what to try when it does.

    Args:
        title (`str`):
            Name of the collapse.
        metric (`str`):
            Key of the metric in the trainer's logs.
        min_share (`float`):
            Fraction of the initial value below which it counts as a collapse.
        text (`str`):
            What is wrong and what to try, with the fields `{now}`, `{start}` and `{percent}`.
    """

    title: str
    metric: str
    min_share: float
    text: str


COLLAPSES = (
    Collapse(
        "Length collapse",
        "completions/mean_length",
        0.5,
        "completions have {now:.1f} tokens, {percent:.0f} % of the initial {start:.1f}. A teacher that knows more "
        "stops earlier, and end-of-sequence tokens have large advantages. Try `privilege='cue'` if it is 'answer' (a "
        "cue gives the evidence, not the result), a smaller `advantage_clip`, a lower `learning_rate`, or a "
        "`teacher_prompt_template` that asks for the steps. If you want shorter answers, ignore this.",
    ),
    Collapse(
        "Entropy collapse",
        "entropy",
        0.1,
        "the student's entropy is {now:.2g} nats per token, {percent:.0f} % of the initial {start:.2g}. Its rollouts "
        "are becoming identical, so there is little left to learn from them. Try a lower `learning_rate`, a higher "
        "`temperature`, `num_iterations=1`, or `distillation_mode='full_logits'` with `beta=0.0`, whose forward KL "
        "covers all tokens that the teacher considers likely. If the completions are correct and short, ignore this.",
    ),
)


class CollapseCallback(TrainerCallback):
    """
    Warns once per run and metric when the mean over the last logs falls far below the mean over the first ones: below
    a half for `completions/mean_length` (short completions), below a tenth for `entropy` (identical completions). The
    warning says what to try, and is also sent as an alert to the trackers that the trainer reports to.

    [`ViCuRTrainer`] adds it by default; `trainer.remove_callback(CollapseCallback)` removes it.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that it is added to.
        window (`int`, *optional*, defaults to `5`):
            Number of logs in each mean. There is no warning until there are twice as many logs.
    """

    def __init__(self, trainer: Trainer, window: int = 5):
        self.trainer = trainer
        self.window = window
        self.reported: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        for collapse in COLLAPSES:
            if collapse.title in self.reported or collapse.metric not in logs:
                continue
            # Read from the trainer state, so that a resumed run still has the first logs
            values = [log[collapse.metric] for log in state.log_history if log.get(collapse.metric) is not None]
            if len(values) < 2 * self.window:
                continue
            start, now = (sum(some) / self.window for some in (values[: self.window], values[-self.window :]))
            if now < collapse.min_share * start:
                self.reported.add(collapse.title)
                text = collapse.text.format(now=now, start=start, percent=100 * now / start)
                warnings.warn(f"{collapse.title} at step {state.global_step}: {text}")
                alert(self.trainer.callback_handler.callbacks, collapse.title, text, state.global_step)
