"""grouped_conv and its gradients in eager tensor code, for tensors on a CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels.grouped_conv import layout


def forward(x: Tensor, weight: Tensor, groups: int, stride: int) -> Tensor:
    """See `fastfuse::grouped_conv_fwd`."""
    out = layout.empty_result(x, weight, stride)
    return out.copy_(torch.conv2d(x, weight.to(x.dtype), None, stride, weight.shape[2] // 2, 1, groups))


def backward(grad: Tensor, x: Tensor, weight: Tensor, groups: int, stride: int, needs: Sequence[bool]) -> list[Tensor]:
    """See `fastfuse::grouped_conv_bwd`."""
    pad = [weight.shape[2] // 2] * 2
    found = torch.ops.aten.convolution_backward(
        grad, x, weight.to(x.dtype), None, [stride] * 2, pad, [1, 1], False, [0, 0], groups, [*needs, False]
    )
    empty = layout.empty_gradients(x, weight, needs)
    return [y.copy_(g) for y, g in zip(empty, found, strict=False) if y is not None]
