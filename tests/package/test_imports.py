"""The rooms of the package: imports go downwards, and never in a circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest

import trl_vicur


ROOT = Path(trl_vicur.__file__).parent

# The lowest room first; a room imports only from rooms that come earlier in this list
LEVELS = [
    ["extras"],
    ["data"],
    ["hub", "html_page", "command_parser"],
    ["cue_recovery"],
    ["generation", "vllm"],
    ["trainer"],
    ["cues"],
    ["comparison", "heatmap", "lmms_eval", "cli"],
    ["train"],
    ["doctor"],
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported_modules(name: str) -> set[str]:
    """The package's modules that a module imports, within functions and under TYPE_CHECKING as well."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            # What is imported is a module itself, or a name in one
            found |= {full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return found & MODULES.keys()


def room(name: str) -> str:
    return name.split(".")[1]


def test_modules_do_not_import_in_a_circle():
    try:
        TopologicalSorter({name: imported_modules(name) for name in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_rooms_import_only_from_lower_rooms():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    inner = MODULES.keys() - {"trl_vicur", "trl_vicur._peft_registration"}  # which only know the rooms' names
    upwards = [
        f"{name} imports {other}"
        for name in sorted(inner)
        for other in sorted(imported_modules(name))
        if room(name) != room(other) and level[room(name)] <= level[room(other)]
    ]
    assert not upwards
