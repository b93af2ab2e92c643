"""The `vlmqual` command. Its subcommands are found by entry points, so each package brings its own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Protocol, cast

from vlmqual_contract.discovery import COMMANDS, installed, suite_version
from vlmqual_contract.errors import EXIT_FAILED, EXIT_INCOMPLETE, EXIT_USAGE, Unsupported, UsageError, VlmqualError


class Command(Protocol):
    """What an entry point of the group `vlmqual.commands` leads to."""

    help: str

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Do it; the exit code."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.

    Returns:
        0 all as required, 1 a verdict or gate failed, 2 bad usage or input, 3 the run is incomplete.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    points = installed(COMMANDS)
    wanted = next((item for item in arguments if not item.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="vlmqual",
        description="Qualify an accelerator for Idefics, Idefics3 and Mllama: is it right, how fast, did it change?",
        epilog="Exit codes: 0 all as required, 1 a verdict or gate failed, 2 bad usage or input, 3 incomplete run.",
    )
    parser.add_argument("--version", action="version", version=f"vlmqual {suite_version()}")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands: dict[str, Command] = {}
    for name, point in points.items():
        if wanted in points and name != wanted:
            continue
        command = _load(point)
        if isinstance(command, str):
            choices.add_parser(name, help=f"not available: {command}")
            if name == wanted:
                print(f"vlmqual {name}: not available: {command}", file=sys.stderr)
                return EXIT_USAGE
            continue
        commands[name] = command
        command.configure(choices.add_parser(name, help=command.help, description=command.help))
    args = parser.parse_args(arguments)
    try:
        return commands[args.command].run(args)
    except (UsageError, Unsupported) as error:
        print(f"vlmqual {args.command}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except VlmqualError as error:
        print(f"vlmqual {args.command}: the target failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"\nvlmqual {args.command}: interrupted", file=sys.stderr)
        return EXIT_INCOMPLETE
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; say nothing more
        return EXIT_FAILED


def _load(point: EntryPoint) -> Command | str:
    try:
        return cast(Command, point.load())
    except ImportError as error:
        missing = error.name or str(error)
        return f"{missing} is not installed; install the extra that brings it, for example vlmqual[all]"


if __name__ == "__main__":
    sys.exit(main())
