"""Eager truth of concat_fuse and concat_conv1x1."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels._numerics import BatchNorm


def concat_conv1x1(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    """1x1 convolution of the channel concatenation of [B, C_s, H, W] maps."""
    return functional.conv2d(_concatenated(features), weight)


def concat_fuse(
    features: Sequence[Tensor], depthwise: Tensor, norm1: BatchNorm, pointwise: Tensor, norm2: BatchNorm
) -> Tensor:
    """Depthwise 3x3, batch norm, ReLU, 1x1, batch norm, ReLU on the concatenation."""
    x = _concatenated(features)
    x = torch.relu(norm1(functional.conv2d(x, depthwise, padding=1, groups=x.shape[1])))
    return torch.relu(norm2(functional.conv2d(x, pointwise)))


def _concatenated(features: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(features), 1) if len(features) > 1 else features[0]
