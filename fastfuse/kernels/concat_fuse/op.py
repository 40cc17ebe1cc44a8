"""Public form of concat_fuse and concat_conv1x1."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _numerics, _triton
from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.concat_fuse import autograd, reference

_dispatch.register("concat_conv1x1", {"triton": _triton.why_not, "reference": None})
_dispatch.register("concat_fuse", {"triton": _triton.why_not, "reference": None})


class ConcatFuse(NamedTuple):
    """`fused` [B, C_out, H, W]; `attention` [B, H, W], its attention map, and `pooled` [B, C_out], its spatial mean.

    The latter two are None where they were not asked for.
    """

    fused: Tensor
    attention: Tensor | None
    pooled: Tensor | None


def concat_conv1x1(features: Sequence[Tensor], weight: Tensor, *, backend: str = "auto") -> Tensor:
    """1x1 convolution of the channel concatenation of S maps, without bias.

    Args:
        features: S maps [B, C_s, H, W] that agree in all but channels.
        weight: [C_out, sum C_s, 1, 1].
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [B, C_out, H, W].

    Raises:
        InputError, TypeError: maps of different batch, size, dtype or device, or a weight of another shape or dtype.
        BackendUnavailableError: the backend asked for cannot serve here.
    """
    features = list(features)
    total = _check_features(features)
    _check_weight("weight", weight, (weight.shape[0], total, 1, 1))
    if _dispatch.resolve("concat_conv1x1", backend, features[0]) == "reference":
        return reference.concat_conv1x1(features, weight)
    return autograd.ConcatConv1x1.apply(weight, *_as_convolved(features, weight=weight))


def concat_fuse(
    features: Sequence[Tensor],
    depthwise: Tensor,
    norm1: BatchNorm,
    pointwise: Tensor,
    norm2: BatchNorm,
    *,
    attention: bool = True,
    pooled: bool = True,
    backend: str = "auto",
) -> ConcatFuse:
    """The fusion module on S feature maps: depthwise 3x3, batch norm, ReLU, 1x1, batch norm, ReLU.

    With one map and more output than input channels it is the mirror, trans-fusion.
    Sources: FFSD (arXiv 2103.14473), FFL (arXiv 1904.09058), fusion module.

    Args:
        features: S maps [B, C_s, H, W] that agree in all but channels; C = sum C_s.
        depthwise: [C, 1, 3, 3].
        norm1: batch norm over C; its running statistics are updated in training mode.
        pointwise: [C_out, C, 1, 1].
        norm2: batch norm over C_out, likewise.
        attention, pooled: whether to give the attention map and the spatial mean of the fused map.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        ConcatFuse(fused, attention, pooled).

    Raises:
        InputError, TypeError: maps of different batch, size, dtype or device, or weights or norms of other shapes.
    """
    features = list(features)
    total = _check_features(features)
    _check_weight("depthwise", depthwise, (total, 1, 3, 3))
    _check_weight("pointwise", pointwise, (pointwise.shape[0], total, 1, 1))
    _numerics.check_batch_norm("norm1", norm1, total)
    _numerics.check_batch_norm("norm2", norm2, pointwise.shape[0])
    if _dispatch.resolve("concat_fuse", backend, features[0]) != "reference":
        _check_kernel_norms(features[0], norm1=norm1, norm2=norm2)
        features = _as_convolved(features, pointwise=pointwise, depthwise=depthwise)
        found = autograd.fuse(features, depthwise, norm1, pointwise, norm2, attention=attention, pooled=pooled)
        return ConcatFuse(*found)
    fused = reference.concat_fuse(features, depthwise, norm1, pointwise, norm2)
    return ConcatFuse(
        fused,
        _numerics.attention(fused) if attention else None,
        fused.mean((2, 3)) if pooled else None,
    )


def _check_features(features: list[Tensor]) -> int:
    if not features:
        raise InputError("features must hold at least one map")
    first = features[0]
    for s, feature in enumerate(features):
        _numerics.check_floating(f"features[{s}]", feature, (4,))
        _numerics.check_same_device("features[0]", first, **{f"features[{s}]": feature})
        if feature.dtype != first.dtype:
            raise TypeError(f"features[{s}] is {feature.dtype}, features[0] {first.dtype}; convert one of them")
        if (feature.shape[0], *feature.shape[2:]) != (first.shape[0], *first.shape[2:]):
            raise InputError(
                f"features[{s}] {list(feature.shape)} must agree with features[0] {list(first.shape)} "
                "in all but channels"
            )
    return sum(feature.shape[1] for feature in features)


def _as_convolved(features: list[Tensor], **weights: Tensor) -> list[Tensor]:
    """The maps in the dtype that torch's own convolution would take them in; kernels cast weights as they read them."""
    device = features[0].device.type
    if torch.is_autocast_enabled(device):
        return [x.to(torch.get_autocast_dtype(device)) for x in features]
    for name, weight in weights.items():
        if weight.dtype != features[0].dtype:
            dtypes = f"{name} is {weight.dtype}, features[0] {features[0].dtype}"
            raise TypeError(f"{dtypes}; convert one of them or use autocast")
    return features


def _check_kernel_norms(feature: Tensor, **norms: BatchNorm) -> None:
    """Refuse batch statistics of one value, as torch does, and norms whose vectors a kernel cannot walk through."""
    for name, norm in norms.items():
        if norm.training and feature.shape[0] * feature.shape[2] * feature.shape[3] == 1:
            raise InputError(
                f"{name} in training mode needs more than one value per channel, features[0] has shape "
                f"{list(feature.shape)}; use a larger batch or evaluation mode"
            )
        for field in ("weight", "bias", "running_mean", "running_var"):
            if not getattr(norm, field).is_contiguous():
                raise InputError(f"{name}.{field} must be contiguous for the kernels; call .contiguous() on it")


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(weight.shape) != shape:
        raise InputError(f"{name} must have shape {list(shape)} for these features, not {list(weight.shape)}")
