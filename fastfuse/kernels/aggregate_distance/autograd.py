"""aggregate_distance as a differentiable function over registered operators."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from fastfuse.kernels import _library
from fastfuse.kernels._autograd import first_derivatives_only
from fastfuse.kernels.aggregate_distance import closed_form

KERNELS = "fastfuse.kernels.aggregate_distance.triton_kernels"


class AggregateDistance(torch.autograd.Function):
    """Distance of the weighted sum of maps, each with one stride for its positions, from the target."""

    @staticmethod
    def forward(ctx: Any, reduction: str, weights: Tensor, target: Tensor, *maps: Tensor) -> Tensor:
        """Saves its inputs and, where the weights need a gradient, one number per map."""
        distance, dots = torch.ops.fastfuse.aggregate_distance_fwd(
            maps, weights, target, ctx.needs_input_grad[1], reduction
        )
        ctx.reduction = reduction
        ctx.save_for_backward(dots, weights, target, *maps)
        return distance

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """One launch for all gradients that are needed."""
        dots, weights, target, *maps = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        found = iter(
            torch.ops.fastfuse.aggregate_distance_bwd(gradient, maps, weights, target, dots, wanted, ctx.reduction)
        )
        return None, *(next(found) if asked else None for asked in wanted)


def _empty_results(
    maps: Sequence[Tensor], weights: Tensor, target: Tensor, with_dots: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    dtype = torch.float32
    for x in (*maps, target, weights):
        dtype = torch.promote_types(dtype, x.dtype)
    return target.new_empty((), dtype=dtype), target.new_empty(len(maps) if with_dots else 0, dtype=dtype)


def _empty_gradients(
    gradient: Tensor,
    maps: Sequence[Tensor],
    weights: Tensor,
    target: Tensor,
    dots: Tensor,
    wanted: Sequence[bool],
    reduction: str,
) -> list[Tensor]:
    return [torch.empty_like(x) for x in compress((weights, target, *maps), wanted)]


_library.define(
    "aggregate_distance_fwd",
    "(Tensor[] maps, Tensor weights, Tensor target, bool with_dots, str reduction) -> (Tensor, Tensor)",
    fake=_empty_results,
    closed_form=closed_form.forward,
    launcher=f"{KERNELS}:forward",
)
_library.define(
    "aggregate_distance_bwd",
    "(Tensor gradient, Tensor[] maps, Tensor weights, Tensor target, Tensor dots, bool[] wanted, str reduction)"
    " -> Tensor[]",
    fake=_empty_gradients,
    closed_form=closed_form.backward,
    launcher=f"{KERNELS}:backward",
)
