"""Public form of feature_mse, and its registration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastfuse.kernels import _dispatch, _library, _students, _triton
from fastfuse.kernels.feature_mse import closed_form, reference

_dispatch.register("feature_mse", {"triton": _triton.why_not, "reference": None})


def feature_mse(
    features: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """Squared distance of S students' maps from a target, averaged over all elements and summed over students.

    sum_s mean (F_s - T)^2; nothing is normalised (`normalized_lp` does that).

    Args:
        features: S maps [B, C, H, W], or one stack [S, B, C, H, W].
        target: one map [B, C, H, W] for all, or one each.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        0-d, float32 for half-precision maps.

    Raises:
        InputError, TypeError: maps and targets of different number, shape or device, or of wrong dtype.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    features, targets = _students.students_and_targets(features, target)
    if {_dispatch.resolve("feature_mse", backend, x) for x in (*features, *targets)} != {"triton"}:
        return reference.feature_mse(features, targets)
    maps = (_triton.map_strides(x)[0] for x in (*features, *(targets[:1] if isinstance(target, Tensor) else targets)))
    return _FeatureMse.apply(len(features), *maps)


class _FeatureMse(torch.autograd.Function):
    """feature_mse of the first `students` maps against the other maps, one for all or one each."""

    @staticmethod
    def forward(ctx: Any, students: int, *maps: Tensor) -> Tensor:
        ctx.students = students
        ctx.save_for_backward(*maps)
        return torch.ops.fastfuse.feature_mse_fwd(maps[:students], maps[students:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, wanted = ctx.saved_tensors, ctx.needs_input_grad[1:]
        features, targets = maps[: ctx.students], maps[ctx.students :]
        found = iter(torch.ops.fastfuse.feature_mse_bwd(gradient, features, targets, wanted))
        return None, *(next(found) if asked else None for asked in wanted)


def _empty_loss(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    dtype = torch.promote_types(features[0].dtype, targets[0].dtype)
    return features[0].new_empty((), dtype=torch.promote_types(dtype, torch.float32))


def _empty_gradients(
    gradient: Tensor, features: Sequence[Tensor], targets: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    return [torch.empty_like(x) for x, asked in zip((*features, *targets), wanted, strict=True) if asked]


_library.define(
    "feature_mse_fwd",
    "(Tensor[] features, Tensor[] targets) -> Tensor",
    fake=_empty_loss,
    closed_form=closed_form.forward,
    launcher="fastfuse.kernels.feature_mse.triton_kernels:forward",
)
_library.define(
    "feature_mse_bwd",
    "(Tensor gradient, Tensor[] features, Tensor[] targets, bool[] wanted) -> Tensor[]",
    fake=_empty_gradients,
    closed_form=closed_form.backward,
    launcher="fastfuse.kernels.feature_mse.triton_kernels:backward",
)
