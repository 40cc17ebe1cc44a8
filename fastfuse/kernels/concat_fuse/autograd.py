"""Schemas, fakes and autograd functions of both operators; torch only, kernels are loaded when first executed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastfuse.kernels import _library
from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.concat_fuse import closed_form
from fastfuse.kernels.concat_fuse.layout import Norm, empty_map, gradient_of, gradient_of_weight


def _conv1x1_fwd_fake(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    return empty_map(features[0], weight.shape[0])


def _conv1x1_bwd_fake(
    grad: Tensor, features: Sequence[Tensor], weight: Tensor, needs_features: Sequence[bool], needs_weight: bool
) -> list[Tensor]:
    found = [gradient_of(x) for x, needed in zip(features, needs_features, strict=True) if needed]
    return [*found, torch.empty_like(weight)] if needs_weight else found


_library.define(
    "concat_conv1x1_fwd",
    "(Tensor[] features, Tensor weight) -> Tensor",
    fake=_conv1x1_fwd_fake,
    closed_form=closed_form.concat_conv1x1_fwd,
    launcher="fastfuse.kernels.concat_fuse.triton_kernels:launch_fwd",
)
_library.define(
    "concat_conv1x1_bwd",
    "(Tensor grad, Tensor[] features, Tensor weight, bool[] needs_features, bool needs_weight) -> Tensor[]",
    fake=_conv1x1_bwd_fake,
    closed_form=closed_form.concat_conv1x1_bwd,
    launcher="fastfuse.kernels.concat_fuse.triton_kernels:launch_bwd",
)


class ConcatConv1x1(torch.autograd.Function):
    """1x1 convolution of S maps [B, C_s, H, W] by a weight [C_out, C, 1, 1]; saves its inputs."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, *features: Tensor) -> Tensor:
        """[B, C_out, H, W]."""
        ctx.save_for_backward(weight, *features)
        return torch.ops.fastfuse.concat_conv1x1_fwd(features, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weight and of each map, where needed."""
        weight, *features = ctx.saved_tensors
        needs_weight, *needs = ctx.needs_input_grad
        found = iter(torch.ops.fastfuse.concat_conv1x1_bwd(grad, features, weight, needs, needs_weight))
        gradients = [next(found) if needed else None for needed in needs]
        return (next(found) if needs_weight else None, *gradients)


def _fuse_fwd_fake(
    features: Sequence[Tensor], depthwise: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    norm1, pointwise, norm2, (attention, pooled) = Norm(*rest[:8]), rest[8], Norm(*rest[9:17]), rest[17:]
    first, outputs = features[0], pointwise.shape[0]
    batch, _, height, width = first.shape
    wide = torch.promote_types(first.dtype, torch.float32)
    return (
        empty_map(first, outputs),
        first.new_empty((batch, height, width) if attention else (0,), dtype=wide),
        first.new_empty((batch, outputs) if pooled else (0,)),
        empty_map(first, pointwise.shape[1]),
        empty_map(first, outputs),
        norm1.statistics(first),
        norm2.statistics(first),
    )


def _fuse_bwd_fake(
    of_fused: Tensor | None, of_attention: Tensor | None, of_pooled: Tensor | None,
    features: Sequence[Tensor], depthwise: Tensor, weight1: Tensor, bias1: Tensor, mean1: Tensor, var1: Tensor,
    eps1: float, training1: bool, pointwise: Tensor, weight2: Tensor, bias2: Tensor, mean2: Tensor, var2: Tensor,
    eps2: float, training2: bool, hidden: Tensor, pre: Tensor, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    vectors = [torch.empty_like(x) for x in (weight1, bias1, weight2, bias2)]
    found = [gradient_of_weight(depthwise), *vectors[:2], torch.empty_like(pointwise), *vectors[2:]]
    found += [gradient_of(x) for x in features]
    return [x for x, needed in zip(found, needs, strict=True) if needed]


def _norm_signature(i: int, alias: str) -> str:
    mean, var = alias
    return (
        f"Tensor weight{i}, Tensor bias{i}, Tensor? mean{i}, Tensor? var{i}, Tensor({mean}!)? running_mean{i}, "
        f"Tensor({var}!)? running_var{i}, float momentum{i}, float eps{i}"
    )


_library.define(
    "concat_fuse_fwd",
    f"(Tensor[] features, Tensor depthwise, {_norm_signature(1, 'ab')}, Tensor pointwise, {_norm_signature(2, 'cd')}, "
    "bool attention, bool pooled) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fuse_fwd_fake,
    closed_form=closed_form.concat_fuse_fwd,
    launcher="fastfuse.kernels.concat_fuse.triton_launch:launch_fwd",
)
_library.define(
    "concat_fuse_bwd",
    "(Tensor? of_fused, Tensor? of_attention, Tensor? of_pooled, Tensor[] features, Tensor depthwise, Tensor weight1, "
    "Tensor bias1, Tensor mean1, Tensor var1, float eps1, bool training1, Tensor pointwise, Tensor weight2, "
    "Tensor bias2, Tensor mean2, Tensor var2, float eps2, bool training2, Tensor hidden, Tensor pre, bool[] needs) "
    "-> Tensor[]",
    fake=_fuse_bwd_fake,
    closed_form=closed_form.concat_fuse_bwd,
    launcher="fastfuse.kernels.concat_fuse.triton_launch:launch_bwd",
)


def fuse(
    features: Sequence[Tensor],
    depthwise: Tensor,
    norm1: BatchNorm,
    pointwise: Tensor,
    norm2: BatchNorm,
    *,
    attention: bool,
    pooled: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The fused map, its attention map and its spatial mean, the latter two where asked for."""
    statistics = norm1.running_mean, norm1.running_var, norm2.running_mean, norm2.running_var
    options = *norm1[4:], *norm2[4:], attention, pooled
    parameters = depthwise, norm1.weight, norm1.bias, pointwise, norm2.weight, norm2.bias
    fused, energy, mean = ConcatFuse.apply(options, *statistics, *parameters, *features)
    return fused, energy if attention else None, mean if pooled else None


class ConcatFuse(torch.autograd.Function):
    """The fusion module; saves its inputs, the statistics used, the first ReLU's output and the second norm's input."""

    @staticmethod
    def forward(
        ctx: Any, options: tuple, mean1: Tensor, var1: Tensor, mean2: Tensor, var2: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fused map, attention map and spatial mean; the latter two empty where not asked for."""
        training1, momentum1, eps1, training2, momentum2, eps2, attention, pooled = options
        depthwise, weight1, bias1, pointwise, weight2, bias2, *features = tensors
        used1 = (None, None, mean1, var1) if training1 else (mean1, var1, None, None)
        used2 = (None, None, mean2, var2) if training2 else (mean2, var2, None, None)
        fused, energy, mean, hidden, pre, statistics1, statistics2 = torch.ops.fastfuse.concat_fuse_fwd(
            features, depthwise, weight1, bias1, *used1, momentum1, eps1,
            pointwise, weight2, bias2, *used2, momentum2, eps2, attention, pooled,
        )  # fmt: skip
        statistics1 = statistics1.unbind() if training1 else (mean1, var1)
        statistics2 = statistics2.unbind() if training2 else (mean2, var2)
        ctx.save_for_backward(*tensors, *statistics1, *statistics2, hidden, pre)
        ctx.options = eps1, training1, eps2, training2
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x, asked in ((energy, attention), (mean, pooled)) if not asked])
        return fused, energy, mean

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_fused: Tensor | None, of_attention: Tensor | None, of_pooled: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters and of each map, where needed."""
        depthwise, weight1, bias1, pointwise, weight2, bias2, *features, mean1, var1, mean2, var2, hidden, pre = (
            ctx.saved_tensors
        )
        eps1, training1, eps2, training2 = ctx.options
        needs = ctx.needs_input_grad[5:]
        saved1 = depthwise, weight1, bias1, mean1, var1, eps1, training1
        saved2 = pointwise, weight2, bias2, mean2, var2, eps2, training2
        cotangents = of_fused, of_attention, of_pooled
        backward = torch.ops.fastfuse.concat_fuse_bwd
        found = iter(backward(*cotangents, features, *saved1, *saved2, hidden, pre, needs))
        return None, None, None, None, None, *[next(found) if needed else None for needed in needs]
