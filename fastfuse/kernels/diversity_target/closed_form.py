"""Closed-form forward and backward in eager tensor code: what the kernels compute, for CPU tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels._numerics import accumulate, attention, normalize, reduce
from fastfuse.kernels._triton import map_like
from fastfuse.kernels.diversity_target.layout import sizes


def forward(
    x: Sequence[Tensor], y: Sequence[Tensor], mode: str, reduction: str, shift: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Losses, the derivative of each sample's loss that backward needs, and the shifted y.

    With xh = nrm(att(x)) and e = xh - t: d loss / d att(x) = 2/N (e - (xh.e) xh) / |att(x)|, 0 where the norm is below
    1e-12. The slope is this, times 2/C where x is a feature map: the gradient of x is slope times x.

    Args:
        x: P maps, or none.
        y: their P reference maps; without x any number.
        mode, reduction: as in the public functions.
        shift: whether to return the shifted y.

    Returns:
        Losses [P] ([P, row] for the reduction "none"), slope [P, row, width] with row and width the largest B and N of
        all pairs, and the shifted maps, none if not asked for.
    """
    row, width = sizes(y)
    dtype = torch.promote_types((*x, *y)[0].dtype, torch.float32)
    losses = y[0].new_zeros((len(x), row) if reduction == "none" else (len(x),), dtype=dtype)
    slope = y[0].new_zeros((len(x), row, width), dtype=dtype)
    for i, (own, other) in enumerate(zip(x, y, strict=False)):
        loss, own_slope = _loss(own, other, mode, reduction)
        losses[i] = loss
        slope[i, : own_slope.shape[0], : own_slope.shape[1]] = own_slope
    return losses, slope, [_shift(one, mode) for one in y if shift]


def backward(
    cotangent: Tensor, slope: Tensor, x: Sequence[Tensor], pairs: Sequence[int], reduction: str
) -> list[Tensor]:
    """Gradients of some x, those of the given pairs of the forward."""
    found = []
    for own, pair in zip(x, pairs, strict=True):
        batch, positions = own.shape[0], own.shape[-1] * own.shape[-2]
        scale = cotangent[pair] / max(batch, 1) if reduction == "mean" else cotangent[pair]
        scaled = slope[pair, :batch, :positions] * scale.reshape(-1, 1)
        scaled = scaled.view(batch, *own.shape[-2:])
        found.append(map_like(own).copy_(scaled.unsqueeze(1) * accumulate(own) if own.dim() == 4 else scaled))
    return found


def _loss(x: Tensor, y: Tensor, mode: str, reduction: str) -> tuple[Tensor, Tensor]:
    own = attention(x).flatten(1)
    norm = torch.linalg.vector_norm(own, dim=1, keepdim=True)
    unit = normalize(own)
    error = unit - _target(y, mode)[0]
    along = error - unit * (unit * error).sum(1, keepdim=True)
    per_value = 2 / own.shape[1] * (2 / x.shape[1] if x.dim() == 4 else 1)
    return reduce(error.square().mean(1), reduction), torch.where(norm < 1e-12, 0.0, per_value * along / norm)


def _shift(y: Tensor, mode: str) -> Tensor:
    target, unit, norm = _target(y, mode)
    shift = ((target - unit) * norm / y.shape[1]).view(y.shape[0], 1, *y.shape[-2:])
    return map_like(y).copy_(accumulate(y) + shift)


def _target(y: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Target t, normalised attention and its norm: [B, N], [B, N], [B, 1]."""
    own = attention(y).flatten(1)
    norm = torch.linalg.vector_norm(own, dim=1, keepdim=True)
    unit = normalize(own)
    threshold = unit.sort(1).values[:, unit.shape[1] // 3 - 1, None]
    half = norm / 2 if mode == "published" else 0.5
    return (half - unit) * torch.sign(unit - threshold) + half, unit, norm
