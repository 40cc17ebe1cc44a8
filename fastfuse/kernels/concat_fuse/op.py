"""Public form of concat_fuse and concat_conv1x1."""

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _across, _dispatch, _extension, _limits, _numerics, _triton
from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.concat_fuse import autograd, checks, reference

_dispatch.register("concat_conv1x1", {"triton": _triton.why_not, "reference": None})


def _why_not_cuda(tensor: Tensor | None) -> str | None:
    """Its part in CUDA C++ is joined with Triton kernels for the rest."""
    if tensor is None:  # which nothing is compiled for: without a GPU the interpreter would not help
        return _extension.why_not(None) or _triton.why_not(None)
    return _triton.why_not(tensor) or _extension.why_not(tensor)


# Triton first as long as no measured row puts CUDA C++ before it.
_dispatch.register("concat_fuse", {"triton": _triton.why_not, "cuda": _why_not_cuda, "reference": None})


class ConcatConv1x1(NamedTuple):
    """`out` [B, C_out, H, W]; `mean` and biased `var` [C_out] of its channels, float32 at least, each over `count`.

    M2, the sum of squared differences from the mean, is var * count; of no value at all mean and var are NaN.
    """

    out: Tensor
    mean: Tensor
    var: Tensor
    count: int


class ConcatFuse(NamedTuple):
    """`fused` [B, C_out, H, W]; `attention` [B, H, W], its attention map, and `pooled` [B, C_out], its spatial mean.

    None where not asked for.
    """

    fused: Tensor | None
    attention: Tensor | None
    pooled: Tensor | None


class Fusion(NamedTuple):
    """One fusion module for `concat_fuse_all`; the fields are the arguments of `concat_fuse`."""

    features: Sequence[Tensor]
    depthwise: Tensor
    norm1: BatchNorm
    pointwise: Tensor
    norm2: BatchNorm
    fused: bool = True
    attention: bool = True
    pooled: bool = True


