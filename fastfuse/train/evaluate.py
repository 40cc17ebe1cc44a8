"""Accuracy of every head on a split, counted on the device and read once."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any
from weakref import proxy

import torch
from torch import Tensor

from fastfuse.data import EvaluationBatches, StreamedEvaluationBatches
from fastfuse.methods.base import Method
from fastfuse.train.distributed import ALONE, Processes
from fastfuse.train.graph import Captured

Accuracy = dict[str, dict[str, float]]


class Evaluator:
    """Counts the right answers of every head, the mean-logit ensemble, and the oracle.

    The oracle counts an image as right if any student is; published code calls that ensemble accuracy. Ensemble and
    oracle exist where there are two or more students. Top-5 counts the best min(5, K) classes.

    Args:
        method: its mode is restored after every evaluation.
        batches: the images.
        autocast: makes the context that the networks run in.
        graphed: replay a batch as a CUDA graph, one for each size.
        processes: those that count together, each the images of its own batches.
        stands_in: this one's images count for nothing, as there are none for it.
    """

    def __init__(
        self,
        method: Method,
        batches: EvaluationBatches | StreamedEvaluationBatches,
        autocast: Callable[[], AbstractContextManager],
        *,
        graphed: bool = False,
        processes: Processes = ALONE,
        stands_in: bool = False,
    ) -> None:
        self.processes, self.stands_in = processes, stands_in
        self.method, self.batches, self.autocast, self.graphed = method, batches, autocast, graphed
        self._names: list[str] = []
        self._counts: Tensor | None = None
        self._graphs: dict[int, Captured] = {}

    @torch.no_grad()
    def __call__(self) -> Accuracy:
        """Top-1 and top-5 in percent, by name."""
        was_training = self.method.training
        self.method.eval()
        self.batches.start()
        if self._counts is not None:
            self._counts.zero_()
        for step, count in enumerate(self.batches.counts):
            self.batches.fetch(step)
            self._run(count)
        self.method.train(was_training)
        own = [sum(self.batches.counts), *self._counted().flatten().tolist()]
        total, *hits = self.processes.sum([0] * len(own) if self.stands_in else own)
        return {
            name: {"top1": 100.0 * top1 / total, "top5": 100.0 * top5 / total}
            for name, top1, top5 in zip(self._names, hits[::2], hits[1::2], strict=True)
        }

    def _run(self, count: int) -> None:
        if not self.graphed:
            self._work(count)
            return
        if count not in self._graphs:
            if self._counts is None:  # made by the first batch, and a capture must find it in place
                before = [x.clone() for x in self.batches.tensors()]
                self._work(count)
                self._counted().zero_()
                for x, old in zip(self.batches.tensors(), before, strict=True):
                    x.copy_(old)
            own: Any = proxy(self)  # held by its own graphs it would wait for the garbage collector
            work = partial(Evaluator._work, own, count)
            self._graphs[count] = Captured(work, lambda: [self._counted(), *self.batches.tensors()], self._pool())
        self._graphs[count]()

    def _counted(self) -> Tensor:
        assert self._counts is not None  # from the first batch on
        return self._counts

    def _pool(self) -> Any:
        return next((captured.graph.pool() for captured in self._graphs.values()), None)

    def _work(self, count: int) -> None:
        images, labels = self.batches.draw(count)
        with self.autocast():
            logits = {name: row.float() for name, row in self.method.predict(images).items()}
        ensembles = {prefix: names for prefix, names in self.method.ensembles().items() if len(names) > 1}
        for prefix, names in ensembles.items():
            logits[f"{prefix}ensemble"] = torch.stack([logits[name] for name in names]).mean(0)
        hits = {name: _hits(row, labels) for name, row in logits.items()}
        for prefix, names in ensembles.items():
            hits[f"{prefix}oracle"] = torch.stack([hits[name] for name in names]).any(0)
        counted = torch.stack([hit.sum(1) for hit in hits.values()])
        if self._counts is None:
            self._names, self._counts = list(hits), torch.zeros_like(counted)
        self._counts += counted


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """[2, B]: whether the label is the best class, and among the best min(5, K)."""
    best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    return torch.stack([best[:, 0], best.any(1)])
