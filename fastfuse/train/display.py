"""What a user sees while a run goes on: a live view in a terminal, plain lines elsewhere.

All of it are numbers that the host has anyway: nothing here waits for the device.
"""

import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

# The view stays within a screen: of many replicas the first networks and terms are shown, and how many there are.
NETWORKS, TERMS = 24, 30


class _TimeLeft(TimeRemainingColumn):
    """Says that it is the time left: another time stands beside it."""

    def render(self, task: Task) -> Text:
        return Text("") if task.finished else super().render(task).append(" left")


class Display:
    """Shows progress on standard error, so that standard output stays for results.

    Args:
        title: what is trained.
        epochs: of the whole run.
        steps: per epoch.
        quiet: show nothing.
        device: whose memory is shown: of a GPU the peak of what PyTorch took, else that of the process.
        console: where to show it.
    """

    def __init__(
        self,
        title: str,
        epochs: int,
        steps: int,
        *,
        quiet: bool,
        device: torch.device | str = "cpu",
        console: Console | None = None,
    ) -> None:
        self.console = Console(stderr=True, quiet=quiet) if console is None else console
        self.epochs = epochs
        self.steps = steps
        self.title = title
        self.device = torch.device(device)
        self.live = self.console.is_terminal and not quiet
        self._line: dict[str, Any] = {}
        self._best: dict[str, float] = {}
        self._deployed: list[str] = []
        self._terms: dict[str, float] = {}
        self._images = 0
        self._epoch_began = self._began = time.monotonic()
        self._epochs_before: int | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=self.console,
            disable=not self.live,
        )
        self._task = self._progress.add_task(title, total=epochs * steps)
        self._status = ""
        self._view = Live(get_renderable=self.view, console=self.console, vertical_overflow="ellipsis")

    def __enter__(self) -> "Display":
        self._epoch_began = self._began = time.monotonic()
        if self.live:
            self._view.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self._view.stop()

    def known(self, line: Mapping[str, Any], best: Mapping[str, Mapping[str, float]], deployed: Iterable[str]) -> None:
        """Take up what an epoch gave, without a line about it: as `epoch`."""
        self._line, self._deployed = dict(line), list(deployed)
        self._best = {name: value["top1"] for name, value in best.items()}
        self._terms = dict(line["losses"])

    def step(self, epoch: int, step: int, terms: Mapping[str, float], *, images: int) -> None:
        """Say that a step is done.

        Args:
            epoch: epochs done before it.
            step: steps of this epoch that are done.
            terms: means of the loss terms over the epoch, as far as they have been read.
            images: of this step.
        """
        if self._epochs_before is None:
            self._epochs_before = epoch
        self._images += images
        self._terms = dict(terms) or self._terms
        if self.live:
            speed = self._images / max(time.monotonic() - self._epoch_began, 1e-9)
            loss = f"  loss {self._terms['loss']:.4f}" if "loss" in self._terms else ""
            self._status = f"epoch {epoch + 1}/{self.epochs}  step {step}/{self.steps}{loss}  {speed:.0f} images/s"
            self._progress.update(self._task, completed=epoch * self.steps + step)

    def epoch(self, line: Mapping[str, Any], best: Mapping[str, Mapping[str, float]], deployed: Iterable[str]) -> None:
        """Say that an epoch has ended.

        Args:
            line: of metrics.jsonl.
            best: "top1" of every network in its best epoch so far.
            deployed: names of the networks that are kept.
        """
        self.known(line, best, deployed)
        names = self._deployed if self.live else line["accuracy"]  # the view has the others
        networks = "  ".join(self._accuracy(name) for name in names if name in line["accuracy"])
        parts = [f"{self.title}  epoch {line['epoch']}/{self.epochs}", f"loss {line['losses']['loss']:.4f}", networks]
        parts.append(f"{line['images_per_second']:.0f} images/s")
        if not self.live:
            parts += [self._time_left(line["epoch"]), memory(self.device)]
        self._print("  ".join(part for part in parts if part))
        if not self.live:
            terms = {name: value for name, value in line["losses"].items() if name != "loss"}
            self._print("  terms: " + "  ".join(f"{name} {value:.3g}" for name, value in terms.items()))
        self._images, self._epoch_began = 0, time.monotonic()

    def view(self) -> RenderableType:
        """The live view as it is now: bar, status, accuracies and loss terms; drawn by a thread of its own."""
        parts: list[RenderableType] = [self._progress]
        status = "  ".join(part for part in (self._status, memory(self.device)) if part)
        parts.append(Text(status))
        if self._line:
            cells = [self._cell(name) for name in self._line["accuracy"]]
            parts += [Text(f"top-1 % after epoch {self._line['epoch']} (best)", style="dim"), _columns(cells, NETWORKS)]
        terms = [Text(f"{name} {value:.3g}") for name, value in self._terms.items() if name != "loss"]
        if terms:
            parts += [Text("loss terms, mean of the epoch as far as it was read", style="dim"), _columns(terms, TERMS)]
        return Group(*parts)

    def _cell(self, name: str) -> Text:
        value = f"{self._line['accuracy'][name]['top1']:.2f} ({self._best.get(name, float('nan')):.2f})"
        return Text(f"{name} {value}", style="bold" if name in self._deployed else "")

    def _accuracy(self, name: str) -> str:
        best = f" (best {self._best[name]:.2f})" if name in self._best else ""
        return f"{name} {self._line['accuracy'][name]['top1']:.2f} %{best}"

    def _time_left(self, done: int) -> str:
        """From the epochs of this process; the first one of a resumed run may have begun in its middle."""
        ours = done - (self._epochs_before or 0)
        seconds = (time.monotonic() - self._began) / max(ours, 1) * (self.epochs - done)
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d} left" if seconds else ""

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def memory(device: torch.device) -> str:
    """The peak of the memory that PyTorch took on a GPU, or of the process's own; "" where that cannot be told."""
    if device.type == "cuda":
        return f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    try:
        import resource
    except ImportError:  # not on Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


def _columns(cells: list[Text], most: int) -> Columns:
    more = [Text(f"and {len(cells) - most} more", style="dim")] if len(cells) > most else []
    return Columns([*cells[:most], *more], padding=(0, 2), equal=True)


def results_table(summaries: list[dict[str, Any]]) -> None:
    """Print the networks of one or several runs with their accuracies, speed and time."""
    table = Table(title="Top-1 accuracy on the test images (%)")
    for heading in ("method", "network"):
        table.add_column(heading, no_wrap=True)
    for heading in ("best", "last", "images/s", "seconds"):
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
