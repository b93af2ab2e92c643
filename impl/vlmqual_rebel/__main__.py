"""`python -m vlmqual_rebel [--npu NAME] [--devices N] [--numeric MODE] script.py|-m module args...`"""

from __future__ import annotations

import argparse
import dataclasses
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import EmulatorError
from .installation import install_from
from .settings import NPUS, NUMERICS, Settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a program over the emulator, and say once on stderr that it is emulated.

    Settings that are not given come from the environment variable `VLMQUAL_REBEL`, then from `Settings`. The
    variable is set for the processes that the program starts.

    Returns:
        2 on wrong usage; else the program's own exit code is raised as SystemExit, or 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m vlmqual_rebel",
        description="Run a program over a CPU emulator of RBLN's rebel API.",
        usage="%(prog)s [options] (SCRIPT | -m MODULE) [ARGUMENT ...]",
    )
    parser.add_argument("--npu", choices=tuple(NPUS), help="name of every device (default RBLN-CA25)")
    parser.add_argument("--devices", type=int, metavar="N", help="how many devices there are (default 8)")
    parser.add_argument("--numeric", choices=NUMERICS, help="bfloat16 rounds every product (default float32)")
    parser.add_argument("--memory-bytes", type=int, metavar="N", help="memory of a device (default: the NPU's)")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module, not a file")
    parser.add_argument("program", metavar="SCRIPT | MODULE")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT")
    given = parser.parse_args(arguments)
    changes = {name: getattr(given, name) for name in ("npu", "devices", "numeric", "memory_bytes")}
    try:
        settings = Settings.from_environment(os.environ) or Settings()
        settings = dataclasses.replace(settings, **{k: value for k, value in changes.items() if value is not None})
        if not given.module and not Path(given.program).is_file():
            raise EmulatorError(f"{given.program} is not a file")
        install_from(settings)
    except (EmulatorError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    os.environ.update(settings.as_environment())
    print(
        f"vlmqual_rebel: RBLN is EMULATED on this CPU ({settings.devices} x {settings.npu}, numeric "
        f"{settings.numeric}); nothing here tells the speed or the limits of an NPU.",
        file=sys.stderr,
    )
    sys.argv = [given.program, *given.arguments]
    if given.module:
        sys.path.insert(0, os.getcwd())  # noqa: PTH109 - as python -m does, which does not resolve links
        runpy.run_module(given.program, run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(given.program).resolve().parent))
        runpy.run_path(given.program, run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main())
