"""What `push_to_hub` of a model that was trained uploads beside its weights."""

import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard
from transformers.utils import PushToHubMixin


if TYPE_CHECKING:
    from ..trainer.vicur_trainer import ViCuRTrainer


class ModelUpload(PushToHubMixin):
    """
    Takes the place of a model's `_upload_modified_files`, the last step of its `push_to_hub`, which has saved the
    weights and an empty form for a card until then: makes of them what the trainer saves.

    It keeps no trainer alive. What is copied or pickled with a model does as transformers does.

    Args:
        trainer ([`ViCuRTrainer`], *optional*):
            The trainer of the model.
    """

    def __init__(self, trainer: "ViCuRTrainer | None" = None):
        self._get_trainer = (lambda: None) if trainer is None else weakref.ref(trainer)

    def __reduce__(self):
        return type(self), ()

    def __call__(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        trainer = self._get_trainer()
        if trainer is not None:
            card = ModelCard.load(Path(working_dir, "README.md"))
            trainer.complete_model(str(working_dir), repo_id, card.data.tags)
            trainer.processing_class.save_pretrained(working_dir)
        return self._upload_modified_files(working_dir, repo_id, *args, **kwargs)
