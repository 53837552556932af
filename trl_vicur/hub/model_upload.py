"""Add the card and the processor to the folder that a trained model's `push_to_hub` uploads."""

import os
import weakref
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCard
from transformers.utils.hub import PushToHubMixin


class Publisher(Protocol):
    """A trainer that can complete the folder of its model."""

    @property
    def processing_class(self) -> PushToHubMixin: ...

    def complete_model(self, directory: str, model_id: str | None = None, tags: list[str] | None = None) -> None:
        """Remove local paths from a saved model and write the trainer's card into its folder."""
        ...


class ModelUpload(PushToHubMixin):
    """
    Replaces a model's `_upload_modified_files`, the last step of `push_to_hub`, which runs after the weights and an
    empty model card were saved. Adds the trainer's card and processor before the upload.

    It holds only a weak reference to the trainer. Copies of a model use transformers' own `push_to_hub`.

    Args:
        trainer ([`Publisher`], *optional*):
            The model's trainer.
    """

    def __init__(self, trainer: Publisher | None = None):
        self._get_trainer = (lambda: None) if trainer is None else weakref.ref(trainer)

    def __reduce__(self):
        return type(self), ()

    def __call__(self, working_dir: str | os.PathLike, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        trainer = self._get_trainer()
        if trainer is not None:
            card = ModelCard.load(Path(working_dir, "README.md"))
            trainer.complete_model(str(working_dir), repo_id, card.data.get("tags"))
            trainer.processing_class.save_pretrained(working_dir)
        return self._upload_modified_files(working_dir, repo_id, *args, **kwargs)
