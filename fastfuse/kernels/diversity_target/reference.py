"""Eager truth of diversity_loss and diversity_target."""

import torch
from torch import Tensor

from fastfuse.kernels._numerics import attention, normalize, reduce


def _shifted(y: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Target t, normalised attention and norm n of [B, C, H, W] maps: [B, N], [B, N], [B, 1] with N = H W."""
    flat = attention(y).flatten(1)
    unit = normalize(flat)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    scale = norm if mode == "published" else torch.ones_like(norm)
    threshold = unit.topk(unit.shape[1] // 3, largest=False).values[:, -1:]
    # n - yh above the k-th smallest value, yh below it, n / 2 at it (sign(0) = 0), ties included.
    target = (scale / 2 - unit) * torch.sign(unit - threshold) + scale / 2
    return target, unit, norm


def diversity_loss(x: Tensor, y: Tensor, mode: str, reduction: str) -> Tensor:
    """Per sample, the mean over H W of (nrm(att(x)) - t(att(y)))^2."""
    target, _, _ = _shifted(y, mode)
    return reduce((normalize(attention(x)) - target).square().mean(1), reduction)


def diversity_target(y: Tensor, mode: str) -> Tensor:
    """y plus (t - nrm(att(y))) |att(y)| / C at every position, the same for all channels."""
    batch, channels, height, width = y.shape
    target, unit, norm = _shifted(y, mode)
    shift = (target - unit) * norm / channels
    return y + shift.view(batch, 1, height, width).to(y.dtype)
