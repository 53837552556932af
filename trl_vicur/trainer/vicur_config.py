import math
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from string import Formatter
from typing import Any, Literal, get_args

from trl.trainer.distillation_config import DistillationConfig

from ..data.layouts import COLUMNS_HELP, parse_columns
from ..data.rows import VISUAL_COLUMNS
from ..data.teacher_prompt import TEACHER_PROMPT_TEMPLATE


Privilege = Literal["cue", "answer", "none"]
TeacherModelKind = Literal["base", "live", "ema"]
PrefixRejection = Literal["none", "completion", "sentence"]
DistillationMode = Literal["sampled_token", "full_logits", "topk_logits"]
ImportanceSamplingMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def _is_count(value: float) -> bool:
    return type(value) is int and value >= 1


CHOICES = {
    "privilege": get_args(Privilege),
    "missing_privilege": ("error", "none"),
    "teacher_model_kind": get_args(TeacherModelKind),
    "distillation_mode": get_args(DistillationMode),
    "prefix_rejection": get_args(PrefixRejection),
    "loss_aggregation": ("token", "sequence"),
    "vllm_importance_sampling_mode": get_args(ImportanceSamplingMode),
    "share_vision_features": ("auto", "never"),
}
# Allowed range of each number, in words and as a check that fails for NaN. Some are TRL's options, which TRL does not
# check
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "teacher_sync_steps": ("an integer of at least 1", _is_count),
    "distillation_topk": ("an integer of at least 1", _is_count),
    "dataset_num_proc": ("an integer of at least 1", _is_count),
    "num_iterations": ("an integer of at least 1", _is_count),
    "max_completion_length": ("an integer of at least 1", _is_count),
    "teacher_update_rate": ("in (0, 1]", lambda value: 0.0 < value <= 1.0),
    "beta": ("in [0, 1]", lambda value: 0.0 <= value <= 1.0),
    "temperature": ("positive and finite", lambda value: 0.0 < value < math.inf),
    "top_p": ("in (0, 1]", lambda value: 0.0 < value <= 1.0),
    "max_grad_norm": ("at least 0", lambda value: value >= 0.0),
    "epsilon": ("in (0, 1)", lambda value: 0.0 < value < 1.0),
    "epsilon_high": ("positive", lambda value: value > 0.0),
    "advantage_clip": ("positive", lambda value: value > 0.0),
    "prefix_rejection_threshold": ("positive", lambda value: value > 0.0),
    "vllm_importance_sampling_clip_max": ("positive", lambda value: value > 0.0),
    "vllm_importance_sampling_clip_min": ("positive", lambda value: value > 0.0),
}
CAN_BE_NONE = {
    "dataset_num_proc",
    "max_completion_length",
    "max_grad_norm",
    "epsilon_high",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
}


