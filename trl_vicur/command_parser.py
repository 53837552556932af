"""The parser of the commands' arguments."""

import argparse
import copy
import shutil
import sys
import textwrap
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import yaml
from trl import TrlParser


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of examples, tells defaults where there are some, and names each option once."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _expand_help(self, action: argparse.Action) -> str:
        if isinstance(action.default, str):  # lines are filled anew, and a default's own would be lost
            action = copy.copy(action)
            action.default = action.default.replace("\n", "\\n")
        return super()._expand_help(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # The parser takes every name with dashes as well, and argparse would write the value behind each of them
        if action.option_strings:
            names = [name for name in action.option_strings if "-" not in name.removeprefix("--")]
            action = copy.copy(action)
            action.option_strings = names or action.option_strings
            if action.nargs == "?" and action.const is True:
                action.metavar = "true|false"
        return super()._format_action_invocation(action)


class CommandParser(TrlParser):
    """
    A [`~trl.TrlParser`] whose help has examples and tells of `--config`.

    Args:
        dataclass_types (iterable of dataclass types):
            The arguments.
        prog (`str`):
            The command, e.g. `"trl-vicur heatmap"`.
        usage (`str`):
            What follows it, in short.
        description (`str`):
            What it does.
        examples (`str`):
            Calls and what they do, as they are to be shown.
    """

    def __init__(self, dataclass_types: Iterable[type], prog: str, usage: str, description: str, examples: str):
        super().__init__(
            dataclass_types,
            prog=prog,
            usage=f"%(prog)s {usage}",
            description=textwrap.fill(description, min(100, shutil.get_terminal_size().columns - 2)),
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
            formatter_class=HelpFormatter,
        )
        for action in self._actions:
            # The opposites of options that are true by default, with their help; `--option false` does the same
            if isinstance(action, argparse._StoreFalseAction):
                action.help = argparse.SUPPRESS
        # Only for its help; `parse_args_and_config` takes it away before the arguments are parsed
        self.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with any of these options."
        )

    def parse_args_and_config(self, args: Iterable[str] | None = None, *flags: Any, **kwargs: Any) -> tuple:
        """
        As TRL's.

        Raises:
            `ValueError`: If the file is no YAML, or if it has options that there are not.
        """
        args = sys.argv[1:] if args is None else list(args)
        if any(flag == "--config" and value.startswith("-") for flag, value in pairwise([*args, "-"])):
            self.error("argument --config: expected one argument")
        try:
            return super().parse_args_and_config(args, *flags, **kwargs)
        except yaml.YAMLError as error:
            raise ValueError(f"The file of `--config` is no YAML: {error}") from error

    def show_first(self, title: str, names: Iterable[str]) -> None:
        """Lets the help show these options under a title of their own, before those that have none."""
        actions = {action.dest: action for action in self._optionals._group_actions}
        group = self.add_argument_group(title)
        for name in names:
            self._optionals._group_actions.remove(actions[name])
            group._group_actions.append(actions[name])
        self._action_groups.remove(self._optionals)
        self._action_groups.append(self._optionals)
