"""Closed-form forward and backward of peer_kl_ce in eager tensor code: what the kernels compute, for CPU tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels._numerics import accumulate, reduce


def forward(
    logits: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    teachers: Sequence[int],
    counts: Sequence[int],
    ensemble: Sequence[int],
    epsilon: float,
    smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy, divergence and right answers of the first len(counts) rows, and the statistics for backward.

    Args:
        logits: rows [B, K]; heads first, then rows that only teach.
        labels: [B]; None: no cross-entropy.
        weights: [heads, at least sources], that of source j for head i; None: the mean over a head's teachers.
        temperature: T.
        teachers: the heads' teachers, one list after another; index len(logits) is the ensemble.
        counts: how many teachers each head has.
        ensemble: rows whose mean is the ensemble; empty: no head learns from it.
        epsilon: added to every target probability.
        smoothing: share of the label's probability that all classes get alike.
        reduction: over samples: "mean", "sum" or "none".

    Returns:
        ce, kl and correct (int64): [heads], [heads, B] for "none"; ce and correct are [0] without labels. Then
        [4, sources, B]: highest logit m and sum of exp(z - m) at temperature T, and the same at temperature 1 (left
        out without labels).
    """
    sources = _sources(logits, ensemble)
    soft, hard = _statistics(sources / temperature), _statistics(sources)
    log_p = (sources / temperature - soft[0][..., None]) - soft[1].log()[..., None]
    kl = []
    for i, own in enumerate(_lists(teachers, counts)):
        per_sample = log_p.new_zeros(log_p.shape[1])
        for j, share in zip(own, _shares(weights, i, own), strict=True):
            q = log_p[j].exp() + epsilon
            log_q = q.log() if epsilon else log_p[j]
            per_sample = per_sample + share * torch.where(q != 0, q * (log_q - log_p[i]), 0.0).sum(1)
        per_sample = per_sample * temperature**2
        kl.append(reduce(per_sample, reduction) if own or reduction == "none" else per_sample.sum())
    if labels is None:
        return log_p.new_empty(0), torch.stack(kl), log_p.new_empty(0, dtype=torch.int64), torch.stack(soft)
    valid, index = _valid(labels, sources.shape[2])
    ce, correct = [], []
    for i in range(len(counts)):
        shifted = sources[i] - hard[0][i, :, None]
        per_sample = hard[1][i].log() - (1 - smoothing) * shifted.gather(1, index[:, None])[:, 0]
        if smoothing:
            per_sample = per_sample - smoothing * shifted.mean(1)
        ce.append(reduce(torch.where(valid, per_sample, torch.nan), reduction))
        right = (sources[i].argmax(1) == labels).long()
        correct.append(right if reduction == "none" else right.sum())
    return torch.stack(ce), torch.stack(kl), torch.stack(correct), torch.stack([*soft, *hard])


def backward(
    grad_ce: Tensor | None,
    grad_kl: Tensor | None,
    logits: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    stats: Tensor,
    heads: Sequence[int],
    temperature: float,
    teachers: Sequence[int],
    counts: Sequence[int],
    ensemble: Sequence[int],
    epsilon: float,
    smoothing: float,
    reduction: str,
) -> list[Tensor]:
    """Gradients of the logits of `heads`; the other arguments are those and the results of `forward`.

    d ce / dz = (softmax(z) - (1 - smoothing) onehot - smoothing / K) and
    d kl / dz = T sum_j w_j ((1 + K epsilon) p - q_j), over B for "mean": a target q = softmax + epsilon sums to
    1 + K epsilon.
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
            label = torch.nn.functional.one_hot(index, classes).to(part.dtype)
            part = part - (1 - smoothing) * label - smoothing / classes
            slope = slope + torch.where(valid[:, None], part, torch.nan) * grad_ce[i].view(-1, 1)
        if grad_kl is not None and lists[i]:
            own, shares = lists[i], _shares(weights, i, lists[i])
            own_part = (1 + classes * epsilon) * soft[i]
            part = sum(share * (own_part - soft[j] - epsilon) for j, share in zip(own, shares, strict=True))
            slope = slope + part * temperature * grad_kl[i].view(-1, 1)
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


def _shares(weights: Tensor | None, head: int, own: Sequence[int]) -> list[float | Tensor]:
    """What each of a head's teachers counts."""
    return [1 / len(own) if weights is None else weights[head, j] for j in own]


def _statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    highest = z.amax(-1)
    return highest, (z - highest[..., None]).exp().sum(-1)


def _valid(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Which labels are classes, and the labels with the others replaced by 0."""
    valid = (labels >= 0) & (labels < classes)
    return valid, torch.where(valid, labels, 0)
