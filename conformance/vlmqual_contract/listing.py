"""`vlmqual targets`: what can be put under test here."""

from __future__ import annotations

import argparse
import inspect

from vlmqual_contract.discovery import LIBRARIES, TARGETS, installed
from vlmqual_contract.errors import EXIT_OK
from vlmqual_contract.target import Capability


class _Command:
    help = "list the installed targets and libraries, and the capabilities that a target can declare"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """No arguments."""

    def run(self, args: argparse.Namespace) -> int:
        """Print the lists; a target whose module cannot be imported is listed with the reason."""
        print("targets (use as kind[:key=value,...], or path/to/adapter.py:Name):")
        for name, point in installed(TARGETS).items():
            try:
                options = inspect.signature(point.load()).parameters.values()
                print(f"  {name:<16}{', '.join(map(_shown, options)) or 'no options'}")
            except ImportError as error:
                print(f"  {name:<16}not available: {error}")
        print("libraries:")
        for name in installed(LIBRARIES):
            print(f"  {name}")
        print("capabilities:")
        print("  " + ", ".join(Capability))
        return EXIT_OK


def _shown(option: inspect.Parameter) -> str:
    return option.name if option.default in (option.empty, "") else f"{option.name}={option.default}"


command = _Command()
