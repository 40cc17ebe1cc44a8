"""Where a run stands, and its results as summary.json holds them."""

import dataclasses
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastfuse import info

if TYPE_CHECKING:
    from fastfuse.train.loop import Trainer


@dataclasses.dataclass
class Position:
    """Where a run stands; with the states of networks and optimizers, all that the rest depends on."""

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    best: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    train_seconds: float = 0.0
    epoch_seconds: float = 0.0
    steps_done: int = 0
    images_done: int = 0


def statistics_of(networks: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and (sample) standard deviation over replicas of each network's accuracies.

    Args:
        networks: accuracies by "replica/network".
    """
    values: dict[str, dict[str, list[float]]] = {}
    for name, accuracy in networks.items():
        own = values.setdefault(name.partition("/")[2], {})
        for key in ("best_top1", "last_top1"):
            own.setdefault(key, []).append(accuracy[key])
    return {
        name: {key: {"mean": statistics.fmean(x), "sd": statistics.stdev(x), "n": len(x)} for key, x in own.items()}
        for name, own in values.items()
    }


def summarise(trainer: "Trainer") -> dict[str, Any]:
    """The results of a run: accuracies in percent, speed of training without evaluation, time, and what made them."""
    position = trainer.position
    last = position.history[-1]["accuracy"] if position.history else {}
    networks: dict[str, dict[str, float]] = {
        name: {
            "best_top1": position.best[name]["top1"],
            "last_top1": accuracy["top1"],
            "best_epoch": position.best[name]["epoch"],
        }
        for name, accuracy in last.items()
        if not name.endswith("oracle")
    }
    replicas = trainer.config.replicas
    return {
        "method": trainer.config.method,
        "model": trainer.config.networks,
        "data": trainer.config.data,
        "deployed": trainer.method.deployed,
        "networks": networks,
        **({} if replicas == 1 else {"replicas": replicas, "statistics": statistics_of(networks)}),
        "best_chosen_on": "test" if trainer.dataset.validation is None else "validation",
        "epochs": position.epoch,
        "completed": position.epoch == trainer.config.epochs,
        "images_per_second": position.images_done / max(position.train_seconds, 1e-9),
        "step_ms": 1000 * position.train_seconds / max(position.steps_done, 1),
        "seconds": position.seconds,
        "seed": trainer.config.seed,
        "commit": info.commit(),
        "versions": info.versions(),
        "device": info.device_name(trainer.device),
        "mode": trainer.mode,
        "run": str(trainer.run.path),
    }
