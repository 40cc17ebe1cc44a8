"""What the disk has of the table's rows: every seed that has an epoch, and what keeps it from being complete."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from benchmarks.train import pack
from benchmarks.train.rows import ROWS, Row
from benchmarks.train.runs import CALLS, differences, named, read_summary
from fastfuse.errors import InputError
from fastfuse.train.record import RunFolder
from fastfuse.train.replicas import own_line
from fastfuse.train.results import read_history, read_run


@dataclasses.dataclass(eq=False)
class Found:
    """One seed of a row as the disk has it.

    Attributes:
        row, seed: what it is.
        folder: of the run, ROW/SEED.
        history: an entry for every epoch, as in metrics.jsonl, with this seed's own names.
        deployed: the network that is kept.
        amp: precision of the steps.
        lacks: why it is no complete run of its recipe; empty where it is.
        made: commits, devices, versions and data of all calls that worked on it.
        seconds: of training and evaluation; of replicas, of all together.
        wall: seconds of all calls, with loading, starting and saving; None where nobody has noted them.
        replicas: trained in the same pass.
        images_per_second: of training; of all replicas together.
        peak_mb: the most memory that any call reserved on a GPU, in MiB.
    """

    row: Row
    seed: int
    folder: str
    history: list[dict[str, Any]]
    deployed: str
    amp: str
    lacks: list[str]
    made: dict[str, list[str]]
    seconds: float
    wall: float | None
    replicas: int
    images_per_second: float
    peak_mb: float | None

    def top1(self, head: str, epoch: int) -> float | None:
        """Percent of the test images after an epoch."""
        return self.history[epoch - 1]["accuracy"][head]["top1"] if epoch <= len(self.history) else None

    def best(self, head: str) -> tuple[float, int]:
        """The highest percentage of any epoch, and the first epoch that has it."""
        values = [line["accuracy"][head]["top1"] for line in self.history]
        return max(values), values.index(max(values)) + 1


def collect(out: Path) -> tuple[list[Found], list[str]]:
    """Every seed that has an epoch, and a line for each folder that has none or names no row."""
    found: list[Found] = []
    said = []
    for folder in pack.run_folders(out):
        row = ROWS.get(folder.parent.name)
        if row is None:
            said.append(f"{named(folder)}: no row of this table")
        elif not pack.epochs_of(folder):
            said.append(f"{named(folder)}: no epoch has ended")
        else:
            found += _seeds(folder, row)
    kept: dict[tuple[str, int], Found] = {}
    for one in sorted(found, key=lambda one: bool(one.lacks)):  # a complete run stands for its seed
        same = kept.setdefault((one.row.name, one.seed), one)
        if same is not one:
            said.append(f"{one.folder}: seed {one.seed} is taken from {same.folder}")
    return [one for one in found if one in kept.values()], said


def _seeds(folder: Path, row: Row) -> list[Found]:
    run, history, config = read_run(folder), read_history(folder), RunFolder(folder).read_config()
    lacks = differences(config, row)
    epochs = [line["epoch"] for line in history]
    if epochs != list(range(1, row.config().epochs + 1)):
        lacks = [f"{len(epochs)} of {row.config().epochs} epochs", *(x for x in lacks if not x.startswith("epochs "))]
    elif not (summary := read_summary(folder)) or not summary["completed"]:
        lacks.append("it has not written its results")
    noted = _calls(folder)
    calls = noted or _unnoted(folder)
    versions = [f"{name} {number}" for call in calls for name, number in call["versions"].items() if number]
    told = {key: sorted({call[key] for call in calls}) for key in ("commit", "device", "data")}
    made = {"versions": sorted(set(versions)), **told}
    lacks += [f"trained on {data} instead of {row.images}" for data in told["data"] if not data.startswith(row.images)]
    peaks = [call["peak_mb"] for call in calls if call["peak_mb"] is not None]
    prefixes = {seed: f"seed{seed}/" if config.replicas > 1 else "" for seed in run.seeds}
    return [
        Found(
            row,
            seed,
            named(folder),
            [own_line(line, prefix) for line in history] if prefix else history,
            run.results["deployed"],
            str(config.amp),
            list(lacks),
            made,
            run.results["seconds"],
            sum(call["seconds"] for call in calls) if noted else None,
            config.replicas,
            run.results["images_per_second"],
            max(peaks, default=None),
        )
        for seed, prefix in prefixes.items()
    ]


def _calls(folder: Path) -> list[dict[str, Any]]:
    """The lines of calls.jsonl."""
    path = folder / CALLS
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}): unpack the run again") from None


def _unnoted(folder: Path) -> list[dict[str, Any]]:
    """What a run of `fastfuse train` itself says about what made it."""
    summary = read_summary(folder)
    kept = ("commit", "versions", "device")
    unknown = {"peak_mb": None, "data": "images that nobody has noted"}
    return [{key: summary[key] for key in kept} | unknown] if summary else []
