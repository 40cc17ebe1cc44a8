"""`fastfuse compare`: what differs between runs, in configuration, accuracy, speed and what made them.

Finished runs that differ in nothing but the seed, and the replicas of one run, are one column.
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastfuse.errors import InputError
from fastfuse.train.results import Run, read_run

_SPEED = ("images_per_second", "step_ms", "seconds")
_MADE_ON = ("device", "mode")


def compare(paths: Sequence[Path]) -> dict[str, Any]:
    """What differs between runs.

    Args:
        paths: two run folders or more; runs that are not finished count as far as they are.

    Returns:
        `columns` (runs, seeds, state, epochs, deployed and best_chosen_on of each); and with a value for each column
        `configuration` (fields that differ), `accuracy` (by network "best" and "last" with mean, sd and n over seeds,
        percent; "deployed" is each column's own deployed network), `speed` (mean over the runs) and `versions` (those
        that differ, as lists).

    Raises:
        InputError: fewer than two, no run, no results yet, or files that are damaged.
    """
    if len(paths) < 2:
        raise InputError(f"fastfuse compare needs at least two runs, not {len(paths)}: fastfuse compare RUN_A RUN_B")
    return compared(grouped([read_run(Path(path)) for path in paths]))


def compared(columns: list[list[Run]]) -> dict[str, Any]:
    """What differs between groups of runs, see `compare`; of one group its own values."""
    return {
        "columns": [_column(runs) for runs in columns],
        "configuration": _configuration(columns),
        "accuracy": _accuracy(columns),
        "speed": _speed(columns),
        "versions": _versions(columns),
    }


def grouped(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs in their order; finished ones that differ in nothing but the seed together."""
    columns: list[list[Run]] = []
    for run in runs:
        for column in columns:
            alike = all(run.told == other.told and not set(run.seeds) & set(other.seeds) for other in column)
            if alike and all(other.state == "finished" for other in (run, *column)):
                column.append(run)
                break
        else:
            columns.append([run])
    return columns


def print_tables(found: dict[str, Any]) -> None:
    """Print what `compare` found: a column for each group of runs."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", title="What differs; accuracy in percent, mean ± deviation (n seeds)")
    for column in found["columns"]:
        table.add_column("\n".join(column["runs"]), overflow="fold")
    rows: list[tuple[str, list[str]]] = [
        ("seeds", [" ".join(map(str, column["seeds"])) for column in found["columns"]]),
        ("state", [column["state"] for column in found["columns"]]),
        ("deployed", [_shown(column["deployed"]) for column in found["columns"]]),
    ]
    rows += [(name, [_shown(x) for x in values]) for name, values in found["configuration"].items()]
    _add(table, rows)
    for name, values in found["accuracy"].items():
        _add(table, [(f"{name}, {kind}", [_percent(x) for x in values[kind]]) for kind in ("best", "last")], end=False)
    _add(table, [("best chosen on", [_shown(column["best_chosen_on"]) for column in found["columns"]])])
    for name, title in zip(_SPEED, ("images/s", "step, ms", "seconds"), strict=True):
        values = found["speed"][name]
        _add(table, [(title, ["-" if x is None else f"{x:.1f}" for x in values])], end=False)
    _add(table, [(name, [_shown(x) for x in found["speed"][name]]) for name in _MADE_ON])
    _add(table, [(name, [_shown(x) for x in values]) for name, values in found["versions"].items()])
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160).print(table)


def _column(runs: list[Run]) -> dict[str, Any]:
    return {
        "runs": [str(run.path) for run in runs],
        "seeds": sorted(seed for run in runs for seed in run.seeds),
        "state": runs[0].state,
        "epochs": runs[0].epochs,
        "deployed": runs[0].results["deployed"],
        "best_chosen_on": runs[0].results.get("best_chosen_on"),
    }


def _configuration(columns: list[list[Run]]) -> dict[str, list[Any]]:
    told = [runs[0].told for runs in columns]
    names = dict.fromkeys(name for values in told for name in values)
    rows = {name: [values.get(name) for values in told] for name in names}
    return {name: values for name, values in rows.items() if _differ(values)}


def _accuracy(columns: list[list[Run]]) -> dict[str, dict[str, list[dict[str, Any] | None]]]:
    names = dict.fromkeys(name for runs in columns for run in runs for name in run.accuracy)
    rows = {"deployed": [runs[0].results["deployed"] for runs in columns]}
    rows |= {name: [name] * len(columns) for name in names}
    return {
        title: {
            kind: [_over_seeds(runs, name, kind) for runs, name in zip(columns, row, strict=True)]
            for kind in ("best", "last")
        }
        for title, row in rows.items()
    }


def _over_seeds(runs: list[Run], name: str, kind: str) -> dict[str, Any] | None:
    values = [value for run in runs for value in run.accuracy.get(name, {}).get(kind, {}).values()]
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": deviation, "n": len(values)}


def _speed(columns: list[list[Run]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name in _SPEED:
        each = [[run.results[name] for run in runs if run.results.get(name) is not None] for runs in columns]
        found[name] = [statistics.fmean(values) if values else None for values in each]
    return found | {name: [_said(run.results.get(name) for run in runs) for runs in columns] for name in _MADE_ON}


def _versions(columns: list[list[Run]]) -> dict[str, list[Any]]:
    def made_with(run: Run) -> dict[str, Any]:
        return {"commit": run.results.get("commit"), **(run.results.get("versions") or {})}

    names = dict.fromkeys(name for runs in columns for run in runs for name in made_with(run))
    rows = {name: [_said(made_with(run).get(name) for run in runs) for runs in columns] for name in names}
    return {name: row for name, row in rows.items() if _differ(row) or any(len(values) > 1 for values in row)}


def _said(values: Iterable[Any]) -> list[str]:
    """What the runs of a column say, each once."""
    return sorted({str(value) for value in values if value is not None})


def _differ(values: list[Any]) -> bool:
    return any(value != values[0] for value in values)


def _add(table: Any, rows: list[tuple[str, list[str]]], *, end: bool = True) -> None:
    for name, values in rows:
        table.add_row(name, *values)
    if end:
        table.add_section()


def _percent(value: dict[str, Any] | None) -> str:
    if value is None:
        return ""
    return f"{value['mean']:.2f}" + (f" ± {value['sd']:.2f} ({value['n']})" if value["n"] > 1 else "")


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "-"
    if isinstance(value, float):
        return f"{value:g}"
    return "-" if value is None else str(value)
