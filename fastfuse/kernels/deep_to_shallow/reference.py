"""Eager truth of deep_to_shallow."""

from collections.abc import Generator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels import _numerics
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


def walk(
    x: Tensor, stages: Sequence[tuple[Tensor, BatchNorm]], paddings: Sequence[tuple[int, int]]
) -> Generator[tuple[Tensor, BatchNorm], Tensor, list[Tensor]]:
    """`deep_to_shallow` that leaves its norms to whoever walks through it."""
    maps = []
    for (weight, norm), padding in zip(stages, paddings, strict=True):
        x = functional.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=padding)
        x = torch.relu((yield x, norm))
        maps.append(x)
    return maps


@torch.no_grad()
def attention(
    x: Tensor,
    shift: Tensor | None,
    stages: Sequence[tuple[Tensor, BatchNorm]],
    paddings: Sequence[tuple[int, int]],
) -> list[Tensor]:
    """Attention maps of the maps of x, to which `shift` [B, H, W] is added in all channels."""
    x = x if shift is None else x + shift.unsqueeze(1).to(x.dtype)
    return [_numerics.attention(y) for y in deep_to_shallow(x, stages, paddings)]
