"""The parser of the commands' arguments."""

import argparse
import textwrap
from collections.abc import Iterable

from trl import TrlParser


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the lines of examples, and tells defaults where there are some."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


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
            description=textwrap.fill(description, 100),
            epilog="examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  "),
            formatter_class=HelpFormatter,
        )
        # Only for its help; `parse_args_and_config` takes it away before the arguments are parsed
        self.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with any of these options."
        )
