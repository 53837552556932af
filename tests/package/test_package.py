"""Importing the package, registering the PEFT method, and the length of functions."""

import ast
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

import trl_vicur


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    loaded = run_python(
        "import sys, trl_vicur; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    assert loaded.strip() == "[]"


@pytest.mark.parametrize(
    "imports",
    [
        "import trl_vicur; import peft",
        "import peft; import trl_vicur",
        "import trl_vicur.cue_recovery; import peft",
        "import trl_vicur; import transformers; from peft import PeftModel; import peft",
        "import trl_vicur, importlib.util; importlib.util.find_spec('peft'); import peft",
    ],
)
def test_import_registers_the_peft_method(imports):
    mapping = "peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING"
    printed = run_python(f"{imports}; print({mapping}[peft.PeftType('CUE_RECOVERY')].__name__)")
    assert printed.strip() == "CueRecoveryModel"


def test_unknown_name_is_an_attribute_error():
    import trl_vicur

    with pytest.raises(AttributeError, match="no attribute 'ViCuRTraner'"):
        trl_vicur.ViCuRTraner  # noqa: B018


def test_public_names_and_types():
    import trl_vicur

    for name in trl_vicur.__all__:
        assert getattr(trl_vicur, name).__name__ == name
    assert dir(trl_vicur) == sorted(trl_vicur.__all__)
    assert files("trl_vicur").joinpath("py.typed").is_file()
    assert trl_vicur.__version__


def test_no_function_is_longer_than_60_lines():
    """With signature and docstring; ruff's C901 limits the complexity."""
    functions = {
        f"{path.name}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in Path(trl_vicur.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in functions.items() if lines > 60} == {}
