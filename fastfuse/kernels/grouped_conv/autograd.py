"""Schemas, fakes and autograd function of grouped_conv; torch only, kernels are loaded when first executed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.kernels import _library
from fastfuse.kernels._autograd import first_derivatives_only
from fastfuse.kernels.grouped_conv import closed_form, layout


def _fwd_fake(x: Tensor, weight: Tensor, groups: int, stride: int) -> Tensor:
    return layout.empty_result(x, weight, stride)


def _bwd_fake(grad: Tensor, x: Tensor, weight: Tensor, groups: int, stride: int, needs: Sequence[bool]) -> list[Tensor]:
    return [y for y in layout.empty_gradients(x, weight, needs) if y is not None]


_library.define(
    "grouped_conv_fwd",
    "(Tensor x, Tensor weight, int groups, int stride) -> Tensor",
    fake=_fwd_fake,
    closed_form=closed_form.forward,
    launcher="fastfuse.kernels.grouped_conv.triton_launch:launch_fwd",
)
# Gradients of the map and of the weight, as far as they are needed.
_library.define(
    "grouped_conv_bwd",
    "(Tensor grad, Tensor x, Tensor weight, int groups, int stride, bool[2] needs) -> Tensor[]",
    fake=_bwd_fake,
    closed_form=closed_form.backward,
    launcher="fastfuse.kernels.grouped_conv.triton_launch:launch_bwd",
)


class GroupedConv(torch.autograd.Function):
    """Convolution of x [B, G C_in, H, W] by weight [G C_out, C_in, K, K]; saves both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, groups: int, stride: int) -> Tensor:
        """The map [B, G C_out, H', W']."""
        ctx.groups, ctx.stride = groups, stride
        ctx.save_for_backward(x, weight)
        return torch.ops.fastfuse.grouped_conv_fwd(x, weight, groups, stride)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the map and of the weight, where needed."""
        needs = ctx.needs_input_grad[:2]
        found = iter(torch.ops.fastfuse.grouped_conv_bwd(grad, *ctx.saved_tensors, ctx.groups, ctx.stride, needs))
        return *[next(found) if needed else None for needed in needs], None, None
