"""The modules of trl_vicur that the tests of its couplings with other libraries inspect."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import trl_vicur


IN_OTHER_ENVIRONMENTS = ("vllm", "lmms_eval")  # tested by `.ci/vllm` and `.ci/lmms_eval`


def own_modules() -> Iterator[ModuleType]:
    """All modules that can be imported without vLLM and lmms-eval."""
    for info in pkgutil.walk_packages(trl_vicur.__path__, "trl_vicur."):
        if info.name.split(".")[1] not in IN_OTHER_ENVIRONMENTS:
            yield importlib.import_module(info.name)
