"""Put what reports of the suite "kernels" measured into the table that the backend "auto" follows.

python benchmarks/preferences.py results/kernels_1of4_cuda.json results/kernels_2of4_cuda.json ...
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a script, Python looks in this folder only: the package lies one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.command import one_line_on_error
from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch
from fastfuse.kernels._dispatch import PREFERENCES
from fastfuse.train.files import write_atomic

PREFIX = "fastfuse "


def rows(saved: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By op, or kind of its calls, the backend with the smallest sum of medians over what every backend ran.

    The reference is one of them where the op prefers it to its kernels.

    Args:
        saved: the JSON files that `--out` wrote, of one device.

    Raises:
        InputError: reports of another suite, quick ones, of several devices, or without an op with two backends.
    """
    if any(own["settings"]["suite"] != "kernels" or own["settings"]["quick"] for own in saved):
        raise InputError("only whole runs of the suite kernels can say which backend is faster, not others or --quick")
    if len({own["environment"]["device_key"] for own in saved}) != 1:
        raise InputError("the reports are of several devices: give those of one")
    times: dict[str, dict[tuple[str, ...], dict[str, float]]] = {}
    for row in (row for own in saved for row in own["rows"]):
        case = row["shape"], row["dtype"], row["mode"]
        backend = row["provider"].removeprefix(PREFIX)
        if row["provider"] == backend and backend != next(iter(_dispatch.backends(row["op"]))):
            continue  # the reference or the compiler, which this op does not take by itself
        times.setdefault(f"{row['op']} {row.get('kind', '')}".strip(), {}).setdefault(case, {})[backend] = row[
            "median_us"
        ]
    found = {}
    for op, cases in times.items():
        backends = {backend for measured in cases.values() for backend in measured}
        complete = [measured for measured in cases.values() if measured.keys() == backends]
        if len(backends) > 1 and complete:
            sums = {backend: sum(measured[backend] for measured in complete) for backend in sorted(backends)}
            fastest = min(sums, key=lambda backend: sums[backend])
            commit = saved[0]["environment"]["commit"]
            found[op] = {"backend": fastest, "microseconds": sums, "commit": commit}
    if not found:
        raise InputError("no op was measured with two backends: run on a GPU, after make build")
    return found


@one_line_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="+", help="JSON files of the suite kernels")
    parser.add_argument("--table", type=Path, default=PREFERENCES, help="the table to change")
    options = parser.parse_args(arguments)
    saved = [report.read(path) for path in options.report]
    found, device = rows(saved), saved[0]["environment"]["device_key"]
    table = json.loads(options.table.read_text())
    table[device] = table.get(device, {}) | found
    text = json.dumps(table, indent=2, sort_keys=True) + "\n"
    write_atomic(options.table, lambda file: file.write(text.encode()))
    for op, row in found.items():
        print(f"{device}, {op}: {row['backend']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
