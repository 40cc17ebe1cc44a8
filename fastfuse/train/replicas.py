"""The run folders of replicas: each as if it had been trained alone."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastfuse import config as configuration
from fastfuse.config import TrainConfig
from fastfuse.methods.replicas import Replicas
from fastfuse.train import checkpoint
from fastfuse.train.record import RunFolder


def write_run_folders(
    run: RunFolder, method: Replicas, config: TrainConfig, state: Mapping[str, Any], summary: Mapping[str, Any]
) -> None:
    """Write configuration, metrics, checkpoint and results of every replica into a folder of its own, RUN/seedN.

    Speed and time in the results are those of all replicas together.

    Args:
        run: of all replicas together.
        method: the replicas.
        config: of all together.
        state: their checkpoint.
        summary: their results.
    """
    for replica, name in enumerate(method.names):
        folder = RunFolder(run.path / name)
        folder.path.mkdir(exist_ok=True)
        held_out = config.seed if config.val_seed is None else config.val_seed
        single = dataclasses.replace(config, seed=config.seed + replica, val_seed=held_out, replicas=1, out=folder.path)
        folder.write_config(single)
        own = _own_state(method, replica, state)
        folder.write_metrics(own["position"]["history"])
        checkpoint.save(folder.checkpoint, {**own, "config": configuration.to_plain(single)})
        results = {key: value for key, value in summary.items() if key not in ("replicas", "statistics")}
        results |= {"networks": _named(summary["networks"], f"{name}/"), "seed": single.seed, "run": str(folder.path)}
        folder.write_summary(results)


def _own_state(method: Replicas, replica: int, state: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint of all replicas as that of a run of one."""
    prefix = f"{method.names[replica]}/"
    position = dict(state["position"])
    position["history"] = [own_line(line, prefix) for line in position["history"]]
    position["best"] = _named(position["best"], prefix)
    terms = {**state["terms"], "sums": _named(state["terms"]["sums"], prefix)}
    return {
        **state,
        "method": method.own(replica, state["method"]),
        "optimizers": [method.own(replica, own) for own in state["optimizers"]],
        "ema": None if state["ema"] is None else method.own(replica, state["ema"]),
        "position": position,
        "terms": terms,
    }


def own_line(line: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """An epoch's line of all replicas as that of the one whose names start with `prefix`."""
    parts = ("losses", "accuracy", "validation")
    return {**line, **{part: _named(line[part], prefix) for part in parts if part in line}}


def _named(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
