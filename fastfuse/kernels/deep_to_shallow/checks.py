"""Arguments of deep_to_shallow: what a stage is, and what is refused."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _numerics
from fastfuse.kernels._numerics import BatchNorm


class Stage(NamedTuple):
    """One stage: transposed-convolution `weight` [C_in, C_out, 3, 3] and the `norm` over C_out."""

    weight: Tensor
    norm: BatchNorm


class Transform(NamedTuple):
    """One transform with its checked arguments."""

    x: Tensor
    stages: list[Stage]
    paddings: list[tuple[int, int]]
    shift: Tensor | None


def checked(
    name: str,
    x: Tensor,
    stages: Sequence[Stage],
    sizes: Sequence[tuple[int, int]] | None,
    shift: Tensor | None,
    attention: bool,
) -> Transform:
    """One transform, or an error that names the argument; `name` is its place in the lists."""
    _numerics.check_floating(f"x{name}", x, (4,))
    stages = list(stages)
    if not stages:
        raise InputError(f"stages{name} must hold at least one stage")
    channels, height, width = x.shape[1:]
    wanted = [None] * len(stages) if sizes is None else [tuple(size) for size in sizes][::-1]
    if len(wanted) != len(stages):
        raise InputError(f"sizes{name} must hold {len(stages)} entries, one per stage, not {len(wanted)}")
    paddings = []
    for j, (stage, size) in enumerate(zip(stages, wanted, strict=True)):
        own = f"stages{name}[{j}]"
        if stage.weight.shape[0] != channels or tuple(stage.weight.shape[2:]) != (3, 3):
            raise InputError(f"{own}.weight must be [{channels}, C_out, 3, 3], not {list(stage.weight.shape)}")
        _numerics.check_batch_norm(f"{own}.norm", stage.norm, stage.weight.shape[1])
        if attention and stage.norm.training:
            raise InputError(f"{own}.norm is in training mode: attention=True makes targets, give norms training=False")
        target = size or (2 * height, 2 * width)
        paddings.append((output_padding(height, target[0]), output_padding(width, target[1])))
        channels, (height, width) = stage.weight.shape[1], target
    if shift is not None:
        _check_shift(name, shift, x, attention)
    return Transform(x, stages, paddings, shift)


def _check_shift(name: str, shift: Tensor, x: Tensor, attention: bool) -> None:
    if not attention:
        raise InputError(
            f"shift{name} is only for attention=True; add it to x{name} where maps with gradients are wanted"
        )
    _numerics.check_floating(f"shift{name}", shift, (3,))
    _numerics.check_same_device(f"x{name}", x, **{f"shift{name}": shift})
    if shift.shape != (x.shape[0], *x.shape[2:]):
        raise InputError(
            f"shift{name} must be {[x.shape[0], *x.shape[2:]]}, the batch and positions of x{name}, "
            f"not {list(shift.shape)}"
        )


def check_statistics(transforms: Sequence[Transform]) -> None:
    """Two updates of the same running statistics at once would depend on which comes first."""
    updated: list[Tensor] = []
    for one in transforms:
        for stage in one.stages:
            if stage.norm.training and any(stage.norm.running_mean is other for other in updated):
                raise InputError(
                    "stages: two norms in training mode share their running statistics; "
                    "give them to calls of their own, one after the other"
                )
            updated.append(stage.norm.running_mean)


def check_stage(name: str, weight: Tensor, norm: BatchNorm, x: Tensor) -> None:
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
