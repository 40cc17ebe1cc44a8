"""What concat_fuse and concat_conv1x1 refuse, before anything is computed."""

from typing import TYPE_CHECKING

from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _limits, _numerics
from fastfuse.kernels._numerics import BatchNorm

if TYPE_CHECKING:
    from fastfuse.kernels.concat_fuse.op import Fusion


def check_module(module: "Fusion") -> None:
    """Refuse what does not fit together, and a module of which nothing is asked for."""
    total = check_features(module.features)
    depthwise, pointwise = module.depthwise, module.pointwise
    check_weight("depthwise", depthwise, (total, 1, 3, 3))
    check_weight("pointwise", pointwise, (pointwise.shape[0], total, 1, 1))
    _numerics.check_batch_norm("norm1", module.norm1, total)
    _numerics.check_batch_norm("norm2", module.norm2, pointwise.shape[0])
    if not (module.fused or module.attention or module.pooled):
        raise InputError("nothing is asked for: set one of fused, attention and pooled")


def check_features(features: list[Tensor]) -> int:
    """Refuse maps that cannot be concatenated; gives their channels together."""
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


def check_affine(feature: Tensor, channels: int, **vectors: Tensor | None) -> None:
    """Refuse one of scale and shift without the other, and vectors that are not [channels]."""
    missing = [name for name, x in vectors.items() if x is None]
    if missing and len(missing) < len(vectors):
        raise InputError(f"scale and shift must be given together, {missing[0]} is missing; give both or neither")
    for name, x in vectors.items():
        if x is not None:
            _numerics.check_floating(name, x, (1,))
            check_weight(name, x, (channels,))
            _numerics.check_same_device("features[0]", feature, **{name: x})


def check_kernel_affine(**vectors: Tensor | None) -> None:
    """Refuse vectors that a kernel cannot walk through."""
    for name, x in vectors.items():
        if x is not None and not x.is_contiguous():
            raise InputError(f"{name} must be contiguous for the kernels; call .contiguous() on it")


def check_kernel_norms(feature: Tensor, **norms: BatchNorm) -> None:
    """Refuse batch statistics of one value, as torch does, and what kernels cannot count or walk through."""
    _limits.check_positions("features[0]", feature)
    for name, norm in norms.items():
        if norm.training and feature.shape[0] * feature.shape[2] * feature.shape[3] == 1:
            raise InputError(
                f"{name} in training mode needs more than one value per channel, features[0] has shape "
                f"{list(feature.shape)}; use a larger batch or evaluation mode"
            )
        for field in ("weight", "bias", "running_mean", "running_var"):
            if not getattr(norm, field).is_contiguous():
                raise InputError(f"{name}.{field} must be contiguous for the kernels; call .contiguous() on it")


def check_weight(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a weight of another shape."""
    if tuple(weight.shape) != shape:
        raise InputError(f"{name} must have shape {list(shape)} for these features, not {list(weight.shape)}")
