"""A picture of a report: a bar for each provider, and the cost against the number of students."""

from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.report import Report, Value
from fastfuse.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SUITES = ("step", "scaling")


def check() -> None:
    """Refuse before the measurement rather than after it.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("--plot needs matplotlib, which is not installed: pip install 'fastfuse[plot]'") from error


def draw(report: Report, path: Path) -> None:
    """Write a picture of a report of a suite in `SUITES`; the suffix of `path` is its format.

    Raises:
        InputError: it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    students = sorted({row["students"] for row in report.rows})
    figure = Figure(figsize=(8 if len(students) == 1 else 14, 2 + 0.3 * len(report.rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 if len(students) == 1 else 2, squeeze=False)[0]
    _bars(axes[0], report)
    if len(students) > 1:
        _lines(axes[1], report, students)
    figure.suptitle(
        f"{report.environment['device']}, amp {report.settings['amp']}, batch {report.settings['batch_size']}"
    )
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise InputError(f"--plot cannot write {path}: {error}") from error


def _bars(axes: "Axes", report: Report) -> None:
    names = [_name(row) for row in report.rows]
    medians = [row["median_ms"] for row in report.rows]
    reach = [
        [row["median_ms"] - row["p20_ms"] for row in report.rows],
        [row["p80_ms"] - row["median_ms"] for row in report.rows],
    ]
    drawn = axes.barh(names, medians, xerr=reach, color="tab:blue", ecolor="black")
    axes.bar_label(drawn, fmt="%.3g", padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("ms per step (median; line: p20 to p80)")


def _name(row: dict[str, Value]) -> str:
    replicas = f" R={row['replicas']}" if row.get("replicas", 1) != 1 else ""
    return f"{row['model']} S={row['students']}{replicas} {row['provider']}"


def _lines(axes: "Axes", report: Report, students: list[int]) -> None:
    single = [row for row in report.rows if row.get("replicas", 1) == 1]
    series = dict.fromkeys((row["model"], row["provider"]) for row in single)
    for model, provider in series:
        own = {r["students"]: r["median_ms"] for r in single if (r["model"], r["provider"]) == (model, provider)}
        axes.plot(sorted(own), [own[s] for s in sorted(own)], marker="o", label=f"{model} {provider}")
    axes.set_xticks(students)
    axes.set_xlabel("students S")
    axes.set_ylabel("ms per step")
    axes.margins(y=0.1)
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
