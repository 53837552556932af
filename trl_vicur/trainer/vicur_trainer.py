import inspect
import json
import math
import os
import shutil
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, is_peft_model, send_to_device
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.nn import functional as F
from torch.utils.data import Sampler
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
    TrainerCallback,
    TrainerState,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput
from transformers.utils import ModelOutput
from trl import DistillationTrainer
from trl.data_utils import prepare_multimodal_messages
from trl.trainer.utils import get_config_model_id, pad

from ..cue_recovery import CueRecoveryConfig, record_update_ratios
from ..cue_recovery.positions import visual_token_ids
from ..data.images import read_image, read_video
from ..data.rows import row_images, row_videos
from ..data.teacher_prompt import add_privilege, hint_marker
from ..hub.local_traces import ignore_training_files, remove_local_base_model
from ..hub.model_card import complete_model_card, measured_metrics
from ..hub.model_upload import ModelUpload
from ..hub.names import hub_dataset_name, hub_model_name, naming_model
from .checkpoints import (
    BATCHES_NAME,
    FILE_LIST_NAME,
    ROLLOUTS_NAME,
    CheckpointError,
    batch_settings,
    check_adapter,
    check_batches,
    check_checkpoint,
    forget_best_checkpoint,
    get_last_checkpoint,
    write_file_list,
)
from .checks.adapter_base import (
    refusing_adapters_that_rewrite_the_base,
)
from .checks.datasets import check_dataset
from .checks.options import adapter_configs, check_options, check_something_trains
from .checks.rows import RowChecker, with_row_number
from .checks.sharding import find_sharding
from .checks.streams import ROW_NAME
from .collapse import CollapseCallback
from .lm_head import LMHead
from .losses import (
    before_rejection,
    full_divergence,
    importance_sampling_ratio,
    liger_divergence_sum,
    sampled_token_loss,
    token_logprobs,
    topk_divergence,
)
from .mixed_precision import ForwardRedirection, autocast, compute_dtype
from .privilege import get_privilege
from .sentences import sentence_end_tokens
from .teachers.building import build_teacher
from .teachers.scores import StateScores, TeacherScores
from .teachers.separate_teacher import SeparateTeacher
from .teachers.teacher_server import TeacherServer
from .trackers import log_histogram
from .training_settings import training_settings
from .vicur_config import ViCuRConfig
from .vision.blank_image import BlankImageRow
from .vision.features import get_backbone, is_vision_frozen, lend_features, record_features, split_by_sample
from .vision.image_processing import images_processed_once
from .vision.videos import VIDEO_KEYS, add_videos, split_videos
from .vllm_rollouts import StudentGeneration, engine_with_module


NUM_SEGMENTS = 4


