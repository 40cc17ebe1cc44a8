"""What a report is made of: runs in groups over seeds, their curves, and what they kept."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastfuse.losses import ffcl, ffl, ffsd
from fastfuse.losses.ramps import sigmoid_rampup
from fastfuse.train import keepsakes
from fastfuse.train.compare import grouped
from fastfuse.train.keepsakes import Keepsakes
from fastfuse.train.replicas import own_line
from fastfuse.train.results import DAMAGE, Run, damaged, read_history, read_run

# Of the methods that have --rampup-epochs: what their distillation terms are multiplied by, from the epochs done.
RAMPS: dict[str, Callable[[float, float], float | Tensor]] = {
    "ffsd": ffsd.ramp,
    "ffl": ffl.ramp,
    "ffcl": ffcl.ramp,
    "one": sigmoid_rampup,
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A value of every epoch, the mean over seeds; `sd` is their sample deviation, or None for one seed."""

    mean: list[float]
    sd: list[float] | None


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        label: what they are called on the page; no two groups share one.
        runs: as read from their folders.
        seeds: of all of them.
        epochs: that have ended, from 1.
        accuracy: top-1 on the test images in percent, by network.
        losses: by term, as they enter the sum; the sum is "loss".
        rate: learning rate at the end of the epoch; None where a run of another version has not noted it.
        speed: images per second.
        ramp: factor of the distillation terms; None of methods without one.
        kept: by seed, what those runs kept whose file fits their last epoch.
        absent: of the others, why not.
    """

    label: str
    runs: list[Run]
    seeds: list[int]
    epochs: list[int]
    accuracy: dict[str, Curve]
    losses: dict[str, Curve]
    rate: Curve | None
    speed: Curve | None
    ramp: list[float] | None
    kept: dict[int, Keepsakes]
    absent: list[str]

    @property
    def deployed(self) -> str | None:
        """The network that is kept after training."""
        return self.runs[0].results["deployed"]

    @property
    def method(self) -> str:
        """Its method."""
        return self.runs[0].told["method"]


def gather(paths: Sequence[Path]) -> list[Group]:
    """Runs from their folders, finished ones that differ in nothing but the seed together.

    The run that --baseline has made in a run's folder comes with it, once it has results.

    Raises:
        InputError: no run, no epoch that has ended, or files that are damaged.
    """
    baselines = [path / "independent" for path in map(Path, paths) if _any_text(path / "independent" / "metrics.jsonl")]
    groups = grouped([read_run(path) for path in dict.fromkeys([*map(Path, paths), *baselines])])
    return [_group(runs, label) for runs, label in zip(groups, _labels(groups), strict=True)]


def _any_text(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _labels(groups: list[list[Run]]) -> list[str]:
    """The method; where several groups have it, with the first run's folder name, or all of its path."""
    methods = [runs[0].told["method"] for runs in groups]
    named = [f"{method} ({runs[0].path.name})" for method, runs in zip(methods, groups, strict=True)]
    full = [f"{method} ({runs[0].path})" for method, runs in zip(methods, groups, strict=True)]
    return [
        method if methods.count(method) == 1 else name if named.count(name) == 1 else whole
        for method, name, whole in zip(methods, named, full, strict=True)
    ]


def _group(runs: list[Run], label: str) -> Group:
    histories: list[list[dict[str, Any]]] = []
    kept: dict[int, Keepsakes] = {}
    absent: list[str] = []
    for run in runs:
        lines = read_history(run.path)
        for seed in run.seeds:
            prefix = f"seed{seed}/" if len(run.seeds) > 1 else ""
            try:
                histories.append([_numbers(own_line(line, prefix)) for line in lines])
            except DAMAGE as error:
                raise damaged(run.path / "metrics.jsonl", error) from error
            found = _kept(run, run.path / prefix)
            if isinstance(found, str):
                absent.append(f"{run.path / prefix}: {found}")
            else:
                kept[seed] = found
    epochs = [int(line["epoch"]) for line in min(histories, key=len)]
    over = [history[: len(epochs)] for history in histories]
    return Group(
        label=label,
        runs=runs,
        seeds=[seed for run in runs for seed in run.seeds],
        epochs=epochs,
        accuracy=_curves(over, "accuracy"),
        losses=_curves(over, "losses"),
        rate=_curves(over, "rate").get(""),
        speed=_curves(over, "speed").get(""),
        ramp=_ramp(runs[0].told, epochs),
        kept=kept,
        absent=absent,
    )


def _numbers(line: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a line by what they are and by name; of another version as many as there are."""
    return {
        "epoch": int(line["epoch"]),
        "accuracy": {name: float(value["top1"]) for name, value in line["accuracy"].items()},
        "losses": {name: float(value) for name, value in line.get("losses", {}).items()},
        "rate": {"": float(line["learning_rate"])} if "learning_rate" in line else {},
        "speed": {"": float(line["images_per_second"])} if "images_per_second" in line else {},
    }


def _curves(histories: list[list[dict[str, Any]]], part: str) -> dict[str, Curve]:
    """The curves that every epoch of every seed has."""
    lines = [line[part] for history in histories for line in history]
    names = [name for name in lines[0] if all(name in line for line in lines)]
    found = {}
    for name in names:
        each = list(zip(*([line[part][name] for line in history] for history in histories), strict=True))
        deviation = [statistics.stdev(values) for values in each] if len(histories) > 1 else None
        found[name] = Curve([statistics.fmean(values) for values in each], deviation)
    return found


def _ramp(told: Mapping[str, Any], epochs: list[int]) -> list[float] | None:
    length = told.get("rampup_epochs")
    if told["method"] not in RAMPS or length is None:
        return None
    return [float(RAMPS[told["method"]](epoch - 1, float(length))) for epoch in epochs]


def _kept(run: Run, folder: Path) -> Keepsakes | str:
    found = keepsakes.read(folder)
    if isinstance(found, Keepsakes) and found.epoch != run.epochs:
        return f"its {keepsakes.NAME} is of epoch {found.epoch}, and the run has {run.epochs}"
    if isinstance(found, str) and run.state == "finished":
        return f"{found}; write it with fastfuse train --resume --out {run.path}"
    return found
