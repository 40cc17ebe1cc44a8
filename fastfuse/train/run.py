"""From a configuration to a finished run."""

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from fastfuse.config import TrainConfig
from fastfuse.data import Dataset, lost_workers_explained
from fastfuse.errors import FastfuseError, InputError
from fastfuse.methods import Method
from fastfuse.train import build, checkpoint, distributed, loggers, modes, preliminary
from fastfuse.train.loop import Trainer
from fastfuse.train.record import RunFolder


def train(config: TrainConfig) -> dict[str, Any]:
    """Train as configured, or go on from a checkpoint.

    Args:
        config: `resume` takes up the run in `out`; a run killed before its first checkpoint starts anew.

    Returns:
        The summary, as in summary.json.

    Raises:
        FastfuseError: bad input, before anything is written; a loss that is not finite or a disk that is full, with
            the last good checkpoint kept; InterruptedRun after Ctrl-C, SIGTERM or SIGUSR1.
    """
    processes = distributed.current()
    config = distributed.configured(build.resolved(config), processes)
    loggers.check(config.log)
    out = config.out
    if out is None:
        stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
        networks = config.networks.replace(":", "-").replace("/", "-")
        out = processes.agreed(Path("runs") / f"{stamp}_{config.method}_{networks}_{config.data}")
        config = dataclasses.replace(config, out=out)
    run = RunFolder(out)
    device = distributed.pick_device(config.device)
    modes.pick_mode(config.mode, device)  # refuses what the device cannot do
    config = dataclasses.replace(config, amp=modes.pick_amp(config.amp, device))
    with processes.leader_first():  # who may have to download it
        dataset = build.load_data(config)
    resuming = processes.agreed(config.resume and bool(checkpoint.kept(run.checkpoint)))
    state = checkpoint.load_matching(run.checkpoint, config, dataset.fingerprint()) if resuming else None
    # First without what must be trained before, so that bad input is found before hours of it.
    standing, given = preliminary.stand_in(config, dataset.num_classes)
    method = _arranged(standing, dataset, given, device, fresh=state is None)
    if processes.leads:
        _begin(run, config)
    processes.wait()
    began = time.monotonic()
    if given:
        try:
            given = preliminary.prepared(config, dataset.num_classes, train)
        except preliminary.OutOfTime:
            processes.wait()
            return {"run": str(run.path), "networks": {}, "completed": False}
        method = _arranged(config, dataset, given, device, fresh=state is None)
    if config.max_time is not None:
        left = config.max_time - (time.monotonic() - began) / 60
        config = dataclasses.replace(config, max_time=max(left, 0.0))
    explained = (_out_of_memory_explained(config, device), lost_workers_explained())
    with closing(dataset), _arithmetic(config), explained[0], explained[1]:
        trainer = Trainer(config, run, dataset, method, device, preliminary.fingerprint(given), processes)
        if state is not None:
            trainer.restore(state)
        with closing(trainer.engine), trainer.loggers, trainer.writer:
            summary = trainer.run_all()
    if config.method == "dfa-search" and config.replicas == 1 and summary["networks"] and processes.leads:
        _draw_search(run, quiet=config.quiet)
    processes.wait()  # until all files are there, which others may read next
    return summary


def _begin(run: RunFolder, config: TrainConfig) -> None:
    created = run.claim(resume=config.resume)
    try:
        run.write_config(config)
    except FastfuseError:
        if created:
            run.path.rmdir()
        raise


def _draw_search(run: RunFolder, *, quiet: bool) -> None:
    """The weights over time as aggregation.png; without matplotlib a word about it, for the run has what it is for."""
    from fastfuse.train.alpha_plot import plot_alphas

    try:
        plot_alphas(run.path, run.path / "aggregation.png")
    except InputError as error:
        if not quiet:
            print(f"fastfuse: no aggregation.png: {error}", file=sys.stderr)


def _arranged(
    config: TrainConfig, dataset: Dataset, given: dict[str, Any], device: torch.device, *, fresh: bool
) -> Method:
    with _out_of_memory_explained(config, device):
        method = _assembled(config, dataset, given, fresh=fresh).to(device)
        distributed.arrange(method, config.strategy, distributed.current())
    return method


def _assembled(config: TrainConfig, dataset: Dataset, given: dict[str, Any], *, fresh: bool) -> Method:
    """The method with its initial weights, tried out; of a run that is resumed without either."""
    shapes: dict[str, Any] = {"num_classes": dataset.num_classes, "given": given, "image_size": dataset.image_size}
    method = build.make_method(config, **shapes)
    if fresh:
        build.initial_weights(method, config.init)
        share = config.accumulate * (1 if config.sync_batchnorm else distributed.current().count)
        build.try_out(method, dataset, config.batch_size, divided=share)
    return build.with_replicas(method, config, **shapes)


@contextmanager
def _arithmetic(config: TrainConfig) -> Iterator[None]:
    with modes.float32_products(tf32=config.tf32), modes.reproducible(on=config.deterministic):
        yield


@contextmanager
def _out_of_memory_explained(config: TrainConfig, device: torch.device) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # The CPU's allocator has no exception of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        first = (str(error).splitlines() or ["no details"])[0]
        half = "" if modes.pick_amp(config.amp, device) != "off" else ", or give --amp bf16"
        raise FastfuseError(
            f"out of memory with --batch-size {config.batch_size} and --students {config.students}: lower either"
            f"{half}; the last checkpoint in {config.out} is intact ({first})"
        ) from error
