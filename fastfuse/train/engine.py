"""All device work of a training step as one function of nothing: what a CUDA graph repeats."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any
from weakref import proxy

import torch
from torch import Tensor

from fastfuse.data import StreamedTrainingBatches, TrainingBatches
from fastfuse.errors import FastfuseError
from fastfuse.train.average import MovingAverage
from fastfuse.train.graph import WARM_UP_CALLS_TOGETHER, Captured, warm_up
from fastfuse.train.step import TrainStep
from fastfuse.train.terms import TermLog


class Engine:
    """Draws a batch, sets the learning rates, trains, averages and notes the loss terms; the host only counts.

    Args:
        step: forward, backward and update.
        batches: where the images come from.
        terms: where the loss terms go.
        average: follows the weights; None: there is none.
        graphed: replay the step as a CUDA graph, one for each size of batch; the step must be made for it.
        fall_back: if a capture fails, say why in the log and go on without graphs; otherwise it is an error. Of several
            processes, all do what one must.

    Attributes:
        graphed: whether steps are replayed, now that it has been tried.
    """

    def __init__(
        self,
        step: TrainStep,
        batches: TrainingBatches | StreamedTrainingBatches,
        terms: TermLog,
        *,
        average: MovingAverage | None = None,
        graphed: bool = False,
        fall_back: bool = False,
    ) -> None:
        self.step, self.batches, self.terms, self.average = step, batches, terms, average
        self.graphed, self.fall_back = graphed, fall_back
        rates = step.optimizers.rates
        self.progress = torch.zeros((), device=rates.device)
        self._factors = torch.ones(batches.steps, dtype=rates.dtype, device=rates.device)
        self._graphs: dict[int, Captured] = {}

    def start_epoch(self, *, seed: int, epoch: int, step: int, factors: Sequence[float]) -> None:
        """Draw an epoch and stand before one of its steps.

        Args:
            seed, epoch: decide the draws; `epoch` is also the progress of the ramps.
            step: steps of this epoch that are done.
            factors: of the learning rates, one for each step of the epoch.
        """
        self.batches.start(seed=seed, epoch=epoch, step=step)
        self.progress.fill_(epoch)
        self._factors.copy_(torch.tensor(factors, dtype=self._factors.dtype))

    def run(self, step: int) -> int:
        """Run the step that is next, number `step` of its epoch; gives its number of images."""
        count = self.batches.count(step)
        self.batches.fetch(step)
        if self.graphed and count not in self._graphs:
            self._capture(count)
        if self.graphed:
            self._graphs[count]()
        else:
            self._work(count)
        return count

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes and that lives on."""
        average = [] if self.average is None else self.average.tensors()
        return [*self.step.tensors(), *average, *self.terms.tensors(), self.batches.step]

    def close(self) -> None:
        """Let go of all graphs: destroying a process group whose collectives one of them holds waits for ever."""
        self._graphs.clear()

    def _capture(self, count: int) -> None:
        pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
        together = self.step.processes.count > 1

        own: Any = proxy(self)  # held by its own graphs it would wait for the garbage collector
        work = partial(Engine._work, own, count)
        if together:
            # A process that fails here ends: the others wait on the device for its part, where no word reaches them.
            warm_up(work, self.tensors, calls=WARM_UP_CALLS_TOGETHER, stream=self.step.stream)
        failure = None
        try:
            self._graphs[count] = Captured(work, self.tensors, pool, warm=together, stream=self.step.stream)
        except RuntimeError as error:
            failure = error
        self._agree(failure)

    def _agree(self, failure: RuntimeError | None) -> None:
        """Before anyone replays what another could not capture: all replay, or all go on without graphs, or all end.

        Raises:
            RuntimeError: the failure, where nobody may go on.
            FastfuseError: the failure was another process's.
        """
        lost = failure is not None and (not self.fall_back or isinstance(failure, torch.OutOfMemoryError))
        failed, ends = self.step.processes.most([failure is not None, lost])
        if ends:
            raise failure or FastfuseError("another process could not capture its step and says why: give --mode eager")
        if failed:
            reason = (str(failure or "in another process").splitlines() or [type(failure).__name__])[0]
            logging.getLogger(__name__).warning("training goes on without CUDA graphs: a capture failed (%s)", reason)
            self.graphed = False
            self.close()

    def _work(self, count: int) -> None:
        self.step.optimizers.set_factor(self._factors.gather(0, self.batches.step))
        images, labels = self.batches.draw(count)
        output = self.step(images, labels, self.progress, count)
        if self.average is not None:
            self.average.update()
        self.terms.note(output, self.step.optimizers.bad)