@dataclass
class ViCuRConfig(DistillationConfig):
    r"""
    Configuration class for the [`ViCuRTrainer`].

    Extends [`~trl.DistillationConfig`]; all of its fields keep their meaning.

    Parameters:
        > Parameters that control the teacher's context

        privilege (`str`, *optional*, defaults to `"cue"`):
            What only the teacher sees (ViCuR, Sec. 3.1): `"cue"`, a text that describes the visible evidence;
            `"answer"`, the reference answer (OPSD, the baseline); `"none"`, nothing.
        cue_column (`str`, *optional*, defaults to `"cue"`):
            Dataset column with the cues.
        answer_column (`str`, *optional*, defaults to `"answer"`):
            Dataset column with the reference answers.
        teacher_prompt_template (`str`, *optional*, defaults to `"{prompt}\n\n[Hint]: {privilege}"`):
            How the privilege is added to the text of the last user turn.
        missing_privilege (`str`, *optional*, defaults to `"error"`):
            How rows without privilege are handled: `"error"` refuses the dataset, `"none"` shows the teacher the
            student's prompt.

        > Parameters that control the check of the datasets

        columns (`str`, *optional*):
            Columns of the prompt, the images, the answer and the system prompt where the layout of a dataset would be
            guessed wrong, e.g. `"prompt=question,answer=solution"`.

        dataset_num_proc (`int`, *optional*):
            Number of worker processes that check the rows of each rank before training. By default, the rank checks
            them itself.

        > Parameters that control the teacher model in self-distillation (without `teacher_model`)

        teacher_model_kind (`str`, *optional*, defaults to `"base"`):
            `"base"` is the frozen initial student (with PEFT the model without its adapter, or a copy if base weights
            train as well, as with `bias="all"`), `"live"` the current student, `"ema"` an exponential moving average
            of the student.
        teacher_update_rate (`float`, *optional*, defaults to `0.05`):
            Weight of the student in each update of the `"ema"` teacher.
        teacher_sync_steps (`int`, *optional*, defaults to `1`):
            Optimizer steps between updates of the `"ema"` teacher.

        > Parameters that control a teacher on a vLLM server

        teacher_model_server_url (`str`, *optional*):
            Address of a vLLM server (0.31 or later) that serves the teacher, e.g. `"http://localhost:8000"`, started
            with `vllm serve TEACHER --enable-scale-out` and, for `"topk_logits"`, `--max-logprobs` of at least
            `distillation_topk`. It scores the token ids of the student's completions after the teacher's prompt, with
            the same images; no copy of the teacher is loaded. The trainer waits up to `vllm_server_timeout` seconds
            for the server. Options that need more than the server returns are refused:
            `distillation_mode="full_logits"`, and a `temperature` other than 1.

        > Parameters that control the objective

        distillation_mode (`str`, *optional*, defaults to `"sampled_token"`):
            `"sampled_token"` is the paper's objective: the teacher's and student's log-probabilities of the sampled
            token give its advantage in a PPO loss (Eq. 6-8). `"full_logits"` is the generalized JSD over the whole
            vocabulary; `beta` selects the divergence. `"topk_logits"` is the same over the teacher's most likely
            tokens and one bucket for all others.
        distillation_topk (`int`, *optional*, defaults to `100`):
            Number of the teacher's most likely tokens in `"topk_logits"`.
        num_iterations (`int`, *optional*, defaults to `1`):
            Optimizer steps on each generation batch (μ in the GRPO algorithm).
        epsilon (`float`, *optional*, defaults to `0.2`):
            Clip range of the importance ratio in `"sampled_token"`.
        epsilon_high (`float`, *optional*):
            Upper clip range. Defaults to `epsilon`.
        advantage_clip (`float`, *optional*, defaults to `10.0`):
            Largest absolute advantage in `"sampled_token"`, in nats: the difference of the two log-probabilities is
            clamped. The authors' code also clamps each log-probability at −10 first, so a token that both models find
            unlikely gets zero advantage there; here it keeps its advantage.
        prefix_rejection (`str`, *optional*, defaults to `"none"`):
            Which tokens after one that the teacher rejects are left out of the loss, because the teacher scores them
            after a prefix that it would not have written: `"completion"`, all of them; `"sentence"`, those up to the
            end of the sentence (a token that ends in `.`, `!`, `?`, `;` or a line break). Left-out tokens still count
            in the mean of `loss_aggregation`. In `"full_logits"` and `"topk_logits"`, it costs one more projection of
            student and teacher to the vocabulary.
        prefix_rejection_threshold (`float`, *optional*, defaults to `3.0`):
            The teacher rejects a token whose log-probability is lower than the student's by more than this, in nats.
        loss_aggregation (`str`, *optional*, defaults to `"token"`):
            `"token"` is the mean over all completion tokens of the batch, `"sequence"` the mean over completions of
            each completion's mean (as Eq. 7 is written).

        > Parameters that control the correction for rollouts with vLLM, as in [`~trl.GRPOConfig`]

        vllm_importance_sampling_correction (`bool`, *optional*, defaults to `True`):
            Whether `"sampled_token"` weights each token of a vLLM rollout by the ratio of its probability in training
            to its probability in vLLM; the two differ by rounding. Rollouts with tools are not weighted.
        vllm_importance_sampling_mode (`str`, *optional*, defaults to `"token_truncate"`):
            `"token_truncate"` clips the ratio of each token, `"token_mask"` leaves out tokens whose ratio is outside
            of the bounds; `"sequence_truncate"` and `"sequence_mask"` do so with the product of a completion's ratios.
            Advantages are per token here, and so is the default (TRL's is `"sequence_mask"`).
        vllm_importance_sampling_clip_max (`float`, *optional*, defaults to `3.0`):
            Upper bound of the ratio. `None` for no bound.
        vllm_importance_sampling_clip_min (`float`, *optional*):
            Lower bound of the ratio.

        > Parameters that control memory and speed

        share_vision_features (`str`, *optional*, defaults to `"auto"`):
            `"auto"` encodes each image and video once for all passes with the same vision weights: rollout, student
            and teacher in self-distillation with a frozen vision tower; rollout and student with an external teacher;
            rollout and teacher if the vision tower of a `"live"` teacher trains. The features of a generation batch
            are kept until the next one. `"never"` encodes images and videos in each pass.

    Raises:
        `ValueError`: If the value of an option is not allowed, or if options contradict each other.
    """

    privilege: Privilege = field(
        default="cue",
        metadata={"help": "What only the teacher sees: 'cue' (visible evidence), 'answer' (OPSD) or 'none'."},
    )
    cue_column: str = field(default="cue", metadata={"help": "Dataset column with the cues."})
    answer_column: str = field(default="answer", metadata={"help": "Dataset column with the reference answers."})
    teacher_prompt_template: str = field(
        default=TEACHER_PROMPT_TEMPLATE,
        metadata={"help": "How the privilege is added to the text of the last user turn."},
    )
    missing_privilege: Literal["error", "none"] = field(
        default="error",
        metadata={
            "help": "How rows without privilege are handled: 'error' refuses the dataset, 'none' shows the teacher "
            "the student's prompt."
        },
    )
    columns: str | None = field(default=None, metadata={"help": COLUMNS_HELP})
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Number of worker processes that check the rows of each rank before training."},
    )
    teacher_model_kind: TeacherModelKind = field(
        default="base",
        metadata={
            "help": "Teacher in self-distillation: 'base' (frozen initial student), 'live' (current student) or 'ema' "
            "(exponential moving average of the student)."
        },
    )
    teacher_update_rate: float = field(
        default=0.05, metadata={"help": "Weight of the student in each update of the 'ema' teacher."}
    )
    teacher_sync_steps: int = field(
        default=1, metadata={"help": "Optimizer steps between updates of the 'ema' teacher."}
    )
    teacher_model_server_url: str | None = field(
        default=None,
        metadata={
            "help": "Address of a vLLM server that serves the teacher, e.g. 'http://localhost:8000', so that no copy "
            "of it is loaded. Start it with `vllm serve TEACHER --enable-scale-out --max-logprobs 100`."
        },
    )
    distillation_mode: DistillationMode = field(
        default="sampled_token",
        metadata={
            "help": "'sampled_token' (the paper's PPO objective), 'full_logits' (generalized JSD over the vocabulary) "
            "or 'topk_logits' (the same over the teacher's most likely tokens)."
        },
    )
    distillation_topk: int = field(
        default=100, metadata={"help": "Number of the teacher's most likely tokens in 'topk_logits'."}
    )
    num_iterations: int = field(default=1, metadata={"help": "Optimizer steps on each generation batch."})
    epsilon: float = field(default=0.2, metadata={"help": "Clip range of the importance ratio in 'sampled_token'."})
    epsilon_high: float | None = field(default=None, metadata={"help": "Upper clip range. By default `epsilon`."})
    advantage_clip: float = field(
        default=10.0, metadata={"help": "Largest absolute advantage in 'sampled_token', in nats."}
    )
    prefix_rejection: PrefixRejection = field(
        default="none",
        metadata={
            "help": "Which tokens after one that the teacher rejects are left out of the loss: 'none', 'sentence' "
            "(up to the end of the sentence) or 'completion' (all)."
        },
    )
    prefix_rejection_threshold: float = field(
        default=3.0,
        metadata={
            "help": "The teacher rejects a token whose log-probability is lower than the student's by more than this."
        },
    )
    loss_aggregation: Literal["token", "sequence"] = field(
        default="token",
        metadata={
            "help": "'token' (mean over all tokens of the batch) or 'sequence' (mean of each completion's mean)."
        },
    )
    vllm_importance_sampling_correction: bool = field(
        default=True,
        metadata={"help": "Whether 'sampled_token' corrects for the mismatch between vLLM and training."},
    )
    vllm_importance_sampling_mode: ImportanceSamplingMode = field(
        default="token_truncate",
        metadata={
            "help": "'token_truncate' (clip each token's ratio), 'token_mask' (leave out tokens outside of the "
            "bounds), 'sequence_truncate' or 'sequence_mask' (the same with a completion's ratio)."
        },
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=3.0, metadata={"help": "Upper bound of the ratio that corrects vLLM rollouts."}
    )
    vllm_importance_sampling_clip_min: float | None = field(
        default=None, metadata={"help": "Lower bound of the ratio that corrects vLLM rollouts."}
    )
    share_vision_features: Literal["auto", "never"] = field(
        default="auto",
        metadata={
            "help": "'auto' encodes each image and video once for rollout, student and teacher, as far as their "
            "vision weights are the same; 'never' encodes them in each pass."
        },
    )

    @property
    def privilege_column(self) -> str | None:
        """Dataset column with the privileged text; `None` if the teacher reads the student's prompt."""
        return {"cue": self.cue_column, "answer": self.answer_column, "none": None}[self.privilege]

    def __post_init__(self):
        self._check_own_fields()
        super().__post_init__()
        self._check_choices()
        self._check_ranges()
        self._check_columns()
        self._check_teacher_prompt_template()
        if self.loss_aggregation == "sequence" and self.use_liger_kernel and self.distillation_mode == "full_logits":
            raise ValueError(
                "`loss_aggregation='sequence'` needs the divergence of each token, but Liger's fused JSD returns only "
                "the sum. Set `use_liger_kernel=False`."
            )
        if self.teacher_model_server_url is not None:
            self._check_teacher_server()

    def _check_own_fields(self) -> None:
        if taken := sorted(ViCuRConfig.__annotations__.keys() & DistillationConfig.__dataclass_fields__.keys()):
            names = ", ".join(f"`{name}`" for name in taken)
            raise ImportError(
                f"TRL {version('trl')} has options named {names}, which trl-vicur {version('trl-vicur')} defines with "
                "a different meaning. Install `trl==1.16.*`, or a newer trl-vicur."
            )

    def _check_choices(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {list(allowed)}, got {getattr(self, name)!r}.")

    def _check_ranges(self) -> None:
        for name, (expected, is_allowed) in RANGES.items():
            value = getattr(self, name)
            if value is None and name in CAN_BE_NONE:
                continue
            if not isinstance(value, (int, float)) or not is_allowed(value):
                raise ValueError(f"`{name}` must be {expected}, got {value!r}.")

    def _check_columns(self) -> None:
        parse_columns(self.columns)  # raises if it is malformed
        for name in ("cue_column", "answer_column"):
            value = getattr(self, name)
            if not isinstance(value, str) or value in ("", "prompt", *VISUAL_COLUMNS):
                raise ValueError(f"`{name}` must name a column of its own, got {value!r}.")

    def _check_teacher_prompt_template(self) -> None:
        try:
            fields = list(Formatter().parse(self.teacher_prompt_template))
        except (TypeError, ValueError):
            fields = []
        fields = [(name, spec, conversion) for _, name, spec, conversion in fields if name is not None]
        if set(fields) != {("prompt", "", None), ("privilege", "", None)}:
            raise ValueError(
                "`teacher_prompt_template` must contain `{prompt}` and `{privilege}` and no other braces (write `{{` "
                f"for a literal one), got {self.teacher_prompt_template!r}."
            )

    def _check_teacher_server(self) -> None:
        if not str(self.teacher_model_server_url).startswith(("http://", "https://")):
            raise ValueError(
                "`teacher_model_server_url` must be an address such as 'http://localhost:8000', got "
                f"{self.teacher_model_server_url!r}."
            )
        if self.teacher_model_kind != "base":
            raise ValueError(
                f"`teacher_model_kind={self.teacher_model_kind!r}` makes the student its own teacher, but "
                f"`teacher_model_server_url={self.teacher_model_server_url!r}` is set as well. Leave out one of the "
                "two."
            )
        if self.distillation_mode == "full_logits":
            raise ValueError(
                "`distillation_mode='full_logits'` needs the teacher's log-probabilities of the whole vocabulary, "
                "which a server does not send. Choose 'sampled_token' or 'topk_logits', or leave out "
                "`teacher_model_server_url`."
            )
        if self.temperature != 1.0:
            raise ValueError(
                f"`temperature` is {self.temperature}, but vLLM always scores prompt tokens at temperature 1. "
                "Set `temperature=1.0`, or leave out `teacher_model_server_url`."
            )


def template_variables(args: ViCuRConfig) -> dict[str, Any]:
    """The chat template's variables: `chat_template_kwargs`, or `{}` if it is not set."""
    variables = args.chat_template_kwargs or {}
    assert isinstance(variables, dict)  # `TrainingArguments` has parsed a string
    return variables
