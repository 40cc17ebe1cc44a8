"""Shapes and memory formats of what grouped_conv gives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels._triton import empty_map


def empty_result(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """Uninitialised [B, G C_out, ceil(H / stride), ceil(W / stride)] in the format of the map."""
    return empty_map(x, weight.shape[0], size=[-(-side // stride) for side in x.shape[2:]])


def empty_gradients(x: Tensor, weight: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised gradients of the map and of the weight, None where not needed."""
    return [empty_map(x) if needs[0] else None, torch.empty_like(weight) if needs[1] else None]
