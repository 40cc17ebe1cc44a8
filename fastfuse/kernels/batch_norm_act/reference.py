"""Eager truth of batch_norm_act."""

import torch
from torch import Tensor

from fastfuse.kernels import _numerics
from fastfuse.kernels._numerics import BatchNorm


def batch_norm_act(
    x: Tensor, norm: BatchNorm, residual: Tensor | None, relu: bool, attention_groups: int | None
) -> tuple[Tensor, Tensor | None]:
    """relu(norm(x) + residual), and the attention map [S, N, H, W] of each of S groups of channels."""
    out = norm(x)
    if residual is not None:
        out = out + residual
    if relu:
        out = torch.relu(out)
    if attention_groups is None:
        return out, None
    return out, torch.stack([_numerics.attention(own) for own in out.chunk(attention_groups, 1)])
