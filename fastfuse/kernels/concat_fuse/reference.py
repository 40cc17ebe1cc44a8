"""Eager truth of concat_fuse and concat_conv1x1."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels._numerics import BatchNorm, accumulate


def concat_conv1x1(
    features: Sequence[Tensor], weight: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """1x1 convolution of the channel concatenation of [B, C_s, H, W] maps, taken as relu(scale x + shift) if given."""
    x = _concatenated(features)
    if scale is not None and shift is not None:
        x = torch.relu(accumulate(x) * scale[:, None, None] + shift[:, None, None]).to(x.dtype)
    return functional.conv2d(x, weight)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of [B, C, H, W]."""
    var, mean = torch.var_mean(accumulate(x), (0, 2, 3), correction=0)
    return mean, var


def concat_fuse(
    features: Sequence[Tensor], depthwise: Tensor, norm1: BatchNorm, pointwise: Tensor, norm2: BatchNorm
) -> Tensor:
    """Depthwise 3x3, batch norm, ReLU, 1x1, batch norm, ReLU on the concatenation."""
    x = _concatenated(features)
    x = torch.relu(norm1(functional.conv2d(x, depthwise, padding=1, groups=x.shape[1])))
    return torch.relu(norm2(functional.conv2d(x, pointwise)))


def _concatenated(features: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(features), 1) if len(features) > 1 else features[0]
