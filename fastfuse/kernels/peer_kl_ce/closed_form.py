"""Closed-form forward and backward of peer_kl_ce in eager tensor code: what the kernels compute, for CPU tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels._numerics import accumulate, reduce


def forward(
    logits: Sequence[Tensor],
    labels: Tensor | None,
    temperature: float,
    teachers: Sequence[int],
    counts: Sequence[int],
    ensemble: Sequence[int],
    epsilon: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and divergence of the first len(counts) rows, and the statistics for backward.

    Args:
        logits: rows [B, K]; heads first, then rows that only teach.
        labels: [B]; None: no cross-entropy.
        temperature: T.
        teachers: the heads' teachers, one list after another; index len(logits) is the ensemble.
        counts: how many teachers each head has.
        ensemble: rows whose mean is the ensemble; empty: no head learns from it.
        epsilon: added to every target probability.
        reduction: over samples: "mean", "sum" or "none".

    Returns:
        ce ([0] without labels) and kl: [heads], [heads, B] for "none". Then [4, sources, B]: highest logit m and
        sum of exp(z - m) at temperature T, and the same at temperature 1 (left out without labels).
    """
    sources = _sources(logits, ensemble)
    soft, hard = _statistics(sources / temperature), _statistics(sources)
    log_p = (sources / temperature - soft[0][..., None]) - soft[1].log()[..., None]
    kl = []
    for i, own in enumerate(_lists(teachers, counts)):
        per_sample = log_p.new_zeros(log_p.shape[1])
        for j in own:
            q = log_p[j].exp() + epsilon
            log_q = q.log() if epsilon else log_p[j]
            per_sample = per_sample + torch.where(q != 0, q * (log_q - log_p[i]), 0.0).sum(1)
        per_sample = per_sample * (temperature**2 / max(len(own), 1))
        kl.append(reduce(per_sample, reduction) if own or reduction == "none" else per_sample.sum())
    if labels is None:
        return log_p.new_empty(0), torch.stack(kl), torch.stack(soft)
    valid, index = _valid(labels, sources.shape[2])
    ce = []
    for i in range(len(counts)):
        logit = sources[i].gather(1, index[:, None])[:, 0]
        per_sample = hard[1][i].log() - (logit - hard[0][i])
        ce.append(reduce(torch.where(valid, per_sample, torch.nan), reduction))
    return torch.stack(ce), torch.stack(kl), torch.stack([*soft, *hard])


def backward(
    grad_ce: Tensor | None,
    grad_kl: Tensor | None,
    logits: Sequence[Tensor],
    labels: Tensor | None,
    stats: Tensor,
    heads: Sequence[int],
    temperature: float,
    teachers: Sequence[int],
    counts: Sequence[int],
    ensemble: Sequence[int],
    epsilon: float,
    reduction: str,
) -> list[Tensor]:
    """Gradients of the logits of `heads`; the other arguments are those and the results of `forward`.

    d ce / dz = (softmax(z) - onehot) and d kl / dz = T ((1 + K epsilon) p - mean_j q_j), over B for "mean": a target
    q = softmax + epsilon sums to 1 + K epsilon.
    """
    sources, lists = _sources(logits, ensemble), _lists(teachers, counts)
    batch, classes = logits[0].shape
    divisor = batch if reduction == "mean" else 1
    soft = (sources / temperature - stats[0][..., None]).exp() / stats[1][..., None]
    found = []
    for i in heads:
        slope = torch.zeros_like(sources[i])
        if grad_ce is not None and labels is not None:
            valid, index = _valid(labels, classes)
            part = (sources[i] - stats[2, i, :, None]).exp() / stats[3, i, :, None]
            part = part - torch.nn.functional.one_hot(index, classes)
            slope = slope + torch.where(valid[:, None], part, torch.nan) * grad_ce[i].view(-1, 1)
        if grad_kl is not None and lists[i]:
            target = sum(soft[j] for j in lists[i]) / len(lists[i]) + epsilon
            slope = slope + ((1 + classes * epsilon) * soft[i] - target) * temperature * grad_kl[i].view(-1, 1)
        gradient = torch.empty_like(logits[i])
        found.append(gradient.copy_(slope / max(divisor, 1)))
    return found


def _sources(logits: Sequence[Tensor], ensemble: Sequence[int]) -> Tensor:
    """[sources, B, K]: the rows and, if a head learns from it, the mean of the ensemble's."""
    rows = [accumulate(row) for row in logits]
    return torch.stack([*rows, sum(rows[i] for i in ensemble) / len(ensemble)] if ensemble else rows)


def _lists(teachers: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    remaining = iter(teachers)
    return [[next(remaining) for _ in range(count)] for count in counts]


def _statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    highest = z.amax(-1)
    return highest, (z - highest[..., None]).exp().sum(-1)


def _valid(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Which labels are classes, and the labels with the others replaced by 0."""
    valid = (labels >= 0) & (labels < classes)
    return valid, torch.where(valid, labels, 0)
