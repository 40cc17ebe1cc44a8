"""Eager truth of aggregate_distance."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse.kernels._numerics import accumulate, reduce


def aggregate_distance(maps: Sequence[Tensor], weights: Tensor, target: Tensor, reduction: str) -> Tensor:
    """Mean or sum over all elements of (sum_n w_n F_n - G)^2."""
    return reduce(residual(maps, weights, target).square(), reduction)


def residual(maps: Sequence[Tensor], weights: Tensor, target: Tensor) -> Tensor:
    """sum_n w_n F_n - G in float32 at least."""
    weights = accumulate(weights).unbind()
    return sum(w * accumulate(x) for w, x in zip(weights, maps, strict=True)) - accumulate(target)
