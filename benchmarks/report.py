"""What a measurement says and keeps: the machine it ran on, a table on the terminal, JSON and CSV files."""

import csv
import io
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.table import Table

from fastfuse import info
from fastfuse.errors import InputError
from fastfuse.nn.strategy import device_key
from fastfuse.train.files import write_atomic

Value = str | int | float
# Stands where a figure does not exist or was not measured.
MISSING = "-"


@dataclass(frozen=True)
class Report:
    """One finished suite.

    Attributes:
        name: stem of the files, without directory.
        settings: what was asked for.
        environment: where it ran, from `environment`.
        columns: table heading by key of `rows`, in the order of the table.
        rows: one per provider and case; keys beyond `columns` go to the files only.
        ratios: median over median, by what is divided, "baseline/other" with its case where there are several.
        samples_ms: every sample of every provider, in the order of the turns.
        warnings: why the figures may not be believed; empty where nothing is wrong with them.
    """

    name: str
    settings: dict[str, Value]
    environment: dict[str, Value]
    columns: dict[str, str]
    rows: list[dict[str, Value]]
    ratios: dict[str, float]
    samples_ms: dict[str, tuple[float, ...]]
    warnings: list[str]


def environment(device: torch.device) -> dict[str, Value]:
    """Device, software, threads, load of the machine and commit of this run."""
    return {
        "device": info.device_name(device),
        "device_key": device_key(device),
        "torch": torch.__version__,
        "triton": info.versions()["triton"] or "none",
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "commit": info.commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def show(report: Report, *, since: int = 0, table_to: TextIO | None = None) -> None:
    """Print the table and one line for each ratio; warnings go to the standard error.

    Args:
        report: finished, or as far as it has come.
        since: rows that were shown before.
        table_to: where all but the ratios go; the standard output if None.
    """
    rows = report.rows[since:]
    console = Console(file=table_to)
    if not console.is_terminal:  # a file has no right edge
        console = Console(width=260, file=table_to)
    named = {**report.settings, **report.environment}
    console.print(", ".join(f"{key} {value}" for key, value in named.items()), highlight=False, soft_wrap=True)
    table = Table()
    keys = [key for key in report.columns if any(row[key] != MISSING for row in rows)]
    for heading in (report.columns[key] for key in keys):
        table.add_column(heading, justify="left" if heading == "provider" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row[key]) for key in keys))
    console.print(table)
    for pair, ratio in report.ratios.items():
        print(f"ratio {pair}: {ratio:.2f}")
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)


def prepare(directory: Path) -> None:
    """Create the directory of the results, before the long measurement rather than after it.

    Raises:
        InputError: it cannot be created or written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise InputError(f"cannot write to {directory}: {error.strerror}; name another directory") from error


def save(report: Report, directory: Path) -> list[Path]:
    """Write `<name>.json` (everything) and `<name>.csv` (a line per row with settings and environment), atomically."""
    lines = [{**report.settings, **report.environment, **row} for row in report.rows]
    table = io.StringIO()
    writer = csv.DictWriter(table, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    texts = {".json": json.dumps(asdict(report), indent=1) + "\n", ".csv": table.getvalue()}
    paths = []
    for suffix, text in texts.items():
        paths.append(directory / (report.name + suffix))
        write_atomic(paths[-1], lambda file, text=text: file.write(text.encode()))
    return paths


def ratios(medians: Mapping[str, float], baseline: str) -> dict[str, float]:
    """Baseline's median over each other provider's, by "baseline/other"; above 1 the other one is faster."""
    return {f"{baseline}/{name}": medians[baseline] / value for name, value in medians.items() if name != baseline}


def _cell(value: Value) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def read(path: Path) -> dict[str, Any]:
    """A report that `save` wrote.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no saved report: {error}") from error
    if not isinstance(saved, dict) or not {"settings", "environment", "rows"} <= saved.keys():
        raise InputError(f"{path} is no saved report: give a JSON file that --out wrote")
    return saved
