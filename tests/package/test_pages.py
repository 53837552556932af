"""The README and the pages: links resolve, commands parse, snippets match the code."""

import ast
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import runpy
import shlex
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from accelerate.commands.launch import launch_command_parser
from markdown_it import MarkdownIt
from markdown_it.token import Token

import trl_vicur
from trl_vicur import CueRecoveryConfig, ViCuRConfig
from trl_vicur.cli import COMMANDS, main
from trl_vicur.command_parser import CommandParser
from trl_vicur.train import parse_launch_arguments


ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
FOLDERS = ("trl_vicur", "examples", "benchmarks", "tests")
PAGES = [README, *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
# Options for GPUs are errors on machines without one
ON_CPU = ["--use_cpu", "--bf16", "false"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

of_each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


# --- Reading a page ---


@cache
def read(page: Path) -> list[Token]:
    """The blocks of a page, and what is within their lines."""
    blocks = MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
    return [token for block in blocks for token in (block, *(block.children or []))]


def links(page: Path) -> list[str]:
    return [str(value) for token in read(page) for name, value in token.attrs.items() if name in ("href", "src")]


def anchors(page: Path) -> set[str]:
    """Names of the headings, as GitHub makes them."""
    tokens = read(page)
    titles = [tokens[index + 1].content for index, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def snippets(page: Path, language: str) -> list[str]:
    return [token.content for token in read(page) if token.type == "fence" and token.info == language]


def code_words(page: Path) -> list[str]:
    return [token.content for token in read(page) if token.type == "code_inline"]


# --- Links ---


@of_each_page
def test_links_resolve(page):
    for link in links(page):
        url = urlsplit(link)
        if url.scheme:
            assert url.scheme == "https" and "." in url.netloc and " " not in link, link
            continue
        target = (page.parent / url.path).resolve() if url.path else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not url.fragment or url.fragment in anchors(target), link


def test_every_page_is_reached_from_the_readme():
    reached, left = set(), [README]
    while left:
        page = left.pop()
        reached.add(page)
        targets = {(page.parent / urlsplit(link).path).resolve() for link in links(page) if not urlsplit(link).scheme}
        left += [target for target in targets if target.suffix == ".md" and target not in reached]
    assert reached >= set(PAGES)


@of_each_page
def test_images_have_a_description(page):
    assert all(token.content for token in read(page) if token.type == "image")


def test_source_distribution_has_what_the_readme_links_to():
    included = PYPROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert {urlsplit(link).path.split("/")[0] for link in links(README) if not urlsplit(link).scheme} <= {*included}


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


# --- Commands ---


class Parsed(Exception):
    """Raised instead of running a command whose arguments are valid."""


@pytest.fixture
def parse_only(monkeypatch):
    """Lets parsers raise `Parsed`."""
    parse_args, parse_args_and_config = ArgumentParser.parse_args, CommandParser.parse_args_and_config

    def parse_plain(parser, *arguments, **options):
        parse_args(parser, *arguments, **options)
        raise Parsed

    def parse_command(parser, *arguments, **options):
        parsed = parse_args_and_config(parser, *arguments, **options)
        if for_accelerate := [*itertools.chain(*(each for each in parsed if isinstance(each, list)))]:
            parse_launch_arguments(for_accelerate)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", parse_plain)
    monkeypatch.setattr(CommandParser, "parse_args_and_config", parse_command)
    monkeypatch.chdir(ROOT)
    return monkeypatch


def split_commands(snippet: str) -> list[list[str]]:
    """The commands of a shell snippet as words, without comments and variables."""
    lines = snippet.replace("\\\n", " ").splitlines()
    commands = []
    for line in lines:
        words = shlex.split(line, comments=True)
        for is_joint, command in itertools.groupby(words, "&&".__eq__):
            command = list(itertools.dropwhile(re.compile(r"[A-Z_]+=").match, command))
            if not is_joint and command:
                commands.append(command)
    return commands


def check_run(run: Callable, *arguments, **options) -> None:
    try:
        run(*arguments, **options)
    except Parsed:
        return
    raise AssertionError("The command ended before its arguments were parsed.")


def check_script(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(str(Path(script).parent))
    check_run(runpy.run_path, script, run_name="__main__")


def check_pytest(arguments: list[str], config: pytest.Config) -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    names = re.findall(r"^ *def (\w+)", tests, flags=re.MULTILINE)  # tests, and families as `make_…`
    for argument, value in itertools.pairwise([*arguments, ""]):
        if argument == "-k":
            words = [word for word in re.findall(r"\w+", value) if not word.isupper()]  # `FAMILY` is any of them
            assert all(any(word in name for name in names) for word in words), value
        elif argument.startswith("--"):
            config.getoption(argument.partition("=")[0])
        elif "/" in argument or argument == "tests":
            assert (ROOT / argument).exists(), argument


def check_vllm(arguments: list[str]) -> None:
    options = dict(itertools.pairwise(arguments))
    overrides = json.loads(options.get("--hf-overrides", "{}"))
    if isinstance(module := overrides.get("cue_recovery"), dict):
        CueRecoveryConfig(**module)
    json.loads(options.get("--weight-transfer-config", "{}"))


def check_command(words: list[str], monkeypatch: pytest.MonkeyPatch, config: pytest.Config) -> None:
    match words:
        case ["trl-vicur", "train", *arguments]:
            check_run(main, ["train", *arguments, *ON_CPU])
        case ["trl-vicur", *arguments]:
            check_run(main, arguments)
        case ["accelerate", "launch", *arguments]:
            launched = launch_command_parser().parse_known_args(arguments)[0]
            assert Path(launched.config_file).is_file()
            check_script(launched.training_script, [*launched.training_script_args, *ON_CPU], monkeypatch)
        case [".venv-vllm/bin/python", script, *arguments]:
            find_spec = importlib.util.find_spec
            with monkeypatch.context() as context:
                context.setattr(importlib.util, "find_spec", lambda name: name == "vllm" or find_spec(name))
                check_script(script, arguments, context)
        case ["python", script, *arguments]:
            check_script(script, arguments, monkeypatch)
        case ["pytest", *arguments]:
            check_pytest(arguments, config)
        case ["pip", "install", *requirements]:
            lists = re.findall(r"(?:\.|trl-vicur)\[(.+?)\]", " ".join(requirements))
            assert {*",".join(lists).split(",")} <= {"", *PYPROJECT["project"]["optional-dependencies"]}
        case ["vllm", "serve", _, *arguments]:
            check_vllm(arguments)
        case ["lmms_eval", "--model", name, *_]:
            assert name in entry_points(group="lmms_eval.models").names
        case ["pre-commit", _, "--config", file, *_]:
            assert Path(file).is_file()
        case (
            ["python3", "-m", "venv", ".venv"]
            | [".", ".venv/bin/activate"]
            | ["export" | "ruff" | "pyright" | "git" | "grep", *_]
        ):
            pass
        case _:
            raise AssertionError("This test does not know such commands.")


@of_each_page
def test_commands_parse(page, parse_only, pytestconfig, capsys):
    for command in itertools.chain(*map(split_commands, snippets(page, "bash"))):
        try:
            check_command(command, parse_only, pytestconfig)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{shlex.join(command)}: {error!r}\n{capsys.readouterr().err}") from error


@pytest.mark.parametrize(
    "command",
    [
        "trl-vicur train --model_name_or_path m --dataset_name d --learning_rte 1",
        "trl-vicur cues audit --html report.html",
        "trl-vicur cues make",
        "accelerate launch --config_file examples/accelerate_configs/multi_gpu.yaml examples/scripts/vicur.py --fast",
        "python examples/study/run.py --cells nothing",
        "python examples/gone.py",
        "pytest tests/gone",
        "pytest tests -k no_such_promise",
        "pytest --no_such_option",
        "pip install -e .[nothing]",
        """vllm serve m --hf-overrides '{"cue_recovery": {"sink": "first"}}'""",
        "make all",
    ],
)
def test_wrong_commands_are_detected(command, parse_only, pytestconfig):
    [words] = split_commands(command)
    with pytest.raises((Exception, SystemExit)):
        check_command(words, parse_only, pytestconfig)


@of_each_page
def test_files_and_commands_in_the_text_exist(page, parse_only, pytestconfig):
    for code in code_words(page):
        if re.match(rf"(\.ci|{'|'.join(FOLDERS)})/", code):
            assert (ROOT / code.split()[0]).exists(), code
        elif re.match(r"([A-Z_]+=\S+ )*(pytest|pip install|python) ", code):
            [command] = split_commands(code)
            check_command(command, parse_only, pytestconfig)
        elif code.startswith("trl-vicur "):
            assert code.startswith(("trl-vicur --", *(f"trl-vicur {command.name}" for command in COMMANDS))), code


@of_each_page
def test_yaml_snippets_load_into_the_options(page, parse_only, tmp_path):
    for snippet in snippets(page, "yaml"):
        (tmp_path / "vicur.yaml").write_text(snippet, encoding="utf-8")
        check_run(main, ["train", "--config", str(tmp_path / "vicur.yaml"), *ON_CPU])


# --- Python ---


@of_each_page
def test_python_snippets_match_the_code(page):
    """Snippets compile, their imports exist, and their calls of public names use existing arguments."""
    for snippet in snippets(page, "python"):
        for node in ast.walk(ast.parse(snippet)):
            match node:
                case ast.Import(names=names):
                    for each in names:
                        importlib.import_module(each.name)
                case ast.ImportFrom(module="vllm"):  # in a separate environment
                    pass
                case ast.ImportFrom(module=module, names=names):
                    for each in names:
                        assert hasattr(importlib.import_module(module), each.name), f"{module}.{each.name}"
                case ast.Call(func=ast.Name(id=name), keywords=keywords) if name in trl_vicur.__all__:
                    known = inspect.signature(getattr(trl_vicur, name)).parameters
                    assert {each.arg for each in keywords} <= known.keys(), name


@pytest.mark.parametrize("room, config", [("trainer", ViCuRConfig), ("cue_recovery", CueRecoveryConfig)])
def test_option_tables_name_config_fields(room, config):
    page = (ROOT / "trl_vicur" / room / "README.md").read_text(encoding="utf-8")
    options = page.split("\n## Options\n")[1].split("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", options, flags=re.MULTILINE)
    names = [name for cell in first_cells for name in re.findall(r"`(\w+)`", cell)]
    assert len(names) > 5 and {*names} <= config.__dataclass_fields__.keys()