@overload
def concat_conv1x1(
    features: Tensor | Sequence[Tensor],
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    statistics: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def concat_conv1x1(
    features: Tensor | Sequence[Tensor],
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    statistics: Literal[True],
    backend: str = "auto",
) -> ConcatConv1x1: ...


def concat_conv1x1(
    features: Tensor | Sequence[Tensor],
    weight: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    statistics: bool = False,
    backend: str = "auto",
) -> Tensor | ConcatConv1x1:
    """1x1 convolution of the channel concatenation of S maps, without bias.

    With a scale and a shift the convolution takes relu(scale x + shift) in place of x, per channel: a batch norm and
    its ReLU, which are applied as the maps are read.

    Args:
        features: S maps [B, C_s, H, W] that agree in all but channels, C = sum C_s; or one tensor [S, B, C_s, H, W].
            Slices of the channels of one stacked map are read where they lie, as any other.
        weight: [C_out, C, 1, 1].
        scale, shift: [C] over the channels of all maps, float32 as a rule; both or neither. Their gradients are taken.
        statistics: whether to give mean and variance of each channel of the result, taken from the unrounded sums.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [B, C_out, H, W]; with statistics ConcatConv1x1(out, mean, var, count). Gradients flow through mean and var.

    Raises:
        InputError, TypeError: maps of different batch, size, dtype or device, a weight of another shape or dtype, one
            of scale and shift alone, or of another length, or not of floating point.
        BackendUnavailableError: the backend asked for cannot serve here.
    """
    features = list(features)
    total = checks.check_features(features)
    checks.check_weight("weight", weight, (weight.shape[0], total, 1, 1))
    checks.check_affine(features[0], total, scale=scale, shift=shift)
    if _dispatch.resolve("concat_conv1x1", backend, features[0]) == "reference":
        out = reference.concat_conv1x1(features, weight, scale, shift)
        found = reference.statistics(out) if statistics else ()
    else:
        _limits.check_positions("features[0]", features[0])
        checks.check_kernel_affine(scale=scale, shift=shift)
        features = _as_convolved(features, weight=weight)
        out, *found = autograd.ConcatConv1x1.apply(statistics, weight, scale, shift, *features)
    return ConcatConv1x1(out, *found, out.shape[0] * out.shape[2] * out.shape[3]) if statistics else out


def concat_fuse(
    features: Sequence[Tensor],
    depthwise: Tensor,
    norm1: BatchNorm,
    pointwise: Tensor,
    norm2: BatchNorm,
    *,
    fused: bool = True,
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
        fused, attention, pooled: whether to give the fused map, its attention map and its spatial mean; at least one.
            A fused map that nobody asks for is not written.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        ConcatFuse(fused, attention, pooled).

    Raises:
        InputError, TypeError: maps of different batch, size, dtype or device, or weights or norms of other shapes.
        BackendUnavailableError: the backend asked for cannot serve here.
    """
    module = Fusion(features, depthwise, norm1, pointwise, norm2, fused, attention, pooled)
    return concat_fuse_all([module], backend=backend)[0]


def concat_fuse_all(modules: Sequence[Fusion], *, backend: str = "auto") -> list[ConcatFuse]:
    """Several fusion modules that do not depend on each other, such as fusion and trans-fusion of one step.

    Modules whose maps agree in batch, size and dtype, and whose norms agree in mode, share their launches.

    Args:
        modules: each with the arguments of `concat_fuse`.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        One ConcatFuse per module.

    Raises:
        InputError, TypeError, BackendUnavailableError: as `concat_fuse`.
    """
    modules = [module._replace(features=list(module.features)) for module in modules]
    if not modules:
        raise InputError("modules must hold at least one fusion module")
    for module in modules:
        checks.check_module(module)
    backend = _across.backend_for("concat_fuse", backend, [norm for m in modules for norm in (m.norm1, m.norm2)])
    served = {_dispatch.resolve("concat_fuse", backend, module.features[0]) for module in modules}
    if served == {"reference"}:
        return [_reference(module) for module in modules]
    backend = "cuda" if served == {"cuda"} else "triton"
    groups: dict[tuple, list[int]] = {}
    for i, module in enumerate(modules):
        checks.check_kernel_norms(module.features[0], norm1=module.norm1, norm2=module.norm2)
        weights = {"pointwise": module.pointwise, "depthwise": module.depthwise}
        modules[i] = module._replace(features=_as_convolved(module.features, **weights))
        groups.setdefault(_launch_key(modules[i]), []).append(i)
    found: dict[int, ConcatFuse] = {}
    for members in groups.values():
        found |= zip(members, _kernels([modules[i] for i in members], backend), strict=True)
    return [found[i] for i in range(len(modules))]


def _reference(module: Fusion) -> ConcatFuse:
    fused = reference.concat_fuse(*module[:5])
    return ConcatFuse(
        fused if module.fused else None,
        _numerics.attention(fused) if module.attention else None,
        fused.mean((2, 3)) if module.pooled else None,
    )


def _launch_key(module: Fusion) -> tuple:
    """What modules that share a launch have in common."""
    first, norms = module.features[0], (module.norm1, module.norm2)
    tensors = (first, module.depthwise, module.pointwise, *(x for norm in norms for x in norm[:4]))
    size = first.shape[0], *first.shape[2:]
    return (*size, first.device, *(norm.training for norm in norms), *(x.dtype for x in tensors))


def _kernels(modules: Sequence[Fusion], backend: str) -> list[ConcatFuse]:
    norms = [norm for module in modules for norm in (module.norm1, module.norm2)]
    asked = tuple(flag for module in modules for flag in module[5:])
    options = autograd.Options(
        tuple(len(module.features) for module in modules),
        (norms[0].training, norms[1].training),
        tuple(number for norm in norms for number in (norm.momentum, norm.eps)),
        asked,
        backend,
    )
    running = [x for norm in norms for x in (norm.running_mean, norm.running_var)]
    parameters = [
        x for m in modules for x in (m.depthwise, *m.norm1[:2], m.pointwise, *m.norm2[:2])
    ]  # the order of layout.Module.parameters
    features = [x for module in modules for x in module.features]
    results = autograd.ConcatFuse.apply(options, *running, *parameters, *features)
    given = [x if flag else None for x, flag in zip(results, asked, strict=True)]
    return [ConcatFuse(*given[3 * m : 3 * m + 3]) for m in range(len(modules))]


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
