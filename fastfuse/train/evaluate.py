"""Accuracy of every head on a split, counted on the device and read once."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from fastfuse.methods.base import Method

Accuracy = dict[str, dict[str, float]]


@torch.no_grad()
def evaluate(
    method: Method, batches: Iterable[tuple[Tensor, Tensor]], autocast: Callable[[], AbstractContextManager]
) -> Accuracy:
    """Top-1 and top-5 in percent of every head, the mean-logit ensemble, and the oracle.

    The oracle counts an image as right if any student is; published code calls that ensemble accuracy. Ensemble and
    oracle exist where there are two or more students. Top-5 counts the best min(5, K) classes.

    Args:
        method: its mode is restored afterwards.
        batches: images and labels.
        autocast: makes the context that the networks run in.
    """
    was_training = method.training
    method.eval()
    counts: dict[str, Tensor] = {}
    total = 0
    for images, labels in batches:
        with autocast():
            logits = {name: row.float() for name, row in method.predict(images).items()}
        students = [logits[name] for name in method.students()]
        if len(students) > 1:
            logits["ensemble"] = torch.stack(students).mean(0)
        hits = {name: _hits(row, labels) for name, row in logits.items()}
        if len(students) > 1:
            hits["oracle"] = torch.stack([hits[name] for name in method.students()]).any(0)
        for name, hit in hits.items():
            counts[name] = counts.get(name, 0) + hit.sum(1)
        total += len(labels)
    method.train(was_training)
    found = torch.stack(list(counts.values())).tolist()
    return {
        name: {"top1": 100.0 * top1 / total, "top5": 100.0 * top5 / total}
        for name, (top1, top5) in zip(counts, found, strict=True)
    }


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """[2, B]: whether the label is the best class, and among the best min(5, K)."""
    best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    return torch.stack([best[:, 0], best.any(1)])
