"""Public form of deep_to_shallow."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _numerics
from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.deep_to_shallow import reference

_dispatch.register("deep_to_shallow", {"reference": None})


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
    _dispatch.resolve("deep_to_shallow", backend)
    return tuple(reference.deep_to_shallow(x, stages, paddings)[::-1])


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
