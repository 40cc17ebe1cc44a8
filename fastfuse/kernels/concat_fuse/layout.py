"""Shapes, memory formats and arguments that fakes, closed forms and kernels of this folder share."""

from typing import NamedTuple

import torch
from torch import Tensor

_PLAIN = torch.contiguous_format


def empty_map(like: Tensor, channels: int) -> Tensor:
    """An uninitialised [B, channels, H, W] map: channels-last where `like` is so and not contiguous as well."""
    batch, _, height, width = like.shape
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    memory_format = torch.channels_last if last else _PLAIN
    return torch.empty(
        (batch, channels, height, width), dtype=like.dtype, device=like.device, memory_format=memory_format
    )


def gradient_of(x: Tensor) -> Tensor:
    """An uninitialised gradient of a map, in its own memory format where that is one of the two."""
    return empty_map(x, x.shape[1])


def gradient_of_weight(weight: Tensor) -> Tensor:
    """An uninitialised gradient of a convolution's weight, whose kernel positions follow each other in memory."""
    return torch.empty_like(weight) if weight.is_contiguous() else torch.empty_like(weight, memory_format=_PLAIN)


class Norm(NamedTuple):
    """A batch norm as the schema takes it: statistics to use, or running ones to update with those of the batch.

    Attributes:
        weight, bias: [C].
        mean, var: [C] in evaluation mode, else None.
        running_mean, running_var: [C] in training mode, updated in place, else None.
        momentum, eps: PyTorch's.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor | None
    var: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    momentum: float
    eps: float

    @property
    def training(self) -> bool:
        """Whether the batch's statistics normalise."""
        return self.mean is None

    def statistics(self, x: Tensor) -> Tensor:
        """Uninitialised [2, C], mean and biased variance of a batch like x, in float32 at least; [0] in evaluation."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.empty((2, self.weight.shape[0]) if self.training else (0,), dtype=dtype, device=x.device)
