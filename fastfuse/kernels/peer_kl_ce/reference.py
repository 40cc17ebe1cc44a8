"""Eager truth of peer_kl_ce and peer_kl."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels._numerics import accumulate


def peer_kl_ce(
    logits: Sequence[Tensor],
    labels: Tensor,
    temperature: float,
    teachers: Sequence[Sequence[int]],
    ensemble: Sequence[int],
    target_epsilon: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy [R] and divergence [R] of R heads; teacher index R is the ensemble."""
    logits = [accumulate(row) for row in logits]
    cross_entropy = torch.stack([functional.cross_entropy(row, labels) for row in logits])

    used = {j for row in teachers for j in row}
    sources = list(logits)
    if len(logits) in used:
        sources.append(sum(logits[i] for i in ensemble) / len(ensemble))
    targets = {j: _softened(sources[j], temperature) + target_epsilon for j in used}
    divergences = [
        _divergence(row, [targets[j] for j in own], temperature).mean() if own else row.new_zeros(())
        for row, own in zip(logits, teachers, strict=True)
    ]
    return cross_entropy, torch.stack(divergences)


def peer_kl(prediction: Tensor, peers: Sequence[Tensor], temperature: float) -> Tensor:
    """Divergence of one head from the mean of its peers' divergences, per sample [B]."""
    return _divergence(accumulate(prediction), [_softened(accumulate(p), temperature) for p in peers], temperature)


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return functional.softmax(logits.detach() / temperature, 1)


def _divergence(logits: Tensor, targets: Sequence[Tensor], temperature: float) -> Tensor:
    log_p = functional.log_softmax(logits / temperature, 1)
    per_sample = sum(functional.kl_div(log_p, target, reduction="none").sum(1) for target in targets)
    return per_sample * (temperature**2 / len(targets))
