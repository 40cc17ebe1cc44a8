"""How kernels address the M elements of a sample: as rows, channels or positions, of elements at one stride each."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Strides, in elements, of [B, M] tensors whose M = outer * inner elements lie in equal rows.

    Attributes:
        sample: from sample to sample.
        outer, inner: from row to row, and within a row.
        flat: the M elements lie one after another.
    """

    sample: int
    outer: int
    inner: int
    flat: bool


def _position_stride(x: Tensor) -> int | None:
    """The one stride of all dimensions behind the channels; None if they have no common one."""
    real = [(n, s) for n, s in zip(x.shape[2:], x.stride()[2:], strict=True) if n != 1]
    if any(stride != n * inner for (_, stride), (n, inner) in pairwise(real)):
        return None
    return real[-1][1] if real else 1


def addressable(x: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy of one (a cropped view) whose positions have no common stride."""
    return x if x.dim() == 2 or _position_stride(x) is not None else x.contiguous()


def gradient_like(x: Tensor) -> Tensor:
    """Memory for the gradient of a tensor, in its own format, that kernels can address."""
    return addressable(torch.empty_like(x))


def rows(tensors: Sequence[Tensor]) -> tuple[int, list[Rows]]:
    """Elements in a row, the same for all, and the strides of tensors of one shape.

    The elements are counted in the order in which the first tensor lies in memory.
    """
    first = tensors[0]
    elements = first.shape[1:].numel()
    if first.dim() == 2:
        channels, strides = 1, [(0, x.stride(1)) for x in tensors]
    else:
        channels, strides = first.shape[1], [(x.stride(1), _position_stride(x)) for x in tensors]
    positions = elements // max(channels, 1)
    if positions == 1:
        # One position, of any stride: the channels are the row.
        channels, positions, strides = 1, channels, [(0, channel) for channel, _ in strides]
    channels_last = channels > 1 and strides[0][0] == 1
    row = channels if channels_last else positions
    found = []
    for x, (channel, position) in zip(tensors, strides, strict=True):
        outer, inner = (position, channel) if channels_last else (channel, position)
        found.append(Rows(x.stride(0), outer, inner, inner == 1 and (outer == row or row == elements)))
    return max(row, 1), found
