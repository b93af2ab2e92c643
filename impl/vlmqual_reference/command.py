"""`vlmqual reference`: answers of a user's checkpoint in float32, against which targets are judged."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlmqual_contract import checkpoint, machine
from vlmqual_contract.errors import EXIT_OK, UsageError
from vlmqual_contract.questions import questions

DTYPES = ("float32", "bfloat16", "float16")
_GIB = 2**30
#: Share of the machine's memory that weights may take unless --memory says otherwise.
_SHARE = 0.5


class _Command:
    help = "make answers of your own checkpoint on the CPU, in float32, that `vlmqual conformance` judges targets by"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        add = parser.add_argument
        add("--checkpoint", required=True, type=Path, metavar="DIR", help="checkpoint in Hugging Face layout")
        add("--prompts", type=Path, metavar="FILE", help="TOML or JSON lines (default: questions about bundled photos)")
        add("--output", type=Path, metavar="DIR", help="folder of the reference (default: references/NAME)")
        add("--tokens", type=int, default=16, metavar="N", help="greedy tokens after each prompt (default 16)")
        add("--memory", type=float, metavar="GIB", help="memory for weights (default: half of the machine's)")
        add("--dtypes", default="float32,bfloat16", metavar="D,D", help="compute dtypes that targets may declare")
        add("--arms", type=int, default=3, metavar="N", help="orders of sums by which noise is measured (default 3)")
        add("--together", type=int, default=4, metavar="N", help="prompts in memory at one time (default 4)")

    def run(self, args: argparse.Namespace) -> int:
        """Make the reference, or find it.

        Raises:
            UsageError: an argument, the checkpoint, a prompt or an image is wrong.
        """
        dtypes = _checked(args)
        try:
            return _make(args, dtypes)
        except (ValueError, OSError) as error:
            raise UsageError(str(error)) from error


def _checked(args: argparse.Namespace) -> tuple[str, ...]:
    """The dtypes, after a look at everything that needs no model."""
    dtypes = tuple(dict.fromkeys(filter(None, args.dtypes.split(","))))
    if unknown := [name for name in dtypes if name not in DTYPES]:
        raise UsageError(f"--dtypes {unknown[0]} is unknown; valid are {', '.join(DTYPES)}")
    if "float32" not in dtypes:
        raise UsageError(f"--dtypes {args.dtypes} lacks float32, which the reference itself is made in")
    for name, least, most in (("tokens", 1, None), ("arms", 2, 5), ("together", 1, None)):
        value = getattr(args, name)
        if value < least or (most is not None and value > most):
            raise UsageError(f"--{name} {value} is not {f'{least} to {most}' if most else f'at least {least}'}")
    if args.memory is not None and not args.memory > 0:
        raise UsageError(f"--memory {args.memory:g} is no memory; it is in GiB and above 0")
    return dtypes


def _make(args: argparse.Namespace, dtypes: tuple[str, ...]) -> int:
    from vlmqual_reference.folder import Folder
    from vlmqual_reference.maker import Told, Wanted, make
    from vlmqual_reference.prompts import read_prompts

    family = checkpoint.family(args.checkpoint)
    prompts = read_prompts(args.prompts, family, args.checkpoint) if args.prompts else questions(family)
    memory = int((args.memory or machine.memory_bytes() * _SHARE / _GIB) * _GIB)
    wanted = Wanted(
        directory=args.checkpoint,
        family=family,
        digest=checkpoint.digest(args.checkpoint),
        prompts=prompts,
        steps=args.tokens,
        dtypes=dtypes,
        arms=args.arms,
        memory=memory,
        together=args.together,
    )
    folder = Folder(args.output or Path("references", args.checkpoint.resolve().name))
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True, highlight=False)
    with Progress(TextColumn("{task.description}"), *columns, console=console, transient=True) as bar:
        task = bar.add_task("checkpoint", total=None)

        def stage(words: str, blocks: int) -> None:
            console.print(words, markup=False)
            bar.reset(task, total=blocks, description=words[:30])

        def block(name: str, runs: int) -> None:
            bar.update(task, advance=1, description=f"{name[-24:]} x{runs}")

        made = make(wanted, folder, Told(stage, block))
    record = folder.record() or {}
    how = f"made in {record['seconds']:.0f} s, peak {record['peak_bytes'] / _GIB:.2f} GiB" if made else "found"
    print(f"{folder.path}: {len(prompts)} prompts of {family}, {args.tokens} tokens each, {how}")
    print(f"judge a target by it: vlmqual conformance --target T --reference {folder.path}")
    return EXIT_OK


command = _Command()
