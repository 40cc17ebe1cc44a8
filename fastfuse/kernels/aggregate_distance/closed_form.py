"""Forward and backward of aggregate_distance in eager tensor code, for CPU tensors and as a check of the maths."""

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from fastfuse.kernels._numerics import accumulate, reduce
from fastfuse.kernels.aggregate_distance import reference


def forward(
    maps: Sequence[Tensor], weights: Tensor, target: Tensor, with_dots: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """The distance, and if asked the dot products [N] of the residual with each map; otherwise [0]."""
    residual = reference.residual(maps, weights, target)
    distance = reduce(residual.square(), reduction)
    if not with_dots:
        return distance, distance.new_empty(0)
    return distance, torch.stack([(residual * accumulate(x)).sum() for x in maps])


def backward(
    gradient: Tensor,
    maps: Sequence[Tensor],
    weights: Tensor,
    target: Tensor,
    dots: Tensor,
    wanted: Sequence[bool],
    reduction: str,
) -> list[Tensor]:
    """Gradients of those of (weights, target, *maps) that are wanted, each in its tensor's dtype and strides.

    dw_n = 2 g <r, F_n>, dG = -2 g r, dF_n = 2 g w_n r, over the number of elements for "mean".
    """
    slope = 2 * gradient / (max(target.numel(), 1) if reduction == "mean" else 1)
    found = [slope * dots] if wanted[0] else []
    if any(wanted[1:]):
        change = slope * reference.residual(maps, weights, target)
        found += compress([-change, *(w * change for w in accumulate(weights).unbind())], wanted[1:])
    tensors = compress((weights, target, *maps), wanted)
    return [torch.empty_like(x).copy_(g) for x, g in zip(tensors, found, strict=True)]
