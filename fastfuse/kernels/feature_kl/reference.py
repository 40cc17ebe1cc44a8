"""Eager truth of feature_kl."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from fastfuse.kernels._numerics import accumulate


def feature_kl(features: Sequence[Tensor], targets: Sequence[Tensor], temperature: float, over: str) -> Tensor:
    """Sum over students of T^2 times the mean KL of the softmax distributions of target and student."""
    return sum(_divergence(f, t, temperature, over) for f, t in zip(features, targets, strict=True))


def _divergence(feature: Tensor, target: Tensor, temperature: float, over: str) -> Tensor:
    rows = [accumulate(x).flatten(2) / temperature for x in (feature, target)]
    dim = 2 if over == "positions" else 1
    log_p, log_q = (functional.log_softmax(row, dim) for row in rows)
    per_distribution = (log_q.exp() * (log_q - log_p)).sum(dim)
    return per_distribution.mean() * temperature**2
