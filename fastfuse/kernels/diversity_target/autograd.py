"""Schemas, fakes and autograd function of the diversity operators; kernels are loaded when executed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.kernels import _library
from fastfuse.kernels._autograd import first_derivatives_only
from fastfuse.kernels._triton import map_like
from fastfuse.kernels.diversity_target import closed_form
from fastfuse.kernels.diversity_target.layout import sizes

KERNELS = "fastfuse.kernels.diversity_target.triton_kernels"


class DiversityTarget(torch.autograd.Function):
    """Losses of P pairs of maps ([0] without x) and the shifted y; every map has one stride for its positions."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, mode: str, reduction: str, shift: bool, count: int, *maps: Tensor
    ) -> tuple[Tensor, ...]:
        """The first `count` maps are x, the others y, which are detached. Saves x and one float per position."""
        x, y, ctx.ops = maps[:count], maps[count:], _library.namespace(backend)
        losses, slope, shifted = ctx.ops.diversity_target_fwd(x, y, mode, reduction, shift)
        ctx.pairs = [i for i in range(count) if ctx.needs_input_grad[5 + i]]
        ctx.reduction = reduction
        ctx.save_for_backward(slope, *(x[i] for i in ctx.pairs))
        ctx.mark_non_differentiable(*shifted)
        # Otherwise zeros of the size of each shifted map would be written for backward.
        ctx.set_materialize_grads(False)
        return losses, *shifted

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, cotangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """Gradients of those x that need one; one launch."""
        slope, *x = ctx.saved_tensors
        found = iter(ctx.ops.diversity_target_bwd(cotangent, slope, x, ctx.pairs, ctx.reduction))
        return None, None, None, None, None, *(next(found) if asked else None for asked in ctx.needs_input_grad[5:])


def _empty_losses(
    x: Sequence[Tensor], y: Sequence[Tensor], mode: str, reduction: str, shift: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    pairs, (row, width) = len(x), sizes(y)
    dtype = torch.promote_types((*x, *y)[0].dtype, torch.float32)
    losses = y[0].new_empty((pairs, row) if reduction == "none" else (pairs,), dtype=dtype)
    return losses, y[0].new_empty((pairs, row, width), dtype=dtype), [map_like(one) for one in y if shift]


_library.define(
    "diversity_target_fwd",
    "(Tensor[] x, Tensor[] y, str mode, str reduction, bool shift) -> (Tensor, Tensor, Tensor[])",
    fake=_empty_losses,
    closed_form=closed_form.forward,
    launcher=f"{KERNELS}:forward",
)
_library.define(
    "diversity_target_bwd",
    "(Tensor cotangent, Tensor slope, Tensor[] x, int[] pairs, str reduction) -> Tensor[]",
    fake=lambda cotangent, slope, x, pairs, reduction: [map_like(one) for one in x],
    closed_form=closed_form.backward,
    launcher=f"{KERNELS}:backward",
)
