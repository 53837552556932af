"""
The model `trl_vicur` of [lmms-eval](https://github.com/EvolvingLMMs-Lab/lmms-eval), which finds it by the entry point
`lmms_eval.models`. Nothing here is imported without lmms-eval.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> "ModelManifest":
    """What lmms-eval asks the entry point for."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("trl_vicur", chat_class_path="trl_vicur.lmms_eval.model.ViCuRModel")
