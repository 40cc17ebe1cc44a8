"""Memory that fakes, closed forms and kernels of batch_norm_act allocate alike."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels._triton import empty_map


def empty_results(x: Tensor, attention_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised result, attention map [S, N, H, W] ([0] for no group), and statistics [2, C].

    The statistics are the mean that the norm subtracts and the reciprocal deviation that it multiplies with.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    shape = (attention_groups, x.shape[0], *x.shape[2:]) if attention_groups else (0,)
    return empty_map(x), x.new_empty(shape, dtype=wide), x.new_empty((2, x.shape[1]), dtype=wide)


def empty_gradients(x: Tensor, weight: Tensor, bias: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
    """Uninitialised gradients of x, residual, weight and bias, None where they are not needed."""
    made = (empty_map, x), (empty_map, x), (torch.empty_like, weight), (torch.empty_like, bias)
    return [make(like) if need else None for (make, like), need in zip(made, needed, strict=True)]
