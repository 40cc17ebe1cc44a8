"""Memory of what the operators return."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels import _triton


def map_like(x: Tensor) -> Tensor:
    """Memory for a map in the format of another one, with one stride for its positions."""
    return _triton.map_strides(torch.empty_like(x))[0]


def sizes(maps: Sequence[Tensor]) -> tuple[int, int]:
    """The largest batch and the most positions among maps: sides of the tables that hold something of each."""
    return max(x.shape[0] for x in maps), max(x.shape[-1] * x.shape[-2] for x in maps)
