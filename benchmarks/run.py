"""The one door to the benchmarks: `python benchmarks/run.py --suite step`."""

import argparse
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

# Run as a script, Python looks in this folder only: the package and its neighbour fastfuse lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before torch is loaded: threads that spin while they wait make a busy machine a hundred times slower (docs/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from benchmarks.command import one_line_on_error
from benchmarks.options import MEASURING, check, for_suite, make_parser

if TYPE_CHECKING:
    from benchmarks.report import Report


@one_line_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print, save. Exit status 0, or 2 with one line that says what to mend."""
    options = make_parser(__doc__).parse_args(arguments)
    check(options)
    # Imported late: --help and a mistyped option need no torch.
    from benchmarks import plot, report

    if options.plot is not None:
        plot.check()
    if options.out is not None:
        report.prepare(options.out)
    for suite in MEASURING if options.suite == "all" else (options.suite,):
        _run(suite, for_suite(options, suite))
    return 0


def _run(suite: str, options: argparse.Namespace) -> None:
    """One suite; every part is shown and saved as it ends."""
    from benchmarks import plot, report

    finished, shown, written = None, 0, []
    one_line = suite == "step" and options.quick
    for finished in _reports(suite, options):
        report.show(finished, since=shown, table_to=sys.stderr if one_line else None)
        shown = len(finished.rows)
        if options.out is not None:
            written = report.save(finished, options.out)
    if finished is not None and options.plot is not None and suite in plot.SUITES:
        written.append(Path(options.plot) if options.plot else options.out / f"{finished.name}.png")
        plot.draw(finished, written[-1])
    for path in written:
        print(f"wrote {path}", file=sys.stderr if one_line else None)


def _reports(suite: str, options: argparse.Namespace) -> "Iterator[Report]":
    from benchmarks.report import Report

    given = importlib.import_module(f"benchmarks.{suite}").run(options)
    if isinstance(given, Report):
        yield given
    else:
        yield from given


if __name__ == "__main__":
    raise SystemExit(main())
