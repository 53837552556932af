"""TRL's trainer as a base class for type checking of our mixins."""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
    from trl.trainer.distillation_trainer import DistillationTrainer

    from .teachers.teacher import Teacher
    from .vicur_config import ViCuRConfig

    class TRLTrainer(DistillationTrainer):
        """Narrows attributes whose annotations in transformers and TRL allow more than `check_options` does."""

        args: ViCuRConfig
        model: PreTrainedModel
        model_wrapped: nn.Module
        teacher: Teacher
        processing_class: ProcessorMixin
        train_dataset: Dataset | IterableDataset
        chat_template_kwargs: dict[str, Any]
        pad_to_multiple_of: int | None
        _signature_columns: list[str]
        _buffered_inputs: list[dict[str, Any]] | None
        _tokenizer: PreTrainedTokenizerBase

else:
    TRLTrainer = object  # the mixins work with any TRL trainer that generates rollouts
