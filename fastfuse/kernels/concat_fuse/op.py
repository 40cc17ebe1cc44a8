"""Public form of concat_fuse and concat_conv1x1."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _numerics
from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.concat_fuse import reference

_dispatch.register("concat_conv1x1", {"reference": None})
_dispatch.register("concat_fuse", {"reference": None})


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
    """
    features = list(features)
    total = _check_features(features)
    _check_weight("weight", weight, (weight.shape[0], total, 1, 1))
    _dispatch.resolve("concat_conv1x1", backend)
    return reference.concat_conv1x1(features, weight)


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
    _dispatch.resolve("concat_fuse", backend)
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


def _check_weight(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(weight.shape) != shape:
        raise InputError(f"{name} must have shape {list(shape)} for these features, not {list(weight.shape)}")
