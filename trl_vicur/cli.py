"""The command `trl-vicur`."""

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """
    Run the command.

    Args:
        arguments (`list[str]`, *optional*):
            What stands behind `trl-vicur` on the command line.

    Returns:
        `int`: The exit status: 0, 1 after an error, or 130 when interrupted.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="trl-vicur", description="Visual-cue-recovery distillation (ViCuR).")
    subjects = parser.add_subparsers(dest="subject", required=True)
    cues = subjects.add_parser("cues", help="generate visual cues and audit them")
    commands = cues.add_subparsers(dest="command", required=True)
    # Their own parsers, which take long to import, tell about their arguments
    commands.add_parser("generate", help="let a model write a cue for every row of a dataset", add_help=False)
    commands.add_parser("audit", help="check whether cues may be used", add_help=False)
    subjects.add_parser("heatmap", help="draw what the sink token looks at", add_help=False)
    # The command is the first word, or the first two
    chosen, _ = parser.parse_known_args(arguments[:2])

    from .cues import GeneratorUnavailableError

    try:
        if chosen.subject == "heatmap":
            from .heatmap.command import heatmap

            heatmap(arguments[1:])
        else:
            from .cues import commands as cue_commands

            run = {"generate": cue_commands.generate, "audit": cue_commands.audit}[chosen.command]
            run(arguments[2:])
    except KeyboardInterrupt:
        kept = "" if chosen.subject == "heatmap" else " What is done is kept; the same command goes on from there."
        print(f"\nInterrupted.{kept}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, GeneratorUnavailableError) as error:
        # What a user can mend needs no traceback
        print(f"trl-vicur: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
