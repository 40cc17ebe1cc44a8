"""The one door to the benchmarks: `python benchmarks/run.py --suite step`."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Run as a script, Python looks in this folder only: the package and its neighbour fastfuse lie one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# Before torch is loaded: threads that spin while they wait make a busy machine a hundred times slower (docs/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from fastfuse.errors import FastfuseError, InputError, unknown_name

SUITES = {
    "step": "one training step, batch in memory: the published program against fastfuse",
    "kernels": "every operator against eager and compiled reference",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="benchmarks/run.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--suite", required=True, help="; ".join(f"{name}: {what}" for name, what in SUITES.items()))
    parser.add_argument("--model", default="resnet32", help="network of all students and the leader (resnet32)")
    parser.add_argument("--students", type=int, default=2, help="common students, at least 2 (2)")
    parser.add_argument("--batch-size", type=int, help="images per step (128; 16 with --quick)")
    parser.add_argument("--repeats", type=int, help="timed turns of each provider (5; 2 with --quick)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto: cuda where there is one)")
    parser.add_argument("--quick", action="store_true", help="does it run at all: small batch, few turns, no claim")
    parser.add_argument("--part", help="i/n: the i-th of n parts of the suite kernels")
    parser.add_argument("--out", type=Path, help="directory for a JSON and a CSV file")
    return parser


def _positive(options: argparse.Namespace) -> None:
    if options.batch_size is None:
        options.batch_size = 16 if options.quick else 128
    if options.repeats is None:
        options.repeats = 2 if options.quick else 5
    for name, least in (("students", 2), ("batch_size", 2), ("repeats", 1)):
        value = getattr(options, name)
        if value < least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print, save. Exit status 0, or 2 with one line that says what to mend."""
    try:
        options = _parser().parse_args(arguments)
        if options.suite not in SUITES:
            raise unknown_name("suite", options.suite, SUITES)
        _positive(options)
        # Imported late: --help and a mistyped option need no torch.
        from benchmarks import report

        if options.out is not None:
            report.prepare(options.out)
        finished = importlib.import_module(f"benchmarks.{options.suite}").run(options)
    except FastfuseError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.show(finished)
    if options.out is not None:
        for path in report.save(finished, options.out):
            print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
