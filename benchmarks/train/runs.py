"""Runs of the table, one after another until the time is over; what lies on the disk is all that the next call needs.

OUT/runs/ROW/seed0 is a run folder of `fastfuse train`, OUT/runs/ROW/seeds0-2 one of replicas. In each lies besides
`calls.jsonl`: a line for every call that has worked on it, with what made it and what it took.
"""

import dataclasses
import enum
import gc
import json
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.train.rows import Row
from fastfuse import config as configuration
from fastfuse import info
from fastfuse.config import TrainConfig
from fastfuse.errors import FastfuseError, InputError, InterruptedRun, NonFiniteLossError
from fastfuse.train import build
from fastfuse.train.record import RunFolder
from fastfuse.train.run import train

CALLS = "calls.jsonl"
# What stays of --max-time for saving and packing, at most a tenth of it.
RESERVE = 15.0
# Fields in which a run may differ from its recipe and be of the row all the same. The data are held to be the same
# by the checkpoint, and every table says the precision.
FREE = configuration.RUNTIME_FIELDS | {"seed", "val_seed", "replicas", "amp", "data"}


class Clock:
    """Time that a call has.

    Args:
        seconds: until everything is written; None: no end.
        since: when the call began, of `time.monotonic`.
    """

    def __init__(self, seconds: float | None, since: float) -> None:
        self._end = None if seconds is None else since + seconds - min(RESERVE, seconds / 10)

    def left(self) -> float | None:
        """Seconds for training."""
        return None if self._end is None else self._end - time.monotonic()


class Outcome(enum.Enum):
    """Of a call: everything is finished, time is over, or a run failed."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"


def plan(rows: Sequence[Row], seeds: Sequence[int], out: Path, *, replicas: bool) -> Iterator[TrainConfig]:
    """Every run that is asked for, seed by seed, so that what is cut short has said something of each row.

    Raises:
        InputError: seeds of replicas that do not follow one another.
    """
    if not replicas:
        for seed in seeds:
            yield from (_planned(row, seed, out / "runs" / row.name / f"seed{seed}") for row in rows)
        return
    if list(seeds) != list(range(seeds[0], seeds[0] + len(seeds))) or len(seeds) < 2:
        raise InputError(
            f"--replicas trains two or more seeds that follow one another, not {','.join(map(str, seeds))}: "
            "give --seeds such as 0,1,2, or leave --replicas out"
        )
    for row in rows:
        config = _planned(row, seeds[0], out / "runs" / row.name / f"seeds{seeds[0]}-{seeds[-1]}")
        yield dataclasses.replace(config, replicas=len(seeds))


def _planned(row: Row, seed: int, out: Path) -> TrainConfig:
    return dataclasses.replace(row.config(), seed=seed, out=out, resume=out.exists(), quiet=True)


def learn(planned: Sequence[TrainConfig], clock: Clock) -> Outcome:
    """Train what is not finished, in order, until the clock says so; the first one is given a step in any case.

    Raises:
        InputError: a folder that holds another run.
        InterruptedRun: a signal; the run's checkpoint is written.
    """
    todo = [config for config in planned if not finished(config)]
    for config in todo:
        _check_same(config)
    # All of them have the same data, which every call notes: a table must tell a part of CIFAR-100 from all of it.
    images = build.load_data(todo[0]).fingerprint() if todo else ""
    outcome = Outcome.FINISHED
    for i, config in enumerate(todo):
        left = clock.left()
        if left is not None and left <= 0 and i > 0:
            _say(f"no time left for {named(config.out)} and {len(todo) - i - 1} more")
            return Outcome.STOPPED
        max_time = None if left is None else max(left, 1e-3) / 60
        try:
            summary = _one(dataclasses.replace(config, max_time=max_time), images)
        except NonFiniteLossError as error:
            _say(f"{named(config.out)} failed: {error}")
            outcome = Outcome.FAILED
            continue
        if not summary["completed"]:
            return Outcome.STOPPED
    return outcome


def finished(config: TrainConfig) -> bool:
    """Whether the run of this configuration has ended in its folder."""
    summary = read_summary(config.out)
    return bool(summary and summary["completed"] and summary["epochs"] == config.epochs)


def read_summary(folder: Path | None) -> dict[str, Any] | None:
    """summary.json of a run; None where there is none that can be read."""
    assert folder is not None
    try:
        found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
        return found if "completed" in found else None
    except (OSError, ValueError):
        return None


def differences(config: TrainConfig, row: Row) -> list[str]:
    """What of a run's configuration is not as the row has it, as `lr 0.05 instead of 0.1`."""
    is_now, wanted = (_plain(x) for x in (config, row.config()))
    names = [name for name in wanted if name not in FREE and is_now.get(name) != wanted[name]]
    return [f"{name} {is_now.get(name)} instead of {wanted[name]}" for name in names]


def named(folder: Path | None) -> str:
    """ROW/SEED of a run folder."""
    assert folder is not None
    return "/".join(folder.parts[-2:])


def _plain(config: TrainConfig) -> dict[str, Any]:
    return configuration.to_plain(build.resolved(config))


def _check_same(config: TrainConfig) -> None:
    """Refuse what no run can use, and to go on with a run of other settings, which might be overwritten."""
    wanted = _plain(config)
    assert config.out is not None
    if not (config.out / "config.json").exists():
        return
    kept = _plain(RunFolder(config.out).read_config())
    for name, value in wanted.items():
        same = kept[name] == value or (name == "amp" and value == "auto")
        if name not in configuration.RUNTIME_FIELDS and not same:
            raise InputError(
                f"{config.out} holds a run with {name} = {kept[name]}, not {value}: give the options that it was begun "
                "with, or choose another --out"
            )


def _one(config: TrainConfig, images: str) -> dict[str, Any]:
    """One run as far as it comes, and its line of calls.jsonl."""
    folder = config.out
    assert folder is not None
    began, since = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    on_gpu = torch.cuda.is_available() and not str(config.device).startswith("cpu")
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    said = "was interrupted"
    try:
        summary = train(config)
        said = f"{'finished' if summary['completed'] else 'stopped'} {_where(summary)}"
        return summary
    except InterruptedRun:
        raise
    except FastfuseError:
        said = "failed"
        raise
    finally:
        seconds = time.monotonic() - since
        call = {"began": began, "seconds": round(seconds, 3), "commit": info.commit(), "versions": info.versions()}
        call |= {"device": info.device_name(build.pick_device(config.device)), "outcome": said, "data": images}
        call["peak_mb"] = round(torch.cuda.max_memory_reserved() / 2**20, 1) if on_gpu else None
        if folder.exists():  # else it was refused before it began
            with (folder / CALLS).open("a") as file:
                file.write(json.dumps(call) + "\n")
            _say(f"{named(folder)} {said}, {seconds:.0f} s")


def _where(summary: dict[str, Any]) -> str:
    if not summary["networks"]:
        return "before its first epoch's end"
    own = [values["last_top1"] for name, values in summary["networks"].items() if _is_deployed(name, summary)]
    return f"after epoch {summary['epochs']} with {' '.join(f'{top1:.2f}' for top1 in own)} % {summary['deployed']}"


def _is_deployed(name: str, summary: dict[str, Any]) -> bool:
    return name.rpartition("/")[2] == summary["deployed"]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
