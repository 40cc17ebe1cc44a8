"""Exponential moving average of the weights."""

import copy

import torch
from torch import Tensor

from fastfuse.methods.base import Method


class MovingAverage:
    """A copy of a method whose weights follow it: w <- decay * w + (1 - decay) * trained, after every step.

    It starts as the initial weights. `torch.optim.swa_utils.AveragedModel` reads its counter on the host in every
    update, which waits for the device and cannot be captured.

    Args:
        method: on its device, in its memory format.
        decay: 0 < decay < 1.
    """

    def __init__(self, method: Method, decay: float) -> None:
        self.method = copy.deepcopy(method).eval()
        self.decay = decay
        pairs = list(zip(self.tensors(), [*method.parameters(), *method.buffers()], strict=True))
        self._averaged = [(mine, theirs.detach()) for mine, theirs in pairs if mine.is_floating_point()]
        self._copied = [(mine, theirs) for mine, theirs in pairs if not mine.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the trained weights and statistics; counters are copied."""
        mine, theirs = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(mine, theirs, 1 - self.decay)
        if self._copied:
            mine, theirs = zip(*self._copied, strict=True)
            torch._foreach_copy_(mine, theirs)

    def tensors(self) -> list[Tensor]:
        """What an update writes."""
        return [x.detach() for x in (*self.method.parameters(), *self.method.buffers())]
