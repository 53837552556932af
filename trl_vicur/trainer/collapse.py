"""Warnings of a student that collapses: whose completions get short, or all alike."""

import warnings
from typing import Any, NamedTuple

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .trackers import alert


class Collapse(NamedTuple):
    """
    A metric that must not fall far below where it started, and what to try when it does.

    Args:
        title (`str`):
            Name of the collapse.
        metric (`str`):
            Key of the metric in the trainer's logs.
        min_share (`float`):
            The share of the start below which it is one.
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
        "completions have {now:.1f} tokens, {percent:.0f} % of the {start:.1f} they had at first. A teacher that "
        "knows more ends early, and ends have large advantages. Try `privilege='cue'` if it is 'answer' (a cue gives "
        "the evidence and not the result), a smaller `advantage_clip`, a lower `learning_rate`, or a "
        "`teacher_prompt_template` that asks for the steps. If shorter answers are what you want, ignore this.",
    ),
    Collapse(
        "Entropy collapse",
        "entropy",
        0.1,
        "the student's entropy is {now:.2g} nats per token, {percent:.0f} % of the {start:.2g} it had at first. Its "
        "rollouts become all alike and teach little more. Try a lower `learning_rate`, a higher `temperature`, "
        "`num_iterations=1`, or `distillation_mode='full_logits'` with `beta=0.0`, whose forward KL keeps what the "
        "teacher finds possible. If the completions are right and short, ignore this.",
    ),
)


class CollapseCallback(TrainerCallback):
    """
    Warns, once per run, when completions become short or all alike: the means of `completions/mean_length` and
    `entropy` over the last logs fall below a half, or a tenth, of their means over the first ones. The warning says
    what to try, and is an alert in the trackers that the trainer reports to.

    [`ViCuRTrainer`] has it by default; `trainer.remove_callback(CollapseCallback)` takes it out.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that it is added to.
        window (`int`, *optional*, defaults to `5`):
            Number of logs that each mean is taken over; nothing is said before there are twice as many.
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
            # From the state, so that a resumed run remembers its start
            values = [log[collapse.metric] for log in state.log_history if log.get(collapse.metric) is not None]
            if len(values) < 2 * self.window:
                continue
            start, now = (sum(some) / self.window for some in (values[: self.window], values[-self.window :]))
            if now < collapse.min_share * start:
                self.reported.add(collapse.title)
                text = collapse.text.format(now=now, start=start, percent=100 * now / start)
                warnings.warn(f"{collapse.title} at step {state.global_step}: {text}")
                alert(self.trainer.callback_handler.callbacks, collapse.title, text, state.global_step)
