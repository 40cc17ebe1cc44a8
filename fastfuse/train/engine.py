"""All device work of a training step as one function of nothing: what a CUDA graph repeats."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.data import TrainingBatches
from fastfuse.train.average import MovingAverage
from fastfuse.train.graph import Captured
from fastfuse.train.step import TrainStep
from fastfuse.train.terms import TermLog


class Engine:
    """Draws a batch, sets the learning rates, trains, averages and notes the loss terms; the host only counts.

    Args:
        step: forward, backward and update.
        batches: where the images come from.
        terms: where the loss terms go.
        average: follows the weights; None: there is none.
        graphed: replay the step as a CUDA graph, one for each size of batch.
    """

    def __init__(
        self,
        step: TrainStep,
        batches: TrainingBatches,
        terms: TermLog,
        *,
        average: MovingAverage | None = None,
        graphed: bool = False,
    ) -> None:
        self.step, self.batches, self.terms, self.average = step, batches, terms, average
        self.graphed = graphed
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
        if not self.graphed:
            self._work(count)
            return count
        if count not in self._graphs:
            pool = next(iter(self._graphs.values())).graph.pool() if self._graphs else None
            self._graphs[count] = Captured(lambda: self._work(count), self.tensors, pool)
        self._graphs[count]()
        return count

    def tensors(self) -> list[Tensor]:
        """Everything that a step changes and that lives on."""
        average = [] if self.average is None else self.average.tensors()
        return [*self.step.tensors(), *average, *self.terms.tensors(), self.batches.step]

    def _work(self, count: int) -> None:
        self.step.optimizers.set_factor(self._factors.gather(0, self.batches.step))
        images, labels = self.batches.draw(count)
        output = self.step(images, labels, self.progress)
        if self.average is not None:
            self.average.update()
        self.terms.note(output)
