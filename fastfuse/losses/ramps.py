"""Ramp-up of distillation weights over the first epochs."""

import math

import torch
from torch import Tensor


def sigmoid_rampup(current: float | Tensor, length: float) -> float | Tensor:
    """exp(-5 (1 - min(current, length) / length)^2): 0.0067 at 0, 1 from `length` on.

    Args:
        current: epochs so far, not negative; a 0-d tensor stays on its device, so that nothing waits for it.
        length: epochs of the ramp; 0 means no ramp.
    """
    if length <= 0:
        return 1.0
    if isinstance(current, Tensor):
        return torch.exp(-5.0 * (1.0 - current.clamp(0.0, float(length)) / length).square())
    return math.exp(-5.0 * (1.0 - min(max(current, 0.0), length) / length) ** 2)
