import textwrap
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import Sampler
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel, ProcessorMixin, TrainerCallback
from transformers.trainer_utils import PredictionOutput
from trl.trainer.distillation_trainer import DistillationTrainer
from trl.trainer.utils import RepeatSampler, pad

from ..cue_recovery import CueRecoveryConfig, record_update_ratios
from ..data.examples import Example, read_row
from ..hub.model_upload import ModelUpload
from .checks.adapter_base import refusing_adapters_that_rewrite_the_base
from .checks.datasets import check_dataset
from .checks.options import adapter_configs, check_options, check_something_trains
from .checks.rows import RowChecker, with_row_number
from .checks.sharding import find_sharding
from .checks.streams import ROW_NAME
from .diagnostics import DiagnosticsMixin
from .lm_head import LMHead
from .loading import leave_out_liger_kernels, load_defaults
from .losses import (
    before_rejection,
    full_divergence,
    importance_sampling_ratio,
    liger_divergence_sum,
    sampled_token_loss,
    token_logprobs,
    topk_divergence,
)
from .mixed_precision import ForwardRedirection
from .multimodal_trainer import MultimodalMixin
from .publishing import PublishingMixin
from .resuming import ResumingMixin
from .sentences import sentence_end_tokens
from .teachers.building import build_teacher
from .teachers.scores import StateScores, TeacherScores
from .teachers.separate_teacher import SeparateTeacher
from .teachers.teacher import Model
from .teachers.teacher_server import TeacherServer
from .vicur_config import ViCuRConfig
from .vision.features import is_vision_frozen, record_features
from .vllm_rollouts import StudentGeneration, engine_with_module


AnyDataset = Dataset | IterableDataset


