"""
The methods of TRL, transformers, PEFT and accelerate that we override, and the internals that we call or read, are as
recorded: parameters, number or keys of returned values, and the methods that assign private state that we share.
"""

import ast
import inspect
import json
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType

import torch
from own_modules import own_modules
from transformers import Trainer
from trl import DistillationTrainer


LIBRARIES = ("trl", "transformers", "peft", "accelerate")
RECORD = Path(__file__).with_name("signatures.json")


def library_of(thing) -> str:
    # `torch.compile` adds functions without a module to the globals of compiled modules
    return (thing.__module__ or "").partition(".")[0]


def signature(function) -> str:
    """Parameters, plain defaults, and the parts of what is returned. Annotations may change."""
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        default = parameter.default
        if not isinstance(default, str | int | float | tuple | None) and default is not parameter.empty:
            default = ...
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    return str(inspect.Signature(parameters)) + returned_parts(function)


def returned_parts(function) -> str:
    """The number of returned values, or the keys of a `dict` that the function fills and returns."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    nodes = list(own_nodes(definition))
    returned = [node.value for node in nodes if isinstance(node, ast.Return)]
    if counts := sorted({len(value.elts) for value in returned if isinstance(value, ast.Tuple)}):
        return f" -> {' or '.join(map(str, counts))} values"
    if len(returned) != 1 or not isinstance(returned[0], ast.Name):
        return ""
    keys = []
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            if ast.unparse(node.targets[0]) == returned[0].id:
                keys += node.value.keys
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            if ast.unparse(node.value) == returned[0].id:
                keys.append(node.slice)
    names = sorted({key.value for key in keys if isinstance(key, ast.Constant)})
    return f" -> {{{', '.join(names)}}}" if names else ""


def own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a function's body, without those of nested functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.Lambda):
            yield child
            yield from own_nodes(child)


def own_classes_and_functions() -> tuple[dict[str, type], dict[str, FunctionType]]:
    """Our classes by name, and by name the library functions that we import and TRL's methods that we call."""
    classes, functions = {}, {}
    for module in own_modules():
        for name, thing in vars(module).items():
            if inspect.isclass(thing) and library_of(thing) == "trl_vicur":
                classes[thing.__qualname__] = thing
            elif inspect.isfunction(thing) and library_of(thing) in LIBRARIES:
                functions[name] = thing
        functions |= called_methods(module)
    return classes, functions


def called_methods(module: ModuleType) -> dict[str, FunctionType]:
    """The methods that a module names of TRL classes that it imports and does not subclass."""
    named = {node.attr for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Attribute)}
    classes = [thing for thing in vars(module).values() if inspect.isclass(thing)]
    methods = {}
    for imported in classes:
        is_base = any(imported in other.__mro__[1:] for other in classes)
        if library_of(imported) != "trl" or is_base:
            continue
        names = {"forward"} if issubclass(imported, torch.autograd.Function) else named
        for name in names & vars(imported).keys():
            if inspect.isfunction(vars(imported)[name]):
                methods[f"{imported.__qualname__}.{name}"] = vars(imported)[name]
    return methods


def inherited_names(own_class: type) -> set[str]:
    """Methods and attributes that a class defines, and private ones of `self` that it uses."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(own_class))).body
    defined = {node.name for node in definition.body if isinstance(node, ast.FunctionDef)}
    defined |= {node.targets[0].id for node in definition.body if isinstance(node, ast.Assign)}
    used = {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and ast.unparse(node.value) in ("self", "cls", "super()")
    }
    return defined | used


@cache
def assigned_attributes(base: type) -> dict[str, set[str]]:
    """Private attributes that a library's class assigns, each with the assigning methods."""
    try:
        [definition] = ast.parse(textwrap.dedent(inspect.getsource(base))).body
    except (OSError, TypeError):  # an enum, or a class created by a function
        return {}
    assigned = defaultdict(set)
    for node in definition.body:
        is_method = isinstance(node, ast.FunctionDef)
        where = f"{base.__qualname__}.{node.name}" if is_method else f"class {base.__qualname__}"
        for each in ast.walk(node) if is_method else ast.iter_child_nodes(node):
            name = ast.unparse(each).removeprefix("self.") if isinstance(each, ast.Attribute | ast.Name) else ""
            if isinstance(getattr(each, "ctx", None), ast.Store) and re.fullmatch(r"_[a-z]\w*", name):
                if isinstance(each, ast.Attribute) == is_method:
                    assigned[name].add(where)
    return assigned


