"""Ramp-up of distillation weights over the first epochs."""

import math

import torch
from torch import Tensor


def sigmoid_rampup(current: float | Tensor, length: float, *, first: float = 0.0) -> float | Tensor:
    """exp(-5 (1 - min(x, length) / length)^2), x = current + first: 0.0067 at 0, 1 from `length` on.

    Args:
        current: epochs so far, not negative; a 0-d tensor stays on its device, so that nothing waits for it.
        length: epochs of the ramp; 0 means no ramp.
        first: what is counted before the first epoch.
    """
    if length <= 0:
        return 1.0
    if isinstance(current, Tensor):
        left = (length - first - current).clamp(0.0, float(length))
        return torch.exp(left.square() * (-5.0 / length**2))
    return math.exp(-5.0 * (1.0 - min(max(current + first, 0.0), length) / length) ** 2)
