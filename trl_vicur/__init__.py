"""Visual-cue-recovery distillation (ViCuR, arXiv 2606.05718) for TRL, PEFT and transformers."""

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

from ._peft_registration import register_with_peft


if TYPE_CHECKING:
    from .cue_recovery import CueRecoveryConfig, CueRecoveryModel
    from .trainer import ViCuRConfig, ViCuRTrainer

__version__ = version("trl-vicur")
__all__ = ["CueRecoveryConfig", "CueRecoveryModel", "ViCuRConfig", "ViCuRTrainer"]

_MODULES = {
    "CueRecoveryConfig": "cue_recovery",
    "CueRecoveryModel": "cue_recovery",
    "ViCuRConfig": "trainer",
    "ViCuRTrainer": "trainer",
}


def __getattr__(name: str):
    # torch, transformers, PEFT and TRL are imported when a public name is first used
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


register_with_peft()
