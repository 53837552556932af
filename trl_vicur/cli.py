"""The command `trl-vicur`."""

import argparse
import importlib
import sys
from importlib.metadata import version
from typing import NamedTuple


class Command(NamedTuple):
    """
    A command. The parser of its arguments is in its module, which is slow to import.

    Args:
        name (`str`):
            The word or words after `trl-vicur` on the command line.
        summary (`str`):
            One line of help.
        example (`str`):
            Arguments of a typical call.
        function (`str`):
            The function that runs it, as `"module:name"` within this package. Its parameter is the list of arguments.
        resumes (`bool`, *optional*, defaults to `False`):
            Whether the same command resumes an interrupted run.
    """

    name: str
    summary: str
    example: str
    function: str
    resumes: bool = False


COMMANDS = [
    Command(
        "train",
        "distil a student from a teacher that sees visual cues",
        "--model_name_or_path Qwen/Qwen3-VL-2B-Instruct --dataset_name me/geometry-with-cues --output_dir my-student",
        "train:train",
    ),
    Command(
        "doctor",
        "report what this machine can run, and check model, adapter and every row before you rent a GPU",
        "--model Qwen/Qwen3-VL-2B-Instruct --dataset me/geometry-with-cues",
        "doctor.command:doctor",
    ),
    Command(
        "cues generate",
        "let a model write a visual cue for every row of a dataset",
        "--dataset me/geometry --output geometry-cues --model Qwen/Qwen3-VL-8B-Instruct",
        "cues.commands:generate",
        resumes=True,
    ),
    Command(
        "cues audit",
        "check whether cues are safe to train on: leaks, control text, recoverability, usefulness",
        "geometry-cues --html report.html",
        "cues.commands:audit",
        resumes=True,
    ),
    Command(
        "heatmap",
        "draw what the sink token looks at",
        "--model Qwen/Qwen3-VL-2B-Instruct --adapter me/Qwen3-VL-2B-ViCuR --image diagram.png "
        '--question "How long is AB?" --output heatmap.png',
        "heatmap.command:heatmap",
    ),
    Command(
        "compare",
        "show the test questions on which a base model and its students disagree",
        "--model Qwen/Qwen3-VL-2B-Instruct --adapter OPSD=me/Qwen3-VL-2B-OPSD --adapter "
        "ViCuR=me/Qwen3-VL-2B-ViCuR --dataset me/geometry --output comparison",
        "comparison.command:compare",
        resumes=True,
    ),
]


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's name, whose help lists all commands."""
    lines = [f"  {each.name:<15}{each.summary}\n{'':17}trl-vicur {each.name} {each.example}" for each in COMMANDS]
    parser = argparse.ArgumentParser(
        prog="trl-vicur",
        usage="%(prog)s COMMAND …",
        description="Visual-cue-recovery distillation (ViCuR) of vision-language models.",
        epilog="\n".join(
            ["commands, each with a typical call:", *lines, "", "trl-vicur COMMAND --help lists its options."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", help=argparse.SUPPRESS)
    parser.add_argument("--version", action="version", version=f"trl-vicur {version('trl-vicur')}")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """
    Run the command.

    Args:
        arguments (`list[str]`, *optional*):
            Arguments after `trl-vicur`; by default those of the command line.

    Returns:
        `int`: The exit status: 0, 1 after an error, or 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    words = {command: command.name.split() for command in COMMANDS}
    command = next((each for each in COMMANDS if arguments[: len(words[each])] == words[each]), None)
    if command is None:
        parser = make_parser()
        parser.parse_known_args(arguments)  # exits for --help, --version and missing arguments
        begun = [each.name for each in COMMANDS if each.name.startswith(f"{arguments[0]} ")]
        written = " ".join(arguments[: 2 if begun else 1])
        parser.error(
            f"unknown command {written!r}, expected one of {', '.join(begun or [each.name for each in COMMANDS])}"
        )

    try:
        module, _, function = command.function.partition(":")
        run = getattr(importlib.import_module(f".{module}", __package__), function)
        run(arguments[len(words[command]) :])
    except KeyboardInterrupt:
        kept = " Finished work is kept; run the same command to resume." if command.resumes else ""
        print(f"\nInterrupted.{kept}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:
        return report(error)
    except RuntimeError as error:
        from .generation import GeneratorUnavailableError

        if isinstance(error, GeneratorUnavailableError):
            return report(error)
        raise
    return 0


def report(error: Exception) -> int:
    """Print an error that the user can fix, without a traceback, and return the exit status."""
    print(f"trl-vicur: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