class ViCuRTrainer(DistillationTrainer):
    """
    Trainer for visual-cue-recovery distillation, as introduced in [ViCuR: Visual Cues as Recoverable Privilege for
    Multimodal On-Policy Distillation](https://huggingface.co/papers/2606.05718).

    The student generates completions on its own prompt; the teacher scores the very same tokens on a prompt that also
    holds a privileged text, by default a cue that describes the visible evidence; the student moves toward the
    teacher. With `peft_config=CueRecoveryConfig()` the student gets the module that recovers the evidence from the
    image. It is TRL's [`~trl.DistillationTrainer`] in everything else.

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
            Vision-language model to be trained, or its id or path.
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            A larger teacher with the same vocabulary (stronger-teacher OPD). `None` is self-distillation; then
            `args.teacher_model_kind` says which weights of the student teach. With `args.teacher_model_server_url`
            the name of the model that the server must serve; `None` takes whichever it does.
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
            Further callbacks.
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
            misses a column or holds a row that cannot be trained on (the row is named by its number), or if the
            teacher's server does not fit.
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

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        teacher_model: str | PreTrainedModel | None = None,
        args: ViCuRConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
    ):
        model_name = model if isinstance(model, str) else get_config_model_id(model.config)
        if args is None:
            args = ViCuRConfig(f"{model_name.split('/')[-1]}-ViCuR")
        revision = (args.model_init_kwargs or {}).get("revision")
        with naming_model(model_name):
            if processing_class is None:
                processing_class = AutoProcessor.from_pretrained(
                    model_name,
                    revision=revision,
                    truncation_side="left",
                    padding_side="left",
                    trust_remote_code=args.trust_remote_code,
                )
            if isinstance(model, str):
                config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)
            else:
                config = model.config
        sharding = find_sharding(args)
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
            sharding=sharding,
        )
        peft_configs = adapter_configs(model, peft_config)
        recovery_configs = [each for each in peft_configs if isinstance(each, CueRecoveryConfig)]
        if isinstance(peft_config, CueRecoveryConfig):
            peft_config.resolve_sink_token(processing_class)

        # All rows are checked before the model is even loaded
        max_length = config.get_text_config().max_position_embeddings
        server = None
        if args.teacher_model_server_url is not None:
            server = TeacherServer.from_config(args, processing_class, teacher_model)
            max_length = min(max_length, server.max_length)
            teacher_model = None
        self._row_checker = RowChecker(
            args, processing_class, max_length, bool(tools), sharding is not None, recovery_configs
        )
        if train_dataset is not None:
            batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
            train_dataset = check_dataset(train_dataset, "train_dataset", self._row_checker, args, min_rows=batch_size)
        if eval_dataset is not None:
            eval_dataset = self._check_eval_dataset(eval_dataset)

        # Liger's fused JSD runs anywhere, but the Triton kernels that `Trainer` puts into the model need a GPU
        self.use_liger_loss = args.use_liger_kernel
        if args.use_liger_kernel and args.device.type == "cpu":
            warnings.warn(
                "`use_liger_kernel=True` on a CPU: Liger's Triton kernels need a GPU and are left out of the model; "
                "only its fused loss is used."
            )
            args.use_liger_kernel = False
        rolls_out_with_module = args.use_vllm and recovery_configs
        engine = engine_with_module(lambda: self.model) if rolls_out_with_module else nullcontext()
        with engine, refusing_adapters_that_rewrite_the_base():
            super().__init__(
                model=model,
                teacher_model=teacher_model,
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
        if args.use_vllm:
            self.vllm_generation = StudentGeneration(self.vllm_generation, *recovery_configs)
        self._has_module = bool(recovery_configs)
        self._corrects_vllm = (
            args.use_vllm
            and args.vllm_importance_sampling_correction
            and args.distillation_mode == "sampled_token"
            and not tools  # whose rollouts are several generations
        )

        check_something_trains(self.model)
        for each in (self.model, self.teacher_model):
            if each is not None:
                LMHead.from_model(self.accelerator.unwrap_model(each))  # raises if the losses cannot read the head
        self._forward_redirection = ForwardRedirection(self.accelerator.device.type)
        if self.is_fsdp_enabled:
            policy = self.accelerator.state.fsdp_plugin.mixed_precision_policy
            if policy is not None:
                # Accelerate's policy rounds a forward's outputs, here the loss
                policy = replace(policy, output_dtype=None)
                self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
            # By it `generate` keeps every process until all have finished. Accelerate leaves it unset
            student = self.model.get_base_model() if is_peft_model(self.model) else self.model
            student._is_fsdp_managed_module = True
        self.teacher = build_teacher(
            args,
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

        self._blank_image_row = BlankImageRow(
            self.processing_class, self.model.config.image_token_id, self.chat_template_kwargs
        )
        self._vision_is_frozen = is_vision_frozen(self.model)
        self._hint_marker = hint_marker(args.teacher_prompt_template)
        # Whether a token ends a sentence, `(vocabulary,)`
        self._ends_sentence = None
        if args.prefix_rejection == "sentence":
            vocab_size = self.model.config.get_text_config().vocab_size
            self._ends_sentence = sentence_end_tokens(self._tokenizer, vocab_size)
        # What `_get_last_hidden_state` takes beside the tokens, e.g. `pixel_values`
        self._multimodal_keys = [*inspect.signature(super()._get_last_hidden_state).parameters][4:] + [*VIDEO_KEYS]
        # Sums and counts of the current `compute_loss` call
        self._diagnostics: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        # Advantages before their clip, `(tokens,)` each, of the micro-batches that the next histogram is made of
        self._advantages: dict[str, list[torch.Tensor]] = {"train": [], "eval": []}
        self.add_callback(CollapseCallback(self))
        self.model._upload_modified_files = ModelUpload(self)

    def _check_eval_dataset(
        self, dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset]
    ) -> Dataset | IterableDataset | dict[str, Dataset | IterableDataset]:
        """See [`check_dataset`]; each dataset of a dict is named by its key."""
        if not isinstance(dataset, dict):
            return check_dataset(dataset, "eval_dataset", self._row_checker, self._row_checker.args)
        return {
            key: check_dataset(each, f"eval_dataset[{key!r}]", self._row_checker, self._row_checker.args)
            for key, each in dataset.items()
        }

    def evaluate(
        self,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        # Datasets passed to `__init__` were checked there; a string names one of them
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._check_eval_dataset(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self,
        test_dataset: Dataset | IterableDataset,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        test_dataset = check_dataset(test_dataset, "test_dataset", self._row_checker, self.args)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = [self.args.cue_column, self.args.answer_column, "videos", "video", ROW_NAME]
        self._signature_columns += [column for column in columns if column not in self._signature_columns]

    # --- Rollouts: the student's prompt, its completion, and the teacher's prompt ---

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        self._train_sampler = super()._get_train_sampler(dataset)
        self._train_sampler.repeat_count *= self.args.num_iterations
        return self._train_sampler

    @property
    def _vision_is_sharded(self) -> bool:
        """Whether a rank can encode images only if all ranks do."""
        return self.is_fsdp_enabled and self.accelerator.num_processes > 1

    @property
    def _is_within_rollouts(self) -> bool:
        """Whether the next micro-batch is of the same rollouts as the one before."""
        return self._step % (self.args.gradient_accumulation_steps * self.args.num_iterations) != 0

    def _prepare_inputs(self, generation_batch: dict[str, torch.Tensor | Any]) -> dict[str, torch.Tensor | Any]:
        if not self.model.training or self.args.num_iterations == 1:
            return super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not None and self._is_within_rollouts:
            return self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        # Without a buffer TRL generates; with one, it does so at every multiple of `accumulation_steps`
        inputs = super()._prepare_inputs(generation_batch)
        if self.args.distillation_mode == "sampled_token":
            unwrapped_student = self.accelerator.unwrap_model(self.model_wrapped)
            for batch in self._buffered_inputs:
                with torch.no_grad(), self.compute_loss_context_manager():
                    batch["old_logprobs"] = self._forward_redirection(
                        self.model_wrapped, unwrapped_student, self._student_logprobs, unwrapped_student, batch
                    )
        return inputs

    def _tokenize_prompts(self, prompts: list):
        # Gemma 4's processor pads by default, and TRL would keep the padding in the prompts. Turn padding off rather
        # than strip it: a prompt may begin with a bos token that is also the pad token
        chat_template_kwargs = self.chat_template_kwargs
        processor_kwargs = {**chat_template_kwargs.get("processor_kwargs", {}), "padding": False}
        self.chat_template_kwargs = {**chat_template_kwargs, "processor_kwargs": processor_kwargs}
        # TRL#6718 also returns prompts for vLLM, with unexpanded images. `StudentGeneration` derives them itself
        try:
            prompt_ids, images, multimodal_fields, *for_vllm = super()._tokenize_prompts(prompts)
        finally:
            self.chat_template_kwargs = chat_template_kwargs
        if len(for_vllm) > 1:
            raise RuntimeError(
                f"`DistillationTrainer._tokenize_prompts` returns {3 + len(for_vllm)} values in TRL "
                f"{version('trl')}; trl-vicur {version('trl-vicur')} supports 3 or 4. Install "
                "`trl==1.16.*`, or a newer trl-vicur."
            )
        return prompt_ids, images, multimodal_fields, *(prompt_ids for _ in for_vllm)

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        has_videos = "pixel_values_videos" in multimodal_fields
        # A sampled video token would mismatch the video features, as an image token would, which TRL suppresses
        suppressed = self.generation_kwargs["suppress_tokens"]
        if has_videos:
            suppressed = [*(suppressed or []), *visual_token_ids(self.model.config)]
        self.generation_config.suppress_tokens = suppressed
        if self.use_vllm:
            return super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        needs_image = images is None and not has_videos and self._vision_is_sharded
        if needs_image:
            prompt_ids, multimodal_fields = self._blank_image_row.add_to_prompts(prompt_ids, multimodal_fields)
        with autocast(self.accelerator):  # accelerate wraps the forward of a PEFT model, not that of its base
            completion_ids = super()._generate_single_turn(prompt_ids, images, multimodal_fields, *args, **kwargs)
        return completion_ids[:-1] if needs_image else completion_ids

    def _generate(self, prompts: list):
        prompt_ids, completion_ids, tool_mask, images, tool_images, *others = super()._generate(prompts)
        if self._has_module and any(tool_images):
            raise ValueError(
                f"A tool returned an image ({sum(map(bool, tool_images))} of {len(prompts)} prompts), but a recovery "
                "module reads all images of a conversation into one sink: the turns before the tool's image would be "
                "scored with another sink than the one they were sampled with. Let the tool return text, or train "
                "without the module."
            )
        if self._has_videos(prompts):
            images = None  # TRL would process them together with prompts whose videos it does not have
        elif images is not None:
            # TRL marks text-only rows with None, which processors refuse
            images = [image_list or [] for image_list in images]
        return prompt_ids, completion_ids, tool_mask, images, tool_images, *others

    def _generate_and_score_completions(self, inputs: list[dict[str, torch.Tensor | Any]]) -> dict[str, Any]:
        rows = []
        for row in inputs:
            if ROW_NAME in row:
                row = {**row}
                with_row_number(self._row_checker.check, lambda row=row: row, row.pop(ROW_NAME))
            # As the checks and the heat maps see them; TRL and the processors read each kind of file in another way
            images = [read_image(image) for image in row_images(row)]
            videos = [read_video(video) for video in row_videos(row)]
            rows.append({**row, "images": images, "prompt": add_videos(row["prompt"], videos, len(images))})
        inputs = rows

        student = self.accelerator.unwrap_model(self.model_wrapped)
        self._vision_is_frozen = is_vision_frozen(student)
        rolls_out = not self.use_vllm and (self._shares_features() or self._shares_features(of_teacher=True))
        recording = record_features(student) if rolls_out else nullcontext()
        with ExitStack() as stack:
            for name in ("image_processor", "video_processor"):
                if hasattr(self.processing_class, name):
                    stack.enter_context(images_processed_once(getattr(self.processing_class, name)))
            with recording as recorded:
                output = super()._generate_and_score_completions(inputs)
            if self._has_videos([row["prompt"] for row in inputs]):
                output.update(self._visual_inputs(inputs, output))
            if self.args.privilege != "none":
                output.update(self._teacher_prompts(inputs, output))
            output.update(self.teacher.prepare(self._teacher_conversations(inputs), output))
        if self._corrects_vllm:
            output["sampling_logprobs"] = pad(
                [torch.tensor(logprobs) for logprobs in self.vllm_generation.sampled_logprobs],
                padding_value=0.0,
                padding_side="right",
                pad_to_multiple_of=self.pad_to_multiple_of,
            ).to(self.accelerator.device)
        token_ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)  # tools return images, too
        output["num_image_tokens"] = (token_ids == self.model.config.image_token_id).sum(dim=1).tolist()
        if "video_grid_thw" in output:
            output["num_video_tokens"] = (token_ids == self.model.config.video_token_id).sum(dim=1).tolist()
        if "pixel_attention_mask" in output and "spatial_shapes" not in output:
            # Pixels of Idefics and SmolVLM have a row per sample. TRL sees it by the number of rows, and would cut
            # them by image where there are as many images as samples
            del output["num_images"]
        if rolls_out:
            self._note_features(recorded, output)
        self._log_hint_leakage(output["completion_ids"])
        return output

    @staticmethod
    def _has_videos(prompts: list[list[dict[str, Any]]]) -> bool:
        contents = [message.get("content") for prompt in prompts for message in prompt]
        return any(block["type"] == "video" for content in contents if isinstance(content, list) for block in content)

    def _pad_left(self, sequences: list[list[int]], padding_value: int = 0) -> torch.Tensor:
        return pad(
            [torch.tensor(sequence) for sequence in sequences],
            padding_value=padding_value,
            padding_side="left",
            pad_to_multiple_of=self.pad_to_multiple_of,
        ).to(self.accelerator.device)

    def _visual_inputs(self, rows: list[dict[str, Any]], output: dict[str, Any]) -> dict[str, Any]:
        """What the model takes of images and videos beside the tokens, as the rollout had it."""
        prompts = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
        _, _, fields, *_ = self._tokenize_prompts(prompts)
        inputs = {}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in fields:
                of_prompt = self._pad_left([list(types) for types in fields[name]])
                inputs[name] = F.pad(of_prompt, (0, output["completion_ids"].shape[1]))
        if "pixel_values" in fields:
            inputs |= {name: fields[name] for name in ("pixel_values", "image_grid_thw")}
            inputs["num_images"] = [len(row["images"]) for row in rows]
        inputs |= split_videos(fields, [len(row_videos(row)) for row in rows])
        return send_to_device(inputs, self.accelerator.device)

    def _teacher_conversations(self, rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        """What the teacher reads of each row, images and videos included."""
        conversations = []
        for row in rows:
            prompt = add_privilege(row["prompt"], get_privilege(row, self.args), self.args.teacher_prompt_template)
            conversations.append(prepare_multimodal_messages(prompt, images=row_images(row)))
        return conversations

    def _teacher_prompts(self, rows: list[dict[str, Any]], output: dict[str, Any]) -> dict[str, torch.Tensor]:
        """The teacher's prompts, left-padded; their images and videos are the student's."""
        prompt_ids, _, multimodal_fields, *_ = self._tokenize_prompts(self._teacher_conversations(rows))
        teacher = {
            "teacher_prompt_ids": self._pad_left(prompt_ids, self._tokenizer.pad_token_id),
            "teacher_prompt_mask": self._pad_left([[1] * len(ids) for ids in prompt_ids]),
        }
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in output:
                teacher[f"teacher_{name}"] = self._pad_left([list(types) for types in multimodal_fields[name]])
        return teacher

    def _log_hint_leakage(self, completion_ids: torch.Tensor) -> None:
        """
        Share of the completions that speak of the hint, which the student never saw, and how often a completion does
        so (ViCuR, Table 8: samples and occurrences).
        """
        if not self._hint_marker:
            return
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        counts = torch.tensor([float(text.count(self._hint_marker)) for text in texts], device=completion_ids.device)
        counts = self.accelerator.gather(counts)
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["hint_leakage"].append((counts > 0).float().mean().item())
        self._metrics[mode]["hint_leakage/occurrences"].append(counts.mean().item())

    # --- Features of images and videos: computed once for all passes that have the same vision weights ---

    def _shares_features(self, of_teacher: bool = False) -> bool:
        """Whether the student's pass, or the teacher's, would compute the features that the rollout did."""
        if self.args.share_vision_features == "never" or self.tools:  # tools can return further images
            return False
        return self.teacher.shares_vision_features(self._vision_is_frozen) if of_teacher else self._vision_is_frozen

    @contextmanager
    def _shared_features(
        self, unwrapped_student: torch.nn.Module, inputs: dict[str, Any], of_teacher: bool = False
    ) -> Iterator[bool]:
        """
        While active, the student's images and videos are encoded only if no pass over these inputs has done it yet.
        Yields whether they are.
        """
        features = {kind: inputs[f"{kind}_features"] for kind in ("image", "video") if f"{kind}_features" in inputs}
        if not self._shares_features(of_teacher):
            yield True
        elif features:
            with lend_features(unwrapped_student, features):
                yield False
        else:
            with record_features(unwrapped_student) as recorded:
                yield True
            self._note_features(recorded, inputs)

    def _note_features(self, recorded: dict[str, list[ModelOutput]], inputs: dict[str, Any]) -> None:
        """Add them to a batch, by sample, so that they are shuffled, split and freed with it."""
        num_samples = len(inputs["num_image_tokens"])
        num_tokens = {kind: inputs.get(f"num_{kind}_tokens", [0] * num_samples) for kind in ("image", "video")}
        if not any(map(any, num_tokens.values())) and self._vision_is_sharded:
            num_tokens["image"] = [*num_tokens["image"], self._blank_image_row.num_image_tokens]
        samples = {
            kind: split_by_sample(recorded[kind][0], numbers) if len(recorded[kind]) == 1 else None
            for kind, numbers in num_tokens.items()
            if any(numbers)
        }
        has_features = bool(samples) and None not in samples.values()
        if self._vision_is_sharded:
            # A rank that encodes images again alone would wait for the others
            has_features = all(gather_object([has_features]))
        if has_features:
            inputs.update({f"{kind}_features": of_kind[:num_samples] for kind, of_kind in samples.items()})

    # --- Hidden states of student and teacher at the same completion tokens ---

    def _completion_hidden_states(
        self, model: torch.nn.Module, inputs: dict[str, Any], encodes_images: bool = True
    ) -> torch.Tensor:
        """Hidden states that predict the completion tokens, `(batch, completion, hidden)`."""
        input_ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention_mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        completion_length = inputs["completion_ids"].size(1)
        fields = self._multimodal_inputs(inputs)
        # Ranks wait for each other to gather shards of the vision tower, and to reduce its gradients
        needs_gradients = torch.is_grad_enabled() and not self._vision_is_frozen
        is_gathered = self._vision_is_sharded or (needs_gradients and self.accelerator.num_processes > 1)
        has_visuals = "pixel_values" in fields or "pixel_values_videos" in fields
        if has_visuals or not (encodes_images and is_gathered):
            return self._get_last_hidden_state(model, input_ids, attention_mask, completion_length, **fields)
        input_ids, attention_mask, fields = self._blank_image_row.add_to_batch(input_ids, attention_mask, fields)
        fields = {key: fields[key] for key in self._multimodal_keys if key in fields}
        return self._get_last_hidden_state(model, input_ids, attention_mask, completion_length, **fields)[:-1]

    def _multimodal_inputs(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        # Rows of this micro-batch may have no image, or no video, though the generation batch had some
        has_images, has_videos = (any(inputs.get(f"num_{kind}_tokens", [])) for kind in ("image", "video"))
        multimodal_inputs = {}
        for key in self._multimodal_keys:
            if key in VIDEO_KEYS:
                if has_videos and key in inputs:
                    multimodal_inputs[key] = torch.cat(inputs[key])
            elif key in inputs and (has_images or key.endswith("token_type_ids")):
                multimodal_inputs[key] = inputs[key]
        return multimodal_inputs

    def _get_last_hidden_state(self, unwrapped_model, *args, **multimodal_inputs):
        # TRL's method accepts no video inputs
        videos = {key: multimodal_inputs.pop(key) for key in VIDEO_KEYS if key in multimodal_inputs}
        with ExitStack() as stack:
            if videos:
                hook = get_backbone(unwrapped_model).register_forward_pre_hook(
                    lambda backbone, args, kwargs: (args, {**kwargs, **videos}), with_kwargs=True
                )
                stack.callback(hook.remove)
            with autocast(self.accelerator):
                states = super()._get_last_hidden_state(unwrapped_model, *args, **multimodal_inputs)
        # The dtype in which autocast would pass them to the head, so that losses see the distribution that is sampled
        return states.to(compute_dtype(self.accelerator) or states.dtype)

    def _student_hidden_states(self, unwrapped_student: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        with self._shared_features(unwrapped_student, inputs) as encodes_images:
            return self._completion_hidden_states(unwrapped_student, inputs, encodes_images)

    def _teacher_hidden_states(self, unwrapped_teacher: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """The teacher's hidden states for the same completion tokens after its own prompt."""
        if "teacher_prompt_ids" in inputs:
            prompt = {name: inputs[f"teacher_{name}"] for name in ("prompt_ids", "prompt_mask")}
            for name in ("token_type_ids", "mm_token_type_ids"):
                if name in inputs:
                    of_completion = inputs[name][:, inputs["prompt_ids"].size(1) :]
                    prompt[name] = torch.cat([inputs[f"teacher_{name}"], of_completion], dim=1)
            inputs = {**inputs, **prompt}
        with self._shared_features(unwrapped_teacher, inputs, of_teacher=True) as encodes_images:
            return self._completion_hidden_states(unwrapped_teacher, inputs, encodes_images)

    def _student_logprobs(self, unwrapped_student: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of the completion tokens, `(batch, completion)`; zero on padding."""
        mask = inputs["completion_mask"].bool()
        states = self._student_hidden_states(unwrapped_student, inputs)[mask]
        logprobs, _ = token_logprobs(
            states, LMHead.from_model(unwrapped_student), inputs["completion_ids"][mask], self.temperature
        )
        return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)

    # --- Loss ---

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._diagnostics = {}
        output = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # After the forward, so that the collective does not run inside of it; every process has the same keys
        if self._diagnostics:
            mode = "train" if self.model.training else "eval"
            totals = torch.stack([torch.stack([s.float(), n.float()]) for s, n in self._diagnostics.values()])
            totals = self.accelerator.reduce(totals, reduction="sum").tolist()
            for name, (total, count) in zip(self._diagnostics, totals, strict=True):
                if count:  # short completions have no token in some of their segments
                    self._metrics[mode][name].append(total / count)
        return output

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        # Diagnostics that need another projection run only in steps that are logged
        diagnose = not self.model.training or (self.state.global_step + 1) % max(1, int(self.state.logging_steps)) == 0

        with record_update_ratios(unwrapped_student) if diagnose else nullcontext({}) as update_ratios:
            student_states = self._student_hidden_states(unwrapped_student, inputs)
        teacher_scores = self.teacher.score(unwrapped_student, inputs)
        student_head = LMHead.from_model(unwrapped_student)

        loss_mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            loss_mask = loss_mask * inputs["tool_mask"]
        # With the model split across devices, the backbone can end on another device than the head
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
            self._advantages["train" if self.model.training else "eval"].append(gap)
            for layer, ratios in update_ratios.items():
                if not any(inputs["num_image_tokens"]) and not any(inputs.get("num_video_tokens", [])):
                    ratios = ratios[:0]  # of a blank image
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
        The teacher's minus the student's log-probabilities, `(tokens,)`, and which tokens come no later than the
        first one that the teacher rejects, `(batch, completion)`.
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
        """Loss, entropy, and the teacher's minus the student's log-probability, each `(tokens,)` (Eq. 6-8)."""
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
        The loss of a micro-batch: its share of the mean over all tokens of `mask`, or over all completions' means, of
        which only the tokens of `kept` have a loss.
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        mode = "train" if self.model.training else "eval"
        if self._advantages[mode]:
            advantages = torch.cat(self._advantages[mode])
            self._advantages[mode].clear()
            advantages = self.accelerator.pad_across_processes(advantages, pad_index=float("nan"))
            advantages = self.accelerator.gather(advantages)
            advantages = advantages[~advantages.isnan()]
            if self.is_world_process_zero() and len(advantages):
                name = f"{mode}/advantage/histogram"
                log_histogram(self.callback_handler.callbacks, name, advantages, self.state.global_step)

    def _diagnose(self, name: str, values: torch.Tensor) -> None:
        """Note values whose mean over all processes `compute_loss` logs."""
        self._diagnostics[name] = (values.detach().sum(), torch.tensor(values.numel(), device=values.device))

    def _diagnose_gap(self, gap: torch.Tensor, mask: torch.Tensor) -> None:
        """Teacher's minus student's log-probability, over whole completions and over their four equal segments."""
        self._diagnose("logprob_gap/mean", gap)
        position = (mask.cumsum(dim=1) - 1)[mask]
        length = mask.sum(dim=1, keepdim=True).expand_as(mask)[mask]
        segment = position * NUM_SEGMENTS // length
        for index in range(NUM_SEGMENTS):
            self._diagnose(f"logprob_gap/segment_{index + 1}", gap[segment == index])

    # --- Checkpoints and the Hub ---

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ):
        dataset_name = hub_dataset_name(self.train_dataset, dataset_name)
        super().create_model_card(model_name, dataset_name, tags)
        if not self.is_world_process_zero():
            return
        peft_config = self.model.peft_config[self.model.active_adapter] if is_peft_model(self.model) else None
        is_recovery = isinstance(peft_config, CueRecoveryConfig)
        if is_recovery:
            names = ("layer_interval", "sink_token", "r", "train_base")
            what_trains = {f"`{name}`": getattr(peft_config, name) for name in names}
        else:
            what_trains = {"trained": "all weights" if peft_config is None else peft_config.peft_type.value}
        complete_model_card(
            os.path.join(self.args.output_dir, "README.md"),
            model_name=model_name,
            model_id=self.hub_model_id or self.args.hub_model_id,
            base_model=hub_model_name(get_config_model_id(self.model.config)),
            dataset_name=dataset_name,
            settings=training_settings(self.args, self.teacher.description, what_trains),
            measured=measured_metrics(self.state.log_history),
            max_model_len=min(16384, self.model.config.get_text_config().max_position_embeddings),
            is_adapter=peft_config is not None,
            is_recovery=is_recovery,
        )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        output_dir = self.args.output_dir if output_dir is None else output_dir
        if self.is_world_process_zero():
            ignore_training_files(output_dir)
            self.complete_model(output_dir, self.hub_model_id)

    def complete_model(self, directory: str, model_id: str | None = None, tags: list[str] | None = None) -> None:
        """
        Make of a saved model one that may leave this machine: without a path on it, and with the trainer's card, in
        place of the form that PEFT and transformers leave there to be filled in.

        Args:
            directory (`str`):
                Where the model is saved.
            model_id (`str`, *optional*):
                Its id on the Hub, if it has one.
            tags (`list[str]`, *optional*):
                Further tags of the card.
        """
        remove_local_base_model(directory)
        hub_model_id, self.hub_model_id = self.hub_model_id, model_id
        try:
            name = Path(model_id or self.args.hub_model_id or self.args.output_dir).name
            self.create_model_card(model_name=name, tags=tags)
        finally:
            self.hub_model_id = hub_model_id
        card = Path(self.args.output_dir, "README.md").read_bytes()
        Path(directory, "README.md").write_bytes(card)

    def init_hf_repo(self, *args, **kwargs) -> None:  # transformers 5.16 has no `private` yet
        super().init_hf_repo(*args, **kwargs)
        if self.is_world_process_zero():
            ignore_training_files(self.args.output_dir)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        Train, as [`~transformers.Trainer.train`] does.

        A run that was killed at any moment goes on with `resume_from_checkpoint=True` from the newest checkpoint that
        is whole, to the same weights as if it had not been killed (on the same machine and, for bits, on a CPU).

        Raises:
            `CheckpointError` (a `ValueError`): If the checkpoint is not whole or does not fit what is trained.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise CheckpointError(
                    f"`resume_from_checkpoint=True`, but {self.args.output_dir!r} holds no checkpoint that is whole. "
                    "Train without it to start anew."
                )
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        if resume_from_checkpoint:
            check_batches(resume_from_checkpoint, self.args, self.train_dataset)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model, trial):
        run_dir = self._get_output_dir(trial=trial)
        directory = Path(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:
            # Written last, they seal the checkpoint; those of an earlier run must not seal a part of this one
            for name in (TRAINER_STATE_NAME, FILE_LIST_NAME):
                (directory / name).unlink(missing_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            error.add_note(
                f"{directory} could not be saved; its disk has {shutil.disk_usage(run_dir).free:,} bytes left. The "
                f"newest whole checkpoint is {get_last_checkpoint(run_dir)}; `train(resume_from_checkpoint=True)` "
                "goes on from there."
            )
            raise

    def _save_rng_state(self, output_dir):
        # Trainer's last file but the one that seals the checkpoint
        super()._save_rng_state(output_dir)
        if self.args.should_save:
            self.teacher.save(output_dir)
        if self._is_within_rollouts:
            torch.save(self._buffered_inputs, self._rollouts_path(output_dir))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            settings = batch_settings(self.args, self.train_dataset)
            Path(output_dir, BATCHES_NAME).write_text(json.dumps(settings, indent=2), encoding="utf-8")
            write_file_list(output_dir)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self.is_world_process_zero():
            forget_best_checkpoint(checkpoint_folder)
        super()._push_from_checkpoint(checkpoint_folder)

    def _rollouts_path(self, checkpoint: str) -> str:
        """File with this process's generation batch, in checkpoints between two steps on the same rollouts."""
        return os.path.join(checkpoint, ROLLOUTS_NAME.format(self.args.process_index))

    def _load_best_model(self):
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        if is_whole and is_peft_model(self.model) and self.model.active_adapter != "default":
            # PEFT saves an adapter that is not named "default" in a subfolder, where Trainer does not look
            name = self.model.active_adapter
            self.model.load_adapter(os.path.join(self.state.best_model_checkpoint, name), name)
        else:
            super()._load_best_model()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        check_adapter(resume_from_checkpoint, self.model)
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except ValueError as error:  # of weights that are missing or not finite
            raise CheckpointError(str(error)) from error
        self.teacher.load(resume_from_checkpoint)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        epochs_trained, steps_trained_in_current_epoch = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        # Its path was left out, or the folder has been moved since (which transformers 5.16 does not notice)
        best = self.state.best_model_checkpoint
        if self.state.best_global_step and not (best and Path(best).is_dir()):
            best = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
        # TRL starts counting anew, with no rollouts, and its sampler with the order of the first epoch
        accumulation_steps = self.args.gradient_accumulation_steps
        self._step = self.state.global_step * accumulation_steps
        self._buffered_inputs = None
        if self._is_within_rollouts:
            path = self._rollouts_path(resume_from_checkpoint)
            # By way of the CPU: a process's own device may be none that `torch.load` knows ("cpu:0")
            rollouts = torch.load(path, map_location="cpu", weights_only=True)
            self._buffered_inputs = send_to_device(rollouts, self.args.device)
        if isinstance(self.train_dataset, IterableDataset):
            # Trainer assumes epochs of `max_steps` steps, but the stream may have restarted earlier, and the
            # checkpoint's `max_steps` may differ. An epoch of exactly 1 is all these steps, within a longer stream
            epoch = self.state.epoch or 0.0
            epochs_trained = max(0, math.ceil(epoch) - 1)
            if resume_from_checkpoint is not None and not self.args.ignore_data_skip:
                saved_state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, TRAINER_STATE_NAME))
                steps = round((epoch - epochs_trained) * saved_state.max_steps)
                steps_trained_in_current_epoch = steps * accumulation_steps
        elif self._train_sampler.shuffle:
            for _ in range(epochs_trained):
                torch.randperm(self._train_sampler.num_samples, generator=self._train_sampler.generator)
        if self.state.global_step >= max_steps:  # a run that has ended; Trainer would take another step
            epochs_trained = num_train_epochs
        return epochs_trained, steps_trained_in_current_epoch
