"""What a user sees while a run goes on: a live bar in a terminal, a line per epoch elsewhere."""

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


class Display:
    """Shows progress on standard error, so that standard output stays for results.

    Args:
        title: what is trained.
        epochs: of the whole run.
        steps: per epoch.
        quiet: show nothing.
    """

    def __init__(self, title: str, epochs: int, steps: int, *, quiet: bool) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.epochs = epochs
        self.steps = steps
        self.title = title
        self.live = self.console.is_terminal and not quiet
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.live,
        )
        self._task = self._progress.add_task(title, total=epochs * steps, status="")

    def __enter__(self) -> "Display":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, epoch: int, step: int, loss: float | None) -> None:
        """Move the bar; `loss` is the last one that was read."""
        if self.live:
            status = f"epoch {epoch + 1}/{self.epochs}" + ("" if loss is None else f"  loss {loss:.4f}")
            self._progress.update(self._task, completed=epoch * self.steps + step, status=status)

    def epoch(self, line: dict[str, Any], best: Mapping[str, float]) -> None:
        """One line about an epoch that has ended; `best` is the best accuracy of every deployed network so far."""
        networks = "  ".join(
            f"{name} {line['accuracy'][name]['top1']:.2f} % (best {top1:.2f})" for name, top1 in best.items()
        )
        self.console.print(
            f"{self.title}  epoch {line['epoch']}/{self.epochs}  loss {line['losses']['loss']:.4f}  "
            f"{networks}  {line['images_per_second']:.0f} images/s",
            highlight=False,
            soft_wrap=True,
        )


def results_table(summaries: list[dict[str, Any]]) -> None:
    """Print the networks of one or several runs with their accuracies, speed and time."""
    table = Table(title="Top-1 accuracy on the test images (%)")
    for heading, justify in (("method", "left"), ("network", "left"), ("best", "right"), ("last", "right")):
        table.add_column(heading, justify=justify, no_wrap=True)
    for heading in ("images/s", "seconds"):
        table.add_column(heading, justify="right", no_wrap=True)
    for summary in summaries:
        for i, (name, best, last) in enumerate(_accuracies(summary)):
            deployed = name == summary["deployed"]
            speed = f"{summary['images_per_second']:.0f}" if i == 0 else ""
            seconds = f"{summary['seconds']:.1f}" if i == 0 else ""
            marked = f"[bold]{name}[/bold] *" if deployed else name
            table.add_row(summary["method"] if i == 0 else "", marked, best, last, speed, seconds)
        table.add_section()
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(
        f"* deployed network; best epoch chosen on the {summaries[0]['best_chosen_on']} images", highlight=False
    )


def _accuracies(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Each network with its best and last accuracy; of replicas mean and standard deviation."""
    if "statistics" not in summary:
        return [(name, f"{x['best_top1']:.2f}", f"{x['last_top1']:.2f}") for name, x in summary["networks"].items()]
    return [
        (name, *(f"{x[key]['mean']:.2f} ± {x[key]['sd']:.2f}" for key in ("best_top1", "last_top1")))
        for name, x in summary["statistics"].items()
    ]
