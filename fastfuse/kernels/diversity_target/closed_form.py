"""Closed-form forward and backward in eager tensor code: what the kernels compute, for CPU tensors."""

import torch
from torch import Tensor

from fastfuse.kernels._numerics import accumulate, attention, normalize, reduce
from fastfuse.kernels._triton import map_strides


def loss_forward(x: Tensor, y: Tensor, mode: str, reduction: str) -> tuple[Tensor, Tensor]:
    """diversity_loss, and the derivative of a sample's loss that backward needs.

    With xh = nrm(att(x)) and e = xh - t: d loss / d att(x) = 2/N (e - (xh.e) xh) / |att(x)|, 0 where the norm is below
    1e-12. The slope is this map [B, N], times 2/C where x is a feature map: the gradient of x is slope times x.

    Returns:
        The loss ([B] for the reduction "none", else 0-d) and the slope.
    """
    own = attention(x).flatten(1)
    norm = torch.linalg.vector_norm(own, dim=1, keepdim=True)
    unit = normalize(own)
    target, _, _ = _shifted(y, mode)
    error = unit - target
    along = error - unit * (unit * error).sum(1, keepdim=True)
    per_value = 2 / own.shape[1] * (2 / x.shape[1] if x.dim() == 4 else 1)
    slope = torch.where(norm < 1e-12, 0.0, per_value * along / norm)
    return reduce(error.square().mean(1), reduction), slope


def loss_backward(grad: Tensor, x: Tensor, slope: Tensor, reduction: str) -> Tensor:
    """Gradient of x."""
    scale = grad / max(x.shape[0], 1) if reduction == "mean" else grad
    slope = (slope * scale.reshape(-1, 1)).view(x.shape[0], *x.shape[-2:])
    found = slope.unsqueeze(1) * accumulate(x) if x.dim() == 4 else slope
    return torch.empty_like(map_strides(x)[0]).copy_(found)


def target_forward(y: Tensor, mode: str) -> Tensor:
    """diversity_target."""
    target, unit, norm = _shifted(y, mode)
    shift = ((target - unit) * norm / y.shape[1]).view(y.shape[0], 1, *y.shape[-2:])
    return torch.empty_like(map_strides(y)[0]).copy_(accumulate(y) + shift)


def _shifted(y: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Target t, normalised attention and its norm: [B, N], [B, N], [B, 1]."""
    own = attention(y).flatten(1)
    norm = torch.linalg.vector_norm(own, dim=1, keepdim=True)
    unit = normalize(own)
    threshold = unit.sort(1).values[:, unit.shape[1] // 3 - 1, None]
    half = norm / 2 if mode == "published" else 0.5
    return (half - unit) * torch.sign(unit - threshold) + half, unit, norm
