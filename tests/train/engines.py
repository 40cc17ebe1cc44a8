"""Engines on a toy data set, and whether two of them take the same steps."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastfuse import data
from fastfuse.data.dataset import Dataset, Split
from fastfuse.testing import assert_within_budget, in_other_orders
from fastfuse.train.average import MovingAverage
from fastfuse.train.distributed import ALONE, Processes
from fastfuse.train.engine import Engine
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from fastfuse.train.terms import TermLog
from tests.methods import making

COUNT, BATCH = 11, 4  # the last batch of three is smaller


def dataset() -> Dataset:
    """Eleven images of 8x8 in five classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 8, 8, 3), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(COUNT) % 5)
    return Dataset("toy", split, split, None, tuple("abcde"), torch.full((3,), 0.5), torch.full((3,), 0.25), 1, True)


def make(
    name: str,
    *,
    amp: str = "off",
    ema: float = 0.0,
    graphed: bool = False,
    compiled: bool = False,
    strategy: str = "loop",
    device: str = "cpu",
    processes: Processes = ALONE,
    sync_batchnorm: bool = False,
    accumulate: int = 1,
    batch: int = BATCH,
    students: int = 2,
    **guards: Any,
) -> Engine:
    """An engine at the start of a run, of the same weights and images each time."""
    torch.manual_seed(0)
    method = making.make(name, students, num_classes=5).to(device).train()
    method.arrange(strategy)
    step = TrainStep(
        method,
        build_optimizers(method, lr=0.02, **guards),
        amp=amp,
        compiled=compiled,
        graphed=graphed,
        accumulate=accumulate,
        processes=processes,
        sync_batchnorm=sync_batchnorm,
    )
    batches = data.TrainingBatches(
        dataset().to(device),
        batch_size=batch,
        parts=method.image_parts,
        share=processes.share,
        memory_format=step.memory_format,
    )
    average = MovingAverage(method, ema) if ema else None
    return Engine(step, batches, TermLog(50, device, max_bad=32), average=average, graphed=graphed)


def run_epoch(engine: Engine, epoch: int = 0, after_step: Callable[[], None] = lambda: None, *, seed: int = 0) -> None:
    """All steps, three of them with batches of four, at falling rates."""
    factors = [0.5**step for step in range(engine.batches.steps)]
    engine.start_epoch(seed=seed, epoch=epoch, step=0, factors=factors)
    for step in range(engine.batches.steps):
        engine.run(step)
        engine.terms.count(epoch=epoch, step=step, images=engine.batches.count(step))
        after_step()


def state_of(engine: Engine) -> dict[str, Tensor]:
    """Copies of all weights, statistics and optimizer states, by the same names whatever the strategy."""
    found = dict(engine.step.method.state_dict())
    for i, own in enumerate(engine.step.optimizers.state_dict()):
        found |= {f"{i}/{name}/{key}": value for name, state in own.items() for key, value in state.items()}
    return {name: x.detach().clone() for name, x in found.items()}


def put(engine: Engine, state: dict[str, Tensor]) -> None:
    """Give an engine what `state_of` found; its memory stays where it is."""
    method = engine.step.method
    method.load_state_dict({name: state[name] for name in method.state_dict()})
    held: list[dict[str, dict[str, Tensor]]] = [{} for _ in engine.step.optimizers.optimizers]
    for name, value in state.items():
        if "/" in name:
            i, parameter, key = name.split("/")
            held[int(i)].setdefault(parameter, {})[key] = value
    engine.step.optimizers.load_state_dict(held)


def agree_over_20_steps(eager: Engine, other: Engine, what: str) -> None:
    """Every step starts from the eager run's state; its terms and its update stay within the error budget."""
    exact = make_exact(eager)
    # A method of two terms rounds them as luck has it: the worst of several orders of summation is no luck. A GPU knows
    # one order, so a CPU takes the step too; not of several processes, whose modes differ in no kernel.
    alone = eager.progress.is_cuda and eager.step.processes.count == 1
    rounding = [eager, make_twin(eager, on="cpu")] if alone else [eager]
    for number in range(20):
        start = state_of(eager)
        ours, truth = (_one_step(engine, start, number) for engine in (other, exact))
        orders = [
            found
            for engine in rounding
            for found in in_other_orders(lambda engine=engine, at=start, number=number: _one_step(engine, at, number))
        ]
        for i, part in enumerate(("terms", "changes")):
            assert_within_budget(ours[i], truth[i], [x[i] for x in orders], what=f"{what}, step {number}: {part}")


def _one_step(engine: Engine, start: dict[str, Tensor], number: int) -> list[Tensor]:
    """The terms of step `number` from a state, and what it changes."""
    epoch, step = divmod(number, 3)
    put(engine, start)
    engine.start_epoch(seed=0, epoch=epoch, step=step, factors=[1.0] * 3)
    engine.run(step)
    engine.terms.count(epoch=epoch, step=step, images=1)
    row = engine.terms._buffer[0].clone()
    engine.terms.flush()
    after = state_of(engine)
    changes = [after[name].double() - before.to(after[name].device).double() for name, before in start.items()]
    return [row, torch.cat([c.flatten() for c in changes]).to(row.dtype)]


def make_exact(engine: Engine) -> Engine:
    """The same in float64."""
    exact = make_twin(engine, dtype=torch.float64)
    exact.progress = exact.progress.double()
    return exact


def make_twin(engine: Engine, *, dtype: torch.dtype = torch.float32, on: str | None = None) -> Engine:
    """The same, eager, with another dtype or on another device."""
    device = engine.progress.device if on is None else torch.device(on)
    method = copy.deepcopy(engine.step.method).to(device=device, dtype=dtype)
    processes = engine.step.processes
    step = TrainStep(method, build_optimizers(method, lr=0.02), processes=processes)
    form = {"dtype": dtype, "memory_format": step.memory_format, "share": processes.share}
    dataset = engine.batches.dataset.to(device)
    batches = data.TrainingBatches(dataset, batch_size=BATCH, parts=engine.batches.parts, **form)
    return Engine(step, batches, TermLog(50, device))
