"""
The model `trl_vicur` for [lmms-eval](https://github.com/EvolvingLMMs-Lab/lmms-eval), which finds it through the entry
point `lmms_eval.models`. Nothing here is imported unless lmms-eval is installed.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """Describe the model to lmms-eval, which calls this through the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("trl_vicur", chat_class_path="trl_vicur.lmms_eval.model.ViCuRModel")
