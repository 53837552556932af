"""Argument parser of the commands."""

import argparse
import copy
import shutil
import sys
import textwrap
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import yaml
from trl.scripts.utils import TrlParser


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the line breaks of examples, shows defaults that are not `None`, and lists each option once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _expand_help(self, action: argparse.Action) -> str:
        if isinstance(action.default, str):  # argparse would reflow line breaks within a default
            action = copy.copy(action)
            action.default = action.default.replace("\n", "\\n")
        return super()._expand_help(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # The parser also accepts every name with dashes, and argparse would repeat the metavar after each of them
        if action.option_strings:
            names = [name for name in action.option_strings if "-" not in name.removeprefix("--")]
            action = copy.copy(action)
            action.option_strings = names or action.option_strings
            if action.nargs == "?" and action.const is True:
                action.metavar = "true|false"
        return super()._format_action_invocation(action)


class CommandParser(TrlParser):
    """
    A [`~trl.TrlParser`] whose help has examples and documents `--config`.

    Args:
        dataclass_types (iterable of dataclass types):
            Dataclasses whose fields are the options.
        prog (`str`):
            The command, e.g. `"trl-vicur heatmap"`.
        usage (`str`):
            Short form of its arguments.
        description (`str`):
            Description of the command, in a few sentences.
        examples (`str`):
            Example calls, one per line.
    """

    def __init__(self, dataclass_types: Iterable[type], prog: str, usage: str, description: str, examples: str):
        super().__init__(
            dataclass_types,  # pyright: ignore[reportArgumentType]  (TRL declares these classes as a NewType of Any)
            prog=prog,
            usage=f"%(prog)s {usage}",
            description=textwrap.fill(description, min(100, shutil.get_terminal_size().columns - 2)),
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
            formatter_class=HelpFormatter,
        )
        for action in self._actions:
            # Hide `--no_option`, which TRL adds to options that are true by default: `--option false` does the same
            if isinstance(action, argparse._StoreFalseAction):
                action.help = argparse.SUPPRESS
        # For the help only; `parse_args_and_config` removes it from the arguments before parsing
        self.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with any of these options."
        )

    def parse_args_and_config(self, args: Iterable[str] | None = None, *flags: Any, **kwargs: Any) -> tuple:
        """
        Parse the command line and the `--config` file, as TRL's parser does.

        Raises:
            `ValueError`: If the file is not valid YAML, or contains unknown options.
        """
        args = sys.argv[1:] if args is None else list(args)
        if any(flag == "--config" and value.startswith("-") for flag, value in pairwise([*args, "-"])):
            self.error("argument --config: expected one argument")
        try:
            return super().parse_args_and_config(args, *flags, **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"The `--config` file is not valid YAML: {error}") from error

    def show_first(self, title: str, names: Iterable[str]) -> None:
        """Show the named options in their own group, before all remaining options."""
        actions = {action.dest: action for action in self._optionals._group_actions}
        group = self.add_argument_group(title)
        for name in names:
            self._optionals._group_actions.remove(actions[name])
            group._group_actions.append(actions[name])
        self._action_groups.remove(self._optionals)
        self._action_groups.append(self._optionals)
