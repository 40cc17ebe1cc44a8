"""normalized_lp and its joint form as differentiable functions over registered operators."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from fastfuse.kernels import _library
from fastfuse.kernels._autograd import first_derivatives_only
from fastfuse.kernels.normalized_lp import closed_form
from fastfuse.kernels.normalized_lp.layout import gradient_like

KERNELS = "fastfuse.kernels.normalized_lp.triton_kernels"
JOINT_KERNELS = "fastfuse.kernels.normalized_lp.triton_joint"


class NormalizedLp(torch.autograd.Function):
    """Losses [P] or [P, B] of P inputs and as many targets, all of which kernels can address (`layout`)."""

    @staticmethod
    def forward(ctx: Any, p: int, reduction: str, *maps: Tensor) -> Tensor:
        """Saves six numbers per sample, and the pairs of which a gradient is needed."""
        count = len(maps) // 2
        losses, stats = torch.ops.fastfuse.normalized_lp_fwd(maps[:count], maps[count:], p, reduction)
        _save(ctx, p, reduction, maps, stats)
        return losses

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """One launch for all the pairs that need it."""
        stats, *maps = ctx.saved_tensors
        inputs, targets = maps[: len(ctx.pairs)], maps[len(ctx.pairs) :]
        found = iter(
            torch.ops.fastfuse.normalized_lp_bwd(
                cotangent, stats, inputs, targets, ctx.pairs, ctx.wanted, ctx.p, ctx.reduction
            )
        )
        return None, None, *(next(found) if asked else None for asked in ctx.needs_input_grad[2:])


class NormalizedLpJoint(torch.autograd.Function):
    """Feature and attention losses, each [P] or [P, B], of P inputs and as many targets with four dimensions."""

    @staticmethod
    def forward(ctx: Any, p: int, reduction: str, *maps: Tensor) -> tuple[Tensor, Tensor]:
        """Saves the small attention maps, ten numbers per sample, and the pairs of which a gradient is needed."""
        count = len(maps) // 2
        feature, attention, small, stats = torch.ops.fastfuse.normalized_lp_joint_fwd(
            maps[:count], maps[count:], p, reduction
        )
        _save(ctx, p, reduction, maps, small, stats)
        starts = [0]
        for x in maps[:count]:
            starts.append(starts[-1] + x.shape[0] * x.shape[2] * x.shape[3])
        ctx.starts = [starts[i] for i in ctx.pairs]
        return feature, attention

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, feature: Tensor, attention: Tensor) -> tuple[Tensor | None, ...]:
        """One launch for all the pairs that need it."""
        small, stats, *maps = ctx.saved_tensors
        inputs, targets = maps[: len(ctx.pairs)], maps[len(ctx.pairs) :]
        arguments = inputs, targets, ctx.pairs, ctx.starts, ctx.wanted, ctx.p, ctx.reduction
        found = iter(torch.ops.fastfuse.normalized_lp_joint_bwd(feature, attention, small, stats, *arguments))
        return None, None, *(next(found) if asked else None for asked in ctx.needs_input_grad[2:])


def _save(ctx: Any, p: int, reduction: str, maps: Sequence[Tensor], *small: Tensor) -> None:
    """Keep the small tensors, and both maps of the pairs of which a gradient is needed."""
    count, asked = len(maps) // 2, ctx.needs_input_grad[2:]
    ctx.pairs = [i for i in range(count) if asked[i] or asked[count + i]]
    ctx.wanted = [asked[side + i] for side in (0, count) for i in ctx.pairs]
    ctx.p, ctx.reduction = p, reduction
    ctx.save_for_backward(*small, *(maps[side + i] for side in (0, count) for i in ctx.pairs))


def _empty_losses(inputs: Sequence[Tensor], targets: Sequence[Tensor], p: int, reduction: str) -> tuple[Tensor, Tensor]:
    pairs, row = len(inputs), max(x.shape[0] for x in inputs)
    dtype = torch.promote_types(inputs[0].dtype, torch.float32)
    losses = inputs[0].new_empty((pairs, row) if reduction == "none" else (pairs,), dtype=dtype)
    return losses, inputs[0].new_empty((6, pairs, row), dtype=dtype)


def _empty_gradients(
    cotangent: Tensor,
    stats: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    pairs: Sequence[int],
    wanted: Sequence[bool],
    p: int,
    reduction: str,
) -> list[Tensor]:
    return [gradient_like(x) for x in compress((*inputs, *targets), wanted)]


def _empty_joint_losses(
    inputs: Sequence[Tensor], targets: Sequence[Tensor], p: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    feature, stats = _empty_losses(inputs, targets, p, reduction)
    size = sum(x.shape[0] * x.shape[2] * x.shape[3] for x in inputs)
    return feature, torch.empty_like(feature), feature.new_empty((2, size)), stats.new_empty((10, *stats.shape[1:]))


def _empty_joint_gradients(
    feature_cotangent: Tensor,
    attention_cotangent: Tensor,
    maps: Tensor,
    stats: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    pairs: Sequence[int],
    starts: Sequence[int],
    wanted: Sequence[bool],
    p: int,
    reduction: str,
) -> list[Tensor]:
    return [gradient_like(x) for x in compress((*inputs, *targets), wanted)]


_library.define(
    "normalized_lp_fwd",
    "(Tensor[] inputs, Tensor[] targets, int p, str reduction) -> (Tensor, Tensor)",
    fake=_empty_losses,
    closed_form=closed_form.forward,
    launcher=f"{KERNELS}:forward",
)
_library.define(
    "normalized_lp_bwd",
    "(Tensor cotangent, Tensor stats, Tensor[] inputs, Tensor[] targets, int[] pairs, bool[] wanted, int p,"
    " str reduction) -> Tensor[]",
    fake=_empty_gradients,
    closed_form=closed_form.backward,
    launcher=f"{KERNELS}:backward",
)
_library.define(
    "normalized_lp_joint_fwd",
    "(Tensor[] inputs, Tensor[] targets, int p, str reduction) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_joint_losses,
    closed_form=closed_form.joint_forward,
    launcher=f"{JOINT_KERNELS}:forward",
)
_library.define(
    "normalized_lp_joint_bwd",
    "(Tensor feature_cotangent, Tensor attention_cotangent, Tensor maps, Tensor stats, Tensor[] inputs,"
    " Tensor[] targets, int[] pairs, SymInt[] starts, bool[] wanted, int p, str reduction) -> Tensor[]",
    fake=_empty_joint_gradients,
    closed_form=closed_form.joint_backward,
    launcher=f"{JOINT_KERNELS}:backward",
)
