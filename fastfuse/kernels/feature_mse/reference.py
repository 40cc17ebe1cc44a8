"""Eager truth of feature_mse."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse.kernels._numerics import accumulate


def feature_mse(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Sum over students of the mean squared difference."""
    return sum((accumulate(f) - accumulate(t)).square().mean() for f, t in zip(features, targets, strict=True))
