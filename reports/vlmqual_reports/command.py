"""`vlmqual report`: one HTML page and one Markdown page from directories of results."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from vlmqual_contract.errors import EXIT_FAILED, UsageError
from vlmqual_reports.load import load
from vlmqual_reports.page import html, markdown, view
from vlmqual_reports.statements import installed_statements
from vlmqual_reports.subjects import exit_code


class _Command:
    help = "write one HTML page and one Markdown page from results of conformance, perf, proof and gate"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Declare the arguments."""
        parser.add_argument(
            "results", nargs="+", type=Path, metavar="DIR", help="directory of results, or one results file"
        )
        parser.add_argument(
            "--output",
            type=Path,
            metavar="PAGE.html",
            help="the HTML page (default: report.html beside the first results)",
        )
        parser.add_argument(
            "--markdown",
            type=Path,
            metavar="PAGE.md",
            help="the Markdown page (default: the HTML page's name with .md)",
        )

    def run(self, args: argparse.Namespace) -> int:
        """Write the pages and print a verdict line for each subject; the last line has the paths of the pages.

        Returns:
            0 when every newest run is complete and as required, 1 when a verdict failed, 3 when a run is incomplete.

        Raises:
            UsageError: a directory does not exist or holds no results, or a page cannot be written.
        """
        first: Path = args.results[0]
        page: Path = args.output or (first if first.is_dir() else first.parent) / "report.html"
        text_page: Path = args.markdown or page.with_suffix(".md")
        if page.resolve() == text_page.resolve():
            raise UsageError(f"--output and --markdown both name {page}; they are two pages")
        results = load(args.results)
        content = view(results, installed_statements(), datetime.now().astimezone())
        write(page, html(content))
        write(text_page, markdown(content))
        for problem in content.problems:
            print(f"vlmqual report: {problem}", file=sys.stderr)
        for subject in content.subjects:
            print(f"{subject.title}: {subject.judgement.line}")
        for proof in results.proofs:
            print(f"{proof.path}: {'as required' if proof.fine else 'failed'}")
        for gate in results.gates:
            print(f"{gate.path}: {gate.line}")
        for check in results.checks:
            print(f"{check.path}: {'as required' if check.fine else 'failed'}")
        print(f"{page} {text_page}")
        if not all([*(proof.fine for proof in results.proofs), *(gate.fine for gate in results.gates)]):
            return EXIT_FAILED
        return exit_code(content.subjects, results.problems)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all: beside it first, then renamed. Characters that UTF-8 lacks become `?`.

    Raises:
        UsageError: it cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"page {path} is a directory; name a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(text.encode("utf-8", "replace"))
            umask = os.umask(0)
            os.umask(umask)
            Path(name).chmod(0o666 & ~umask)  # mkstemp makes it the owner's alone
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UsageError(f"page {path}: {error.strerror or error}") from error


command = _Command()
