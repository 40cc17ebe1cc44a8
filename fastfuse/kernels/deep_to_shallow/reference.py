"""Eager truth of deep_to_shallow."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels._numerics import BatchNorm


def deep_to_shallow(
    x: Tensor, stages: Sequence[tuple[Tensor, BatchNorm]], paddings: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Transposed 3x3 stride-2 convolution, batch norm and ReLU per stage; the maps in the order of the stages."""
    maps = []
    for (weight, norm), padding in zip(stages, paddings, strict=True):
        x = functional.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=padding)
        x = torch.relu(norm(x))
        maps.append(x)
    return maps
