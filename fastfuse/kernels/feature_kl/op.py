"""Public form of feature_kl, and its registration."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _library, _students, _triton
from fastfuse.kernels.feature_kl import closed_form, reference

_dispatch.register("feature_kl", {"triton": _triton.why_not, "reference": None})


def feature_kl(
    features: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    temperature: float,
    over: str = "positions",
    backend: str = "auto",
) -> Tensor:
    """Temperature KL between the maps of S students and a target, summed over students.

    sum_s T^2 mean KL(softmax(target / T) || softmax(F_s / T)); over "positions" there is one distribution over H W for
    every sample and channel (channel-wise distillation, arXiv 2011.13256), over "channels" one over C for every sample
    and position; the mean is over these distributions.

    Args:
        features: S maps [B, C, H, W], or one stack [S, B, C, H, W].
        target: one map [B, C, H, W] for all, or one each.
        temperature: T > 0.
        over: "positions" or "channels".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        0-d, float32 for half-precision maps.

    Raises:
        InputError, TypeError: maps and targets of different number, shape or device, wrong dtype, T <= 0, an unknown
            `over`.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    features, targets = _students.students_and_targets(features, target)
    if not temperature > 0:
        raise InputError(f"temperature must be positive, not {temperature}")
    if over not in ("positions", "channels"):
        raise InputError(f"over is 'positions' or 'channels', not {over!r}")
    if {_dispatch.resolve("feature_kl", backend, x) for x in (*features, *targets)} != {"triton"}:
        return reference.feature_kl(features, targets, temperature, over)
    maps = (_triton.map_strides(x)[0] for x in (*features, *(targets[:1] if isinstance(target, Tensor) else targets)))
    return _FeatureKl.apply(len(features), float(temperature), over == "channels", *maps)


class _FeatureKl(torch.autograd.Function):
    """feature_kl of the first `students` maps against the other maps, one for all or one each."""

    @staticmethod
    def forward(ctx: Any, students: int, temperature: float, over_channels: bool, *maps: Tensor) -> Tensor:
        ctx.students, ctx.form = students, (temperature, over_channels)
        ctx.save_for_backward(*maps)
        return torch.ops.fastfuse.feature_kl_fwd(maps[:students], maps[students:], *ctx.form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        features, targets = maps[: ctx.students], maps[ctx.students :]
        found = iter(torch.ops.fastfuse.feature_kl_bwd(gradient, features, targets, *ctx.form, wanted))
        return None, None, None, *(next(found) if asked else None for asked in wanted)


def _empty_loss(
    features: Sequence[Tensor], targets: Sequence[Tensor], temperature: float, over_channels: bool
) -> Tensor:
    dtype = torch.promote_types(features[0].dtype, targets[0].dtype)
    return features[0].new_empty((), dtype=torch.promote_types(dtype, torch.float32))


def _empty_gradients(
    gradient: Tensor,
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    temperature: float,
    over_channels: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    return [torch.empty_like(x) for x, asked in zip((*features, *targets), wanted, strict=True) if asked]


_library.define(
    "feature_kl_fwd",
    "(Tensor[] features, Tensor[] targets, float temperature, bool over_channels) -> Tensor",
    fake=_empty_loss,
    closed_form=closed_form.forward,
    launcher="fastfuse.kernels.feature_kl.triton_kernels:forward",
)
_library.define(
    "feature_kl_bwd",
    "(Tensor gradient, Tensor[] features, Tensor[] targets, float temperature, bool over_channels, bool[] wanted) "
    "-> Tensor[]",
    fake=_empty_gradients,
    closed_form=closed_form.backward,
    launcher="fastfuse.kernels.feature_kl.triton_kernels:backward",
)