class ViCuRTrainer(MultimodalMixin, DiagnosticsMixin, ResumingMixin, PublishingMixin, DistillationTrainer):
    """
    Trainer for visual-cue-recovery distillation, as introduced in [ViCuR: Visual Cues as Recoverable Privilege for
    Multimodal On-Policy Distillation](https://huggingface.co/papers/2606.05718).

    The student generates completions from its own prompt. The teacher scores the same tokens after a prompt that also
    contains a privileged text, by default a cue that describes the visible evidence. The loss moves the student's
    distribution toward the teacher's. With `peft_config=CueRecoveryConfig()`, the student gets the module that
    recovers the evidence from the image. Everything else is TRL's [`~trl.DistillationTrainer`].

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl_vicur import CueRecoveryConfig, ViCuRConfig, ViCuRTrainer

    >>> trainer = ViCuRTrainer(
    ...     model="Qwen/Qwen3-VL-2B-Instruct",
    ...     args=ViCuRConfig(output_dir="Qwen3-VL-2B-ViCuR", learning_rate=1e-4),
    ...     train_dataset=load_dataset("me/geometry-with-cues", split="train"),  # prompt, images, cue
    ...     peft_config=CueRecoveryConfig(r=16, lora_alpha=32),
    ... )
    >>> trainer.train()
    ```

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Vision-language model to train, or its id or path.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            A larger teacher with the same vocabulary (stronger-teacher OPD). `None` means self-distillation:
            `args.teacher_model_kind` selects which weights of the student act as the teacher. With
            `args.teacher_model_server_url`, this is the name of the model that the server must serve; `None` accepts
            any.
        args ([`ViCuRConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        train_dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]):
            Conversational, prompt-only dataset with the columns `prompt`, `images` (a list per row, or `None`) or
            `image`, `videos` or `video`, and the privilege (`cue` or `answer`). All rows are checked before training.
        eval_dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or `dict` of them):
            Dataset to use for evaluation, with the same columns.
        processing_class ([`~transformers.ProcessorMixin`], *optional*):
            Processor of the model. If `None`, it is loaded from the model's name.
        callbacks (list of [`~transformers.TrainerCallback`], *optional*):
            Additional callbacks.
        optimizers (`tuple`, *optional*, defaults to `(None, None)`):
            Optimizer and scheduler, as in [`~transformers.Trainer`].
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            Quantization configuration used when loading the model from an id.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train: [`CueRecoveryConfig`], or any other weight-based PEFT method.
        tools (list of `Callable`, *optional*):
            Tools that the model can call, as in [`~trl.DistillationTrainer`].

    Raises:
        `ValueError`: If the model is not a vision-language model, if options contradict each other, if a dataset
            lacks a column or has an invalid row (the message gives the row's number), or if the teacher's server
            serves another model or vocabulary.
        `ConnectionError`: If the teacher's server cannot be reached.
    """

    _tag_names = ["trl", "vicur"]
    _name = "ViCuR"
    _paper = {
        "title": "ViCuR: Visual Cues as Recoverable Privilege for Multimodal On-Policy Distillation",
        "id": "2606.05718",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{tian2026vicur,
                title   = {{ViCuR: Visual Cues as Recoverable Privilege for Multimodal On-Policy Distillation}},
                author  = {Tian and Liu and Yan and Xia and Dong and Wang},
                year    = 2026,
                journal = {arXiv preprint arXiv:2606.05718},
            }"""),
    }

    args: ViCuRConfig

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        teacher_model: str | PreTrainedModel | None = None,
        args: ViCuRConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
    ):
        args, processing_class, config = load_defaults(model, args, processing_class)
        check_options(
            args,
            model,
            config,
            processing_class,
            teacher_model=teacher_model,
            train_dataset=train_dataset,
            peft_config=peft_config,
            quantization_config=quantization_config,
            tools=tools,
            sharding=find_sharding(args),
        )
        peft_configs = adapter_configs(model, peft_config)
        recovery_configs = [each for each in peft_configs if isinstance(each, CueRecoveryConfig)]
        if isinstance(peft_config, CueRecoveryConfig):
            peft_config.resolve_sink_token(processing_class)

        # Check all rows before loading the model
        server = None
        if args.teacher_model_server_url is not None:
            assert isinstance(teacher_model, str | None)  # `check_options` refuses a model
            server = TeacherServer.from_config(args, processing_class, teacher_model)
        self._row_checker = _make_row_checker(args, config, processing_class, server, bool(tools), recovery_configs)
        train_dataset, eval_dataset = self._check_train_dataset(train_dataset), self._check_eval_dataset(eval_dataset)

        self.use_liger_loss = args.use_liger_kernel
        leave_out_liger_kernels(args)
        engine = engine_with_module(self._get_peft_model) if args.use_vllm and recovery_configs else nullcontext()
        with engine, refusing_adapters_that_rewrite_the_base():
            super().__init__(
                model=model,
                teacher_model=teacher_model if server is None else None,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
            )
        self._prepare_student(recovery_configs)
        self._prepare_teacher(server)
        self.model._upload_modified_files = ModelUpload(self)

    def _get_peft_model(self) -> PeftModel:
        assert isinstance(self.model, PeftModel)
        return self.model

    def _prepare_student(self, recovery_configs: list[CueRecoveryConfig]) -> None:
        args = self.args
        if self.use_vllm:
            generation: Any = self.vllm_generation  # TRL's
            self.vllm_generation = StudentGeneration(generation, *recovery_configs)
        self._has_module = bool(recovery_configs)
        self._corrects_vllm = (
            self.use_vllm
            and args.vllm_importance_sampling_correction
            and args.distillation_mode == "sampled_token"
            and not self.tools  # tool rollouts span several generations, so their log-probs are incomplete
        )
        # Whether each token of the vocabulary ends a sentence, `(vocab,)`
        self._ends_sentence = None
        if args.prefix_rejection == "sentence":
            vocab_size = self.model.config.get_text_config().vocab_size
            self._ends_sentence = sentence_end_tokens(self._tokenizer, vocab_size)
        check_something_trains(self.model)
        LMHead.from_model(self.model)  # raises if the losses cannot read the head
        self._forward_redirection = ForwardRedirection(self.accelerator.device.type)
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            assert plugin is not None
            if plugin.mixed_precision_policy is not None:
                # `FullyShardedDataParallelPlugin.set_mixed_precision` rounds a forward's outputs, here the loss
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
            # `generate` reads this flag and keeps all ranks running until the last one finishes. FSDP1 modules are
            # recognized without it (transformers#33483), those of FSDP2 are not
            student = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            student._is_fsdp_managed_module = True  # pyright: ignore[reportArgumentType]

    def _prepare_teacher(self, server: TeacherServer | None) -> None:
        if self.teacher_model is not None:
            LMHead.from_model(self.accelerator.unwrap_model(self.teacher_model))
        self.teacher = build_teacher(
            self.args,
            self.model,
            self.teacher_model,
            server,
            self.processing_class,
            self.accelerator,
            self._forward_redirection,
            self._teacher_hidden_states,
        )
        if isinstance(self.teacher, SeparateTeacher):
            self.teacher_model = self.teacher.model
        if isinstance(self.teacher, TrainerCallback):
            self.add_callback(self.teacher)

    # --- Datasets: every row is checked before it is used ---

    def _check_train_dataset(self, dataset: AnyDataset | None) -> AnyDataset | None:
        if dataset is None:
            return None
        args = self._row_checker.args  # `self.args` is set later
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return check_dataset(dataset, "train_dataset", self._row_checker, args, min_rows=batch_size)

    def _check_eval_dataset(
        self, dataset: AnyDataset | dict[str, AnyDataset] | None
    ) -> AnyDataset | dict[str, AnyDataset] | None:
        """See [`check_dataset`]. Errors name a dataset of a dict by its key."""
        if dataset is None:
            return None
        args = self._row_checker.args
        if not isinstance(dataset, dict):
            return check_dataset(dataset, "eval_dataset", self._row_checker, args)
        return {
            key: check_dataset(each, f"eval_dataset[{key!r}]", self._row_checker, args)
            for key, each in dataset.items()
        }

    # transformers annotates these with torch's datasets
    def evaluate(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        # Datasets passed to `__init__` were checked there; a string names one of them
        if not isinstance(eval_dataset, str):
            eval_dataset = self._check_eval_dataset(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore[reportArgumentType]

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, test_dataset: AnyDataset, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        test_dataset = check_dataset(test_dataset, "test_dataset", self._row_checker, self.args)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore[reportArgumentType]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = [self.args.cue_column, self.args.answer_column, ROW_NAME]
        self._signature_columns += [column for column in columns if column not in self._signature_columns]

    # --- Rollouts: the student's prompt, its completion, and the teacher's prompt ---

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        sampler = super()._get_train_sampler(dataset)
        assert isinstance(sampler, RepeatSampler)
        self._train_sampler = sampler
        self._train_sampler.repeat_count *= self.args.num_iterations
        return self._train_sampler

    def _prepare_inputs(self, generation_batch: dict[str, torch.Tensor | Any]) -> dict[str, torch.Tensor | Any]:
        if not self.model.training or self.args.num_iterations == 1:
            return super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not None and self._is_within_rollouts:
            return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        # TRL generates if there is no buffer, or if `_step` is a multiple of `accumulation_steps`
        inputs = super()._prepare_inputs(generation_batch)
        if self.args.distillation_mode == "sampled_token":
            unwrapped_student = self.accelerator.unwrap_model(self.model_wrapped)
            assert self._buffered_inputs is not None  # TRL has just filled it
            for batch in self._buffered_inputs:
                with torch.no_grad(), self.compute_loss_context_manager():
                    batch["old_logprobs"] = self._forward_redirection(
                        self.model_wrapped, unwrapped_student, self._student_logprobs, unwrapped_student, batch
                    )
        return inputs

    def _generate(self, prompts: list) -> tuple:
        output = super()._generate(prompts)
        tool_images = output[4]
        if self._has_module and any(tool_images):
            raise ValueError(
                f"A tool returned an image (in {sum(map(bool, tool_images))} of {len(prompts)} prompts), but a "
                "recovery module reads all images of a conversation into one sink: the turns before the tool's image "
                "would be scored with a different sink than they were sampled with. Return text from the tool, or "
                "train without the module."
            )
        return output

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [self._read_row(row) for row in inputs]
        student = self.accelerator.unwrap_model(self.model_wrapped)
        self._vision_is_frozen = is_vision_frozen(student)
        keeps_features = not self.use_vllm and (self._student_shares_features or self._teacher_shares_features)
        with record_features(student) if keeps_features else nullcontext({}) as features:
            output = super()._generate_and_score_completions([{"prompt": example.prompt} for example in examples])
        if self.args.privilege != "none":
            output.update(self._teacher_prompts(examples, output))
        output.update(self.teacher.prepare([example.teacher_prompt for example in examples], output))
        if self._corrects_vllm:
            output["sampling_logprobs"] = pad(
                [torch.tensor(logprobs) for logprobs in self.vllm_generation.sampled_logprobs],
                padding_value=0,
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
            ).to(self.accelerator.device)
        if keeps_features:
            self._add_features(features, output)
        self._log_hint_leakage(output["completion_ids"])
        return output

    def _read_row(self, row: dict[str, Any]) -> Example:
        if ROW_NAME in row:  # a row of a stream, which is checked when it is used
            row = {**row}
            with_row_number(self._row_checker.check, lambda: row, row.pop(ROW_NAME))
        args = self.args
        return read_row(row, args.privilege_column, args.missing_privilege, args.teacher_prompt_template)

    def _teacher_prompts(self, examples: list[Example], output: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The teacher's prompts, left-padded. They have the same images and videos as the student's."""
        prompt_ids, _, multimodal_fields, *_ = self._tokenize_prompts([each.teacher_prompt for each in examples])
        pad_token_id = self._tokenizer.pad_token_id
        assert isinstance(pad_token_id, int)  # TRL sets one if the tokenizer has none
        teacher = {
            "teacher_prompt_ids": self._pad_left(prompt_ids, pad_token_id),
            "teacher_prompt_mask": self._pad_left([[1] * len(ids) for ids in prompt_ids]),
        }
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in output:
                teacher[f"teacher_{name}"] = self._pad_left([list(types) for types in multimodal_fields[name]])
        return teacher

    # --- Hidden states of student and teacher for the same completion tokens ---

    @property
    def _student_shares_features(self) -> bool:
        """Whether the student's forward pass can reuse the rollout's features of images and videos."""
        may_share = self.args.share_vision_features == "auto" and not self.tools  # tools can return more images
        return may_share and self._vision_is_frozen

    @property
    def _teacher_shares_features(self) -> bool:
        """Whether the teacher's forward pass can reuse them."""
        may_share = self.args.share_vision_features == "auto" and not self.tools
        return may_share and self.teacher.shares_vision_features(self._vision_is_frozen)

    def _student_hidden_states(self, unwrapped_student: Model, inputs: dict[str, Any]) -> torch.Tensor:
        return self._completion_hidden_states(unwrapped_student, inputs, self._student_shares_features)

    def _teacher_hidden_states(self, unwrapped_teacher: Model, inputs: dict[str, Any]) -> torch.Tensor:
        """The teacher's hidden states for the same completion tokens after its own prompt."""
        if "teacher_prompt_ids" in inputs:
            prompt = {name: inputs[f"teacher_{name}"] for name in ("prompt_ids", "prompt_mask")}
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in inputs:
                    of_completion = inputs[name][:, inputs["prompt_ids"].size(1) :]
                    prompt[name] = torch.cat([inputs[f"teacher_{name}"], of_completion], dim=1)
            inputs = {**inputs, **prompt}
        return self._completion_hidden_states(unwrapped_teacher, inputs, self._teacher_shares_features)

    def _student_logprobs(self, unwrapped_student: Model, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of the completion tokens, `(batch, completion)`; zero on padding."""
        mask = inputs["completion_mask"].bool()
        states = self._student_hidden_states(unwrapped_student, inputs)[mask]
        logprobs, _ = token_logprobs(
            states, LMHead.from_model(unwrapped_student), inputs["completion_ids"][mask], self.temperature
        )
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)

    # --- Loss ---

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        diagnose = self._is_logged_step
        with record_update_ratios(unwrapped_student) if diagnose else nullcontext({}) as update_ratios:
            student_states = self._student_hidden_states(unwrapped_student, inputs)
        teacher_scores = self.teacher.score(unwrapped_student, inputs)
        student_head = LMHead.from_model(unwrapped_student)

        loss_mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            loss_mask = loss_mask * inputs["tool_mask"]
        # If the model is split across devices, the backbone's last layer and the head can be on different devices
        mask = loss_mask.bool().to(student_head.weight.device)
        student_states, token_ids = student_states.to(mask.device), inputs["completion_ids"].to(mask.device)
        gap, kept = None, mask
        if self.args.prefix_rejection != "none":
            gap, kept = self._before_rejection(student_states, student_head, teacher_scores, token_ids, mask)
        student_states, token_ids, teacher = student_states[kept], token_ids[kept], teacher_scores.at(kept)

        if self.args.distillation_mode == "sampled_token":
            per_token_loss, entropy, kept_gap = self._sampled_token_loss(
                student_states, student_head, teacher, token_ids, inputs, kept
            )
            gap = kept_gap if gap is None else gap
        elif self.args.distillation_mode == "topk_logits":
            top = teacher.top_logprobs(self.args.distillation_topk)
            per_token_loss, entropy = topk_divergence(student_states, student_head, *top, self.beta, self.temperature)
        else:
            assert isinstance(teacher, StateScores)  # a served teacher is refused with "full_logits"
            both = student_states, student_head, teacher.states, teacher.head
            if self.use_liger_loss:
                per_token_loss = liger_divergence_sum(*both, self.beta, self.temperature)  # already summed, a scalar
                entropy = torch.full_like(token_ids, float("nan"), dtype=torch.float32)
            else:
                per_token_loss, entropy = full_divergence(*both, self.beta, self.temperature)

        if diagnose and gap is None:
            with torch.no_grad():
                logprobs, entropy = token_logprobs(student_states, student_head, token_ids, self.temperature)
            gap = teacher.token_logprobs(token_ids) - logprobs
        if gap is not None:
            self._diagnose_gap(gap, mask)
            if diagnose:
                self._advantages[self._mode].append(gap)
        if diagnose:
            for layer, ratios in update_ratios.items():
                if not any(inputs["num_image_tokens"]) and not any(inputs.get("num_video_tokens", [])):
                    ratios = ratios[:0]  # they come from the added blank image
                self._diagnose(f"cue_recovery/{layer}/update_ratio", ratios)

        loss = self._aggregate(per_token_loss, mask, kept, num_items_in_batch)
        return loss, entropy.sum(), kept.sum()

    @torch.no_grad()
    def _before_rejection(
        self,
        student_states: torch.Tensor,
        student_head: LMHead,
        teacher_scores: TeacherScores,
        token_ids: torch.Tensor,
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The teacher's log-probabilities minus the student's, `(tokens,)`, and which tokens come no later than the first
        one that the teacher rejects, `(batch, completion)`.
        """
        logprobs, _ = token_logprobs(student_states[mask], student_head, token_ids[mask], self.temperature)
        gap = teacher_scores.at(mask).token_logprobs(token_ids[mask]) - logprobs
        threshold = self.args.prefix_rejection_threshold
        ends = self._ends_sentence.to(token_ids.device)[token_ids] if self._ends_sentence is not None else None
        kept = before_rejection(gap, mask, threshold, ends)
        self._diagnose("prefix_rejection/kept", kept[mask].float())
        rejected = torch.zeros_like(mask).masked_scatter(mask, gap < -threshold)
        has_rejection = rejected.any(dim=1)
        position = rejected.long().argmax(dim=1) / mask.sum(dim=1).clamp(min=1)
        self._diagnose("prefix_rejection/completions", has_rejection.float())
        self._diagnose("prefix_rejection/position", position[has_rejection])
        return gap, kept

    def _sampled_token_loss(
        self,
        student_states: torch.Tensor,
        student_head: LMHead,
        teacher: TeacherScores,
        token_ids: torch.Tensor,
        inputs: dict[str, Any],
        mask: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss, entropy, and the teacher's log-probability minus the student's, each `(tokens,)` (Eq. 6-8)."""
        args = self.args
        logprobs, entropy = token_logprobs(student_states, student_head, token_ids, self.temperature)
        teacher_logprobs = teacher.token_logprobs(token_ids)
        old_logprobs = logprobs.detach()
        if "old_logprobs" in inputs:
            old_logprobs = inputs["old_logprobs"].to(mask.device)[mask]
        epsilon_high = args.epsilon if args.epsilon_high is None else args.epsilon_high
        per_token_loss, advantages, is_clipped = sampled_token_loss(
            logprobs, old_logprobs, teacher_logprobs, args.epsilon, epsilon_high, args.advantage_clip
        )
        if "sampling_logprobs" in inputs:
            sampling_logprobs = inputs["sampling_logprobs"].to(mask.device)[mask]
            sampling_ratio = importance_sampling_ratio(
                old_logprobs,
                sampling_logprobs,
                mask,
                args.vllm_importance_sampling_mode,
                args.vllm_importance_sampling_clip_min,
                args.vllm_importance_sampling_clip_max,
            )
            per_token_loss = per_token_loss * sampling_ratio
            difference = (old_logprobs - sampling_logprobs).abs()
            self._diagnose("sampling/sampling_logp_difference/mean", difference[~difference.isnan()])
            self._diagnose("sampling/importance_sampling_ratio/mean", sampling_ratio)
        self._diagnose("advantage/mean", advantages)
        self._diagnose("advantage/abs_mean", advantages.abs())
        self._diagnose("clip_fraction", is_clipped)
        return per_token_loss, entropy, teacher_logprobs - logprobs.detach()

    def _aggregate(
        self,
        per_token_loss: torch.Tensor,
        mask: torch.Tensor,
        kept: torch.Tensor,
        num_items_in_batch: torch.Tensor | float | None,
    ) -> torch.Tensor:
        """
        The loss of a micro-batch: its part of the mean over all tokens, or of the mean over completions of each
        completion's mean. All tokens of `mask` count in the means; those outside of `kept` have a loss of zero.
        """
        if self.args.loss_aggregation == "sequence":
            sequence_loss = per_token_loss.new_zeros(mask.shape).masked_scatter(kept, per_token_loss).sum(dim=1)
            sequence_loss = sequence_loss / mask.sum(dim=1).clamp(min=1)
            num_sequences = len(sequence_loss)
            if self.model.training:
                num_sequences *= self.args.gradient_accumulation_steps
            return sequence_loss.sum() / num_sequences
        num_items = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return per_token_loss.sum() / torch.as_tensor(num_items, device=mask.device)


def _make_row_checker(
    args: ViCuRConfig,
    config: PreTrainedConfig,
    processing_class: ProcessorMixin,
    server: TeacherServer | None,
    has_tools: bool,
    recovery_configs: list[CueRecoveryConfig],
) -> RowChecker:
    max_length = config.get_text_config().max_position_embeddings
    if server is not None:
        max_length = min(max_length, server.max_length)
    is_sharded = find_sharding(args) is not None
    return RowChecker(args, processing_class, max_length, has_tools, is_sharded, recovery_configs)
