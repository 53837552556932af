"""Registers the PEFT method when PEFT is imported, so that `import trl_vicur` itself need not import PEFT."""

import importlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType


class _RegisterAfterPeft(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """
    Finds and imports PEFT as Python would, then imports `trl_vicur.cue_recovery`, which registers the method.

    PEFT has no entry points for methods of other packages (PEFT#2273 asks for them); with them, this class would be
    superfluous.
    """

    _loader: importlib.abc.Loader

    def find_spec(self, name: str, path=None, target=None):
        if name != "peft":
            return None
        # Many libraries only check whether PEFT is installed, and import it later or never, so keep the finder
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None  # Python sets it before it calls a loader
        module.__spec__.loader = module.__loader__ = self._loader
        sys.meta_path.remove(self)
        self._loader.exec_module(module)
        importlib.import_module("trl_vicur.cue_recovery")


def register_with_peft() -> None:
    """Register now if PEFT is already imported, otherwise right after it is imported."""
    if "peft" in sys.modules:
        importlib.import_module("trl_vicur.cue_recovery")
    else:
        sys.meta_path.insert(0, _RegisterAfterPeft())