def found_signatures() -> dict[str, tuple[str, str]]:
    """The signature (or the assigning methods) and the library of everything we override, call or share, by name."""
    classes, functions = own_classes_and_functions()
    found = {name: (signature(function), library_of(function)) for name, function in functions.items()}
    for own_class in classes.values():
        # A mixin overrides the methods of the library's class that one of our classes combines it with
        combined = next((other for other in classes.values() if own_class in other.__mro__[1:]), own_class)
        bases = [base for base in combined.__mro__ if library_of(base) in LIBRARIES]
        for name in inherited_names(own_class):
            definition = next((vars(base)[name] for base in bases if name in vars(base)), None)
            definition = getattr(definition, "__func__", definition)  # of a class method
            if inspect.isfunction(definition) and library_of(definition) in LIBRARIES:
                found[f"{own_class.__qualname__}.{name}"] = (signature(definition), library_of(definition))
            else:
                assigning = {
                    base: assigned_attributes(base)[name] for base in bases if name in assigned_attributes(base)
                }
                if assigning:
                    where = ", ".join(sorted(set().union(*assigning.values())))
                    found[f"{own_class.__qualname__}.{name}"] = (f"assigned by {where}", library_of([*assigning][0]))
    return found


def changes(found: dict[str, tuple[str, str]], recorded: dict[str, list[str]]) -> list[str]:
    messages = []
    for name in sorted(found.keys() | recorded.keys()):
        if name not in found:
            installed = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
            messages.append(
                f"{name}: recorded as {' or '.join(recorded[name])}, but {installed} no longer have it. If it was "
                f"renamed there, ours overrides nothing: rename ours. If ours is gone, delete it in {RECORD.name}"
            )
        elif found[name][0] not in recorded.get(name, []):
            signature, library = found[name]
            messages.append(
                f"{name}: expected {' or '.join(recorded.get(name, ['nothing with that name']))}, but {library} "
                f"{version(library)} has {signature}. Read what it does now, adapt our code, and add the line to "
                f"{RECORD.name}: {json.dumps(name)}: {json.dumps([*recorded.get(name, []), signature])}"
            )
    return messages


def test_signatures_match_the_record():
    messages = changes(found_signatures(), json.loads(RECORD.read_text()))
    assert not messages, "\n" + "\n".join(messages)


def test_changes_are_reported(monkeypatch):
    recorded = json.loads(RECORD.read_text())

    def compute_loss(self, model, batch, weights=None): ...

    compute_loss.__module__ = DistillationTrainer.__module__
    monkeypatch.setattr(DistillationTrainer, "compute_loss", compute_loss)
    monkeypatch.delattr(Trainer, "_save_rng_state")

    def _tokenize_prompts(self, prompts):
        return [], None, {}, []

    _tokenize_prompts.__module__ = DistillationTrainer.__module__
    monkeypatch.setattr(DistillationTrainer, "_tokenize_prompts", _tokenize_prompts)
    assigned_attributes(DistillationTrainer)["_diagnostics"] = {"DistillationTrainer.log"}
    try:
        told = changes(found_signatures(), recorded)
    finally:
        assigned_attributes.cache_clear()
    diagnostics, compute_loss, tokenize_prompts, rng_state, tokenized_by_trainer = told
    assert "DiagnosticsMixin.compute_loss: expected (self, model, inputs, return_outputs=False" in compute_loss
    assert f"but trl {version('trl')} has (self, model, batch, weights=None). Read what it does now" in compute_loss
    assert "ResumingMixin._save_rng_state: recorded as (self, output_dir), but trl" in rng_state
    assert "MultimodalMixin._tokenize_prompts: expected (self, prompts) -> 3 values, but trl" in tokenize_prompts
    assert "has (self, prompts) -> 4 values. Read what it does now" in tokenize_prompts
    assert "DiagnosticsMixin._diagnostics: expected nothing with that name, but trl" in diagnostics
    assert "ViCuRTrainer._tokenize_prompts: expected (self, prompts) -> 3 values" in tokenized_by_trainer
    assert "has assigned by DistillationTrainer.log. Read what it does now" in diagnostics
