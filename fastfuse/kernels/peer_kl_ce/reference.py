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
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, divergence and right answers, [R] each, of R heads.

    Teacher index R is the ensemble; weights [R, R + 1] are those of teacher j for head i, None stands for their mean.
    """
    logits = [accumulate(row) for row in logits]
    losses = [functional.cross_entropy(row, labels, label_smoothing=label_smoothing) for row in logits]
    correct = [(row.argmax(1) == labels).sum() for row in logits]

    used = {j for row in teachers for j in row}
    sources = list(logits)
    if len(logits) in used:
        sources.append(sum(logits[i] for i in ensemble) / len(ensemble))
    targets = {j: _softened(sources[j], temperature) + target_epsilon for j in used}
    divergences = [row.new_zeros(()) for row in logits]
    for i, own in enumerate(teachers):
        if own:
            shares = None if weights is None else [weights[i, j] for j in own]
            divergences[i] = _divergence(logits[i], [targets[j] for j in own], temperature, shares).mean()
    return torch.stack(losses), torch.stack(divergences), torch.stack(correct)


def peer_kl(prediction: Tensor, peers: Sequence[Tensor], temperature: float) -> Tensor:
    """Divergence of one head from the mean of its peers' divergences, per sample [B]."""
    return _divergence(accumulate(prediction), [_softened(accumulate(p), temperature) for p in peers], temperature)


def _softened(logits: Tensor, temperature: float) -> Tensor:
    return functional.softmax(logits.detach() / temperature, 1)


def _divergence(
    logits: Tensor, targets: Sequence[Tensor], temperature: float, weights: Sequence[Tensor] | None = None
) -> Tensor:
    """Per sample [B]; without weights the mean over the targets."""
    log_p = functional.log_softmax(logits / temperature, 1)
    parts = [functional.kl_div(log_p, target, reduction="none").sum(1) for target in targets]
    if weights is None:
        return sum(parts) * (temperature**2 / len(parts))
    return sum(w * part for w, part in zip(weights, parts, strict=True)) * temperature**2
