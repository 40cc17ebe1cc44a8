"""Eager truth of grouped_conv."""

from torch import Tensor
from torch.nn import functional


def grouped_conv(x: Tensor, weight: Tensor, groups: int, stride: int) -> Tensor:
    """torch's own convolution, padded by half the kernel."""
    return functional.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2, groups=groups)
