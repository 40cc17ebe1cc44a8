"""Schemas, fakes and autograd function of diversity_loss and diversity_target; kernels are loaded when executed."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastfuse.kernels import _library
from fastfuse.kernels._triton import map_strides
from fastfuse.kernels.diversity_target import closed_form


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(map_strides(x)[0])


def _loss_fwd_fake(x: Tensor, y: Tensor, mode: str, reduction: str) -> tuple[Tensor, Tensor]:
    kept = {"dtype": torch.promote_types(x.dtype, torch.float32), "device": x.device}
    shape = x.shape[:1] if reduction == "none" else ()
    return torch.empty(shape, **kept), torch.empty(x.shape[0], x.shape[-1] * x.shape[-2], **kept)


_MODULE = "fastfuse.kernels.diversity_target.triton_kernels"
_library.define(
    "diversity_loss_fwd",
    "(Tensor x, Tensor y, str mode, str reduction) -> (Tensor, Tensor)",
    fake=_loss_fwd_fake,
    closed_form=closed_form.loss_forward,
    launcher=f"{_MODULE}:launch_loss_fwd",
)
_library.define(
    "diversity_loss_bwd",
    "(Tensor grad, Tensor x, Tensor slope, str reduction) -> Tensor",
    fake=lambda grad, x, slope, reduction: _like(x),
    closed_form=closed_form.loss_backward,
    launcher=f"{_MODULE}:launch_loss_bwd",
)
_library.define(
    "diversity_target_fwd",
    "(Tensor y, str mode) -> Tensor",
    fake=lambda y, mode: _like(y),
    closed_form=closed_form.target_forward,
    launcher=f"{_MODULE}:launch_target_fwd",
)


class DiversityLossFunction(torch.autograd.Function):
    """diversity_loss of x and a detached y; saves x and one float per sample and position."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, mode: str, reduction: str) -> Tensor:
        """0-d, or [B] for the reduction "none"."""
        loss, slope = torch.ops.fastfuse.diversity_loss_fwd(x, y, mode, reduction)
        ctx.save_for_backward(x, slope)
        ctx.reduction = reduction
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Gradient of x."""
        x, slope = ctx.saved_tensors
        return torch.ops.fastfuse.diversity_loss_bwd(grad, x, slope, ctx.reduction), None, None, None
