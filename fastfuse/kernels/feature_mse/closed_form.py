"""Forward and backward of feature_mse in eager tensor code, for CPU tensors and as a check of the kernels' maths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels._numerics import accumulate
from fastfuse.kernels.feature_mse import reference


def forward(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Loss; one target stands for all students."""
    return reference.feature_mse(features, _one_each(features, targets))


def backward(
    gradient: Tensor, features: Sequence[Tensor], targets: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of those of (*features, *targets) that are wanted, each in its map's dtype and strides."""
    pairs = zip(features, _one_each(features, targets), strict=True)
    own = [2 * gradient / max(f.numel(), 1) * (accumulate(f) - accumulate(t)) for f, t in pairs]
    goals = [-sum(own)] if len(targets) == 1 else [-g for g in own]
    every = zip((*features, *targets), (*own, *goals), wanted, strict=True)
    return [torch.empty_like(x).copy_(g) for x, g, asked in every if asked]


def _one_each(features: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    return list(targets) * len(features) if len(targets) == 1 else list(targets)
