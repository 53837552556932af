"""The modules of trl_vicur, as the tests of its couplings with other libraries go through them."""

import importlib
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import trl_vicur


WITH_PACKAGES_OF_THEIR_OWN = ("vllm", "lmms_eval")  # tested against these, by `.ci/vllm` and `.ci/lmms_eval`


def own_modules() -> Iterator[ModuleType]:
    """All modules that import where the packages of `.ci/vllm` and `.ci/lmms_eval` are not installed."""
    for info in pkgutil.walk_packages(trl_vicur.__path__, "trl_vicur."):
        if info.name.split(".")[1] not in WITH_PACKAGES_OF_THEIR_OWN:
            yield importlib.import_module(info.name)
