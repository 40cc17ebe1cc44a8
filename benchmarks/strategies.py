"""Put what a report of the suite "step" measured into the table that the strategy "auto" follows.

python benchmarks/strategies.py results/step_resnet32_s2+4+8_b128_bf16_cuda.json
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Run as a script, Python looks in this folder only: the package lies one above.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import report
from benchmarks.command import one_line_on_error
from fastfuse.errors import InputError
from fastfuse.nn.strategy import TABLE, Row, architecture, write_row

# The mode in which "auto" runs a step there, see `fastfuse.train.modes.pick_mode`.
MODE = {"cuda": "graphed", "cpu": "eager"}


def table_rows(saved: dict[str, Any], mode: str | None = None) -> list[Row]:
    """A row for each model and number of students of a saved report.

    Args:
        saved: the JSON file that `--out` wrote.
        mode: whose times to take; the one that "auto" comes to on the report's device if None.

    Raises:
        InputError: a report of another suite, a quick one, or one without two strategies in this mode.
    """
    from fastfuse import models

    settings, where = saved["settings"], saved["environment"]
    if settings["suite"] != "step" or settings["quick"]:
        raise InputError("only a whole run of the suite step can say which strategy is fastest, not another or --quick")
    mode = mode or MODE[settings["device_type"]]
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in saved["rows"]:
        if row["kind"] == "fastfuse" and row["mode"] == mode:
            times.setdefault((row["model"], row["students"]), {})[row["strategy"]] = row["median_ms"]
    if not any(len(found) > 1 for found in times.values()):
        raise InputError(f"the report has no two strategies of fastfuse in mode {mode}: name another with --mode")
    kept = {"mode": mode} | {key: settings[key] for key in ("amp", "repeats")}
    kept_of = {r["model"]: kept | {key: r[key] for key in ("batch_size", "image_size")} for r in saved["rows"]}
    versions = {key: where[key] for key in ("python", "torch", "triton")}
    kinds = {model: architecture(models.build(model, 100)) for model, _ in times}
    return [
        Row(where["device_key"], kinds[model], s + 1, found, kept_of[model], where["commit"], versions)
        for (model, s), found in times.items()
        if len(found) > 1
    ]


@one_line_on_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0, or 2 with one line that says what to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="JSON file of the suite step")
    parser.add_argument("--mode", help="whose times to take (graphed on a GPU, eager on a CPU)")
    parser.add_argument("--table", type=Path, default=TABLE, help="the table to change")
    options = parser.parse_args(arguments)
    rows = table_rows(report.read(options.report), options.mode)
    for row in rows:
        write_row(row, table=options.table)
        fastest = min(row.milliseconds, key=lambda name: row.milliseconds[name])
        print(f"{row.device}, {row.architecture}, {row.networks} networks: {fastest}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
