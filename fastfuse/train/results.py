"""What a run folder says about its run, finished or not."""

import contextlib
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from fastfuse import config as configuration
from fastfuse.errors import InputError
from fastfuse.methods import METHODS
from fastfuse.train.build import resolved

# Of the fields that may differ between a run and its resumption, those that say what was computed, or how fast.
_TELLING = {"init", "teachers", "aggregation_file", "data_path", "strategy"}
# Seeds stand beside each column, and what says nothing about results stays out.
_LEFT_OUT = (configuration.RUNTIME_FIELDS - _TELLING) | {"seed", "replicas"}
# What reading such a file raises.
DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError)

Accuracies = dict[str, dict[str, dict[int, float]]]


@dataclasses.dataclass
class Run:
    """One run as its folder has it.

    Args:
        path: the folder.
        told: its configuration, without seeds and what says nothing about results.
        seeds: of its replicas, or its own.
        epochs: done.
        of: how many it is to have.
        accuracy: by network, "best" or "last", and seed; percent.
        results: summary.json or, before that is there, as much of it as metrics.jsonl gives.
    """

    path: Path
    told: dict[str, Any]
    seeds: list[int]
    epochs: int
    of: int
    accuracy: Accuracies
    results: dict[str, Any]

    @property
    def state(self) -> str:
        """How far it is."""
        return "finished" if self.epochs >= self.of else f"not finished: epoch {self.epochs} of {self.of}"


def read_run(path: Path) -> Run:
    """A run from its folder, finished or not, also of a version with other options.

    Raises:
        InputError: no run, no epoch that has ended, or a damaged file.
    """
    values, told = _told(path)
    summary, lines = _read(path / "summary.json", json.loads), _read(path / "metrics.jsonl", _lines)
    file = path / "summary.json"
    try:
        # A run that goes on after --max-time still has the summary of then.
        stale = not summary or not summary["networks"] or len(lines or []) > summary["epochs"]
        if stale and not lines:
            raise InputError(
                f"{path} has no results yet, for no epoch has ended: wait, or go on with fastfuse train --resume "
                f"--out {path}"
            )
        file = path / "metrics.jsonl" if stale else file
        results = {**(summary or {}), **_from_metrics(lines)} if stale else summary
        known = METHODS.get(values["method"])
        results = {"deployed": known.deployed if known else None, **results}
        seeds = list(range(values["seed"], values["seed"] + values["replicas"]))
        accuracy = _by_seed(results["networks"], seeds)
        return Run(path, told, seeds, int(results["epochs"]), int(values["epochs"]), accuracy, results)
    except InputError:
        raise
    except DAMAGE as error:
        raise damaged(file, error) from error


def read_history(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one for each epoch that has ended.

    Raises:
        InputError: there is no such file, or it is damaged.
    """
    lines = _read(path / "metrics.jsonl", _lines)
    if not lines:
        raise InputError(f"{path} has no metrics.jsonl with an epoch: restore it from a copy")
    return lines


def _told(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run's configuration with its defaults, and what of it is compared; of another version as it is."""
    values = _read(path / "config.json", json.loads)
    if values is None:
        raise InputError(f"{path} is not a run folder: config.json is missing")
    try:
        known = {field.name for field in dataclasses.fields(configuration.TrainConfig)}
        others = {name: value for name, value in values.items() if name not in known}
        own = {"method": values["method"]} | {name: value for name, value in values.items() if name in known}
        config = configuration.TrainConfig(**configuration.from_plain(own))
        with contextlib.suppress(InputError):  # what another version took
            config = resolved(config)
        values = configuration.to_plain(config) | others
    except DAMAGE as error:
        raise damaged(path / "config.json", error) from error
    told = {name: value for name, value in values.items() if name not in _LEFT_OUT}
    if not told["val_fraction"]:
        told["val_seed"] = None  # draws nothing
    return values, told


def _read(path: Path, parse: Any) -> Any:
    """A file's content, or None where there is none."""
    try:
        return parse(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DAMAGE as error:
        raise damaged(path, error) from error


def _lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def damaged(path: Path, error: Exception) -> InputError:
    """The error about a file whose content cannot be a run's."""
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    again = "" if path.name == "config.json" else ", or have it written anew with fastfuse train --resume"
    return InputError(f"{path} is damaged or not a run's file ({reason}): restore it from a copy{again}")


def _from_metrics(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the summary will say, from the epochs so far."""
    chosen_on = "validation" if "validation" in lines[-1] else "accuracy"
    networks = {}
    for name, accuracy in lines[-1]["accuracy"].items():
        if not name.endswith("oracle"):
            best = max(lines, key=lambda line: line[chosen_on][name]["top1"])
            networks[name] = {"best_top1": best["accuracy"][name]["top1"], "last_top1": accuracy["top1"]}
    return {
        "networks": networks,
        "best_chosen_on": "test" if chosen_on == "accuracy" else chosen_on,
        "epochs": lines[-1]["epoch"],
        # Every epoch has as many images.
        "images_per_second": statistics.harmonic_mean(line["images_per_second"] for line in lines),
        "seconds": lines[-1]["seconds"],
    }


def _by_seed(networks: dict[str, dict[str, float]], seeds: list[int]) -> Accuracies:
    found: Accuracies = {}
    for entry, values in networks.items():
        replica, _, name = entry.rpartition("/")
        seed = int(replica.removeprefix("seed")) if replica else seeds[0]
        own = found.setdefault(name, {"best": {}, "last": {}})
        for kind in own:
            own[kind][seed] = float(values[f"{kind}_top1"])
    return found
