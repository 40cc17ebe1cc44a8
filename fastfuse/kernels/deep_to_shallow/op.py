"""Public form of deep_to_shallow."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _numerics, _triton
from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.deep_to_shallow import reference
from fastfuse.kernels.deep_to_shallow.autograd import DeepToShallow, StageOptions

_dispatch.register("deep_to_shallow", {"triton": _triton.why_not, "reference": None})


class Stage(NamedTuple):
    """One stage: transposed-convolution `weight` [C_in, C_out, 3, 3] and the `norm` over C_out."""

    weight: Tensor
    norm: BatchNorm


def deep_to_shallow(
    x: Tensor,
    stages: Sequence[Stage],
    *,
    sizes: Sequence[tuple[int, int]] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """Shallow-looking maps from a deep one: a chain of transposed convolution (3x3, stride 2) + batch norm + ReLU.

    Source: FFSD (arXiv 2103.14473), self-distillation transform.

    Args:
        x: the deep map [B, C, H, W].
        stages: the chain, the first acts on x.
        sizes: (height, width) of the maps to give, shallow to deep; each is twice the next deeper one or one less.
            None: exactly twice.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        One map per stage, shallow to deep: the last stage's output comes first, as in a network's features.

    Raises:
        InputError, TypeError: no stage, channels that do not chain, norms of other widths, sizes that a stride of 2
            cannot reach.
    """
    _numerics.check_floating("x", x, (4,))
    stages = list(stages)
    if not stages:
        raise InputError("stages must hold at least one stage")
    channels, height, width = x.shape[1:]
    wanted = [None] * len(stages) if sizes is None else [tuple(size) for size in sizes][::-1]
    if len(wanted) != len(stages):
        raise InputError(f"sizes must hold {len(stages)} entries, one per stage, not {len(wanted)}")
    paddings = []
    for j, (stage, size) in enumerate(zip(stages, wanted, strict=True)):
        if stage.weight.shape[0] != channels or tuple(stage.weight.shape[2:]) != (3, 3):
            raise InputError(f"stages[{j}].weight must be [{channels}, C_out, 3, 3], not {list(stage.weight.shape)}")
        _numerics.check_batch_norm(f"stages[{j}].norm", stage.norm, stage.weight.shape[1])
        target = size or (2 * height, 2 * width)
        paddings.append((output_padding(height, target[0]), output_padding(width, target[1])))
        channels, (height, width) = stage.weight.shape[1], target
    if _dispatch.resolve("deep_to_shallow", backend, x) == "reference":
        return tuple(reference.deep_to_shallow(x, stages, paddings)[::-1])
    return _fused(x, stages, paddings)[::-1]


def _fused(x: Tensor, stages: Sequence[Stage], paddings: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
    """The chain through its kernels; maps in the order of the stages."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    options, tensors = [], []
    height, width = x.shape[2:]
    for j, ((weight, norm), padding) in enumerate(zip(stages, paddings, strict=True)):
        height, width = 2 * height - 1 + padding[0], 2 * width - 1 + padding[1]
        _check_stage(f"stages[{j}]", weight, norm, x)
        if norm.training and x.shape[0] * height * width == 1:
            raise InputError(
                f"stages[{j}].norm takes batch statistics, which one value per channel does not have: "
                "give more samples or larger maps, or training=False"
            )
        # A norm that does not learn gets its gradient by the output alone; so do the maps that make targets.
        keep = norm.training or (torch.is_grad_enabled() and norm.weight.requires_grad)
        options.append(StageOptions(padding, norm.training, keep, norm.momentum, norm.eps, dtype))
        tensors += [weight, norm.weight, norm.bias, norm.running_mean, norm.running_var]
    return DeepToShallow.apply(tuple(options), x, *tensors)


def _check_stage(name: str, weight: Tensor, norm: BatchNorm, x: Tensor) -> None:
    """Refuse what the reference would take or refuse in its own words, and the kernels cannot."""
    vectors = {f"{name}.norm.{f}": getattr(norm, f) for f in ("weight", "bias", "running_mean", "running_var")}
    _numerics.check_same_device("x", x, **{f"{name}.weight": weight}, **vectors)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name}.weight is {weight.dtype}, x is {x.dtype}; convert one of them, or run under torch.autocast"
        )
    for field, vector in vectors.items():
        if not vector.is_contiguous():
            raise InputError(f"{field} must be contiguous, not a strided view; give a tensor of its own")


def output_padding(deep: int, shallow: int) -> int:
    """What a stride-2 transposed 3x3 convolution must add to reach a size: 0 for 2 n - 1, 1 for 2 n.

    Raises:
        InputError: the size cannot be reached.
    """
    padding = shallow - (2 * deep - 1)
    if padding not in (0, 1):
        raise InputError(
            f"sizes: a map of size {deep} can be transformed to {2 * deep - 1} or {2 * deep}, not to {shallow}; "
            "give one map per resolution, each half of the one before it (rounded up)"
        )
    return padding
