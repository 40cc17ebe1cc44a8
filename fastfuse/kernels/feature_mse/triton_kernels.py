"""Triton kernels of feature_mse: one launch for all students, a second, small one adds the partial sums.

`maps` are the students' maps, then their targets; `strides` are those of the maps, then of their gradients.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels import _students
from fastfuse.kernels._device import Walk, ordered_sum, tile_address, tile_place, tile_turns

# Of each map: two 16-byte loads for each of 256 threads. With twice as much in float32 registers spill on sm_100.
TILE_BYTES = 8192
WARPS = 8
# Eight blocks on each of about 130 multiprocessors; each walks over tiles, so few partial sums are left to add.
PROGRAMS = 1024
FINISH_BLOCK = 1024


@triton.jit
def _load(maps, strides, MAP: tl.constexpr, place):
    """A tile of map MAP in fp32, 0 outside."""
    at = tile_address(maps[MAP], strides[MAP], place[0], place[1], place[2])
    return tl.load(at, place[3], other=0).to(tl.float32)


@triton.jit
def _sum_squares(
    maps, strides, OWN: tl.constexpr, STUDENTS: tl.constexpr, GOAL: tl.constexpr, extent,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum over a block's tiles of the squared distances of STUDENTS maps from map GOAL."""
    total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for turn in range(0, tile_turns(extent, BLOCK_C, BLOCK_N)):
        place = tile_place(turn, extent, BLOCK_C, BLOCK_N)
        goal = _load(maps, strides, GOAL, place)
        for s in tl.static_range(STUDENTS):
            difference = _load(maps, strides, OWN + s, place) - goal
            total += difference * difference
    return tl.sum(total)


@triton.jit
def feature_mse_fwd_sum_kernel(
    maps, strides, extents, scales, partial, STUDENTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Partial sums of the loss: one for each block, and for each student with a target of its own."""
    if len(extents) == 1:
        total = _sum_squares(maps, strides, 0, STUDENTS, STUDENTS, extents[0], BLOCK_C, BLOCK_N)
        tl.store(partial + tl.program_id(0), total * scales[0])
    else:
        # A branch for each student, not tables read on the device: the compiler knows strides and alignment of each.
        for s in tl.static_range(STUDENTS):
            if tl.program_id(1) == s:
                total = _sum_squares(maps, strides, s, 1, STUDENTS + s, extents[s], BLOCK_C, BLOCK_N)
                tl.store(partial + s * tl.num_programs(0) + tl.program_id(0), total * scales[s])


@triton.jit
def feature_mse_fwd_finish_kernel(partial, loss, count, BLOCK: tl.constexpr):
    """Add the partial sums in a fixed order."""
    tl.store(loss, ordered_sum(partial, count, BLOCK))


@triton.jit
def _slopes(
    scale, maps, gradients, strides, OWN: tl.constexpr, STUDENTS: tl.constexpr, GOAL: tl.constexpr,
    WANTED: tl.constexpr, extent, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write those gradients of STUDENTS maps and of map GOAL, their target, that are wanted."""
    for turn in range(0, tile_turns(extent, BLOCK_C, BLOCK_N)):
        place = tile_place(turn, extent, BLOCK_C, BLOCK_N)
        goal = _load(maps, strides, GOAL, place)
        total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        for s in tl.static_range(STUDENTS):
            slope = scale * (_load(maps, strides, OWN + s, place) - goal)
            total += slope
            if (WANTED >> (OWN + s)) & 1:
                at = tile_address(gradients[OWN + s], strides[len(maps) + OWN + s], place[0], place[1], place[2])
                tl.store(at, slope, place[3])
        if (WANTED >> GOAL) & 1:
            at = tile_address(gradients[GOAL], strides[len(maps) + GOAL], place[0], place[1], place[2])
            tl.store(at, -total, place[3])


@triton.jit
def feature_mse_bwd_kernel(
    gradient, maps, gradients, strides, extents, scales,
    WANTED: tl.constexpr, STUDENTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of the maps whose bit of WANTED is set."""
    slope = 2 * tl.load(gradient)
    if len(extents) == 1:
        _slopes(
            slope * scales[0], maps, gradients, strides, 0, STUDENTS, STUDENTS, WANTED, extents[0], BLOCK_C, BLOCK_N
        )  # fmt: skip
    else:
        for s in tl.static_range(STUDENTS):
            if tl.program_id(1) == s:
                _slopes(
                    slope * scales[s], maps, gradients, strides, s, 1, STUDENTS + s, WANTED, extents[s],
                    BLOCK_C, BLOCK_N,
                )  # fmt: skip


class _Launch(Walk):
    """The walk over S maps and their targets, one for all or one each, and their gradients."""

    def __init__(self, features: Sequence[Tensor], targets: Sequence[Tensor], gradients: Sequence[Tensor] = ()) -> None:
        maps, pairs = (*features, *targets, *gradients), len(targets)
        groups = [maps] if pairs == 1 else [maps[s::pairs] for s in range(pairs)]
        super().__init__(groups, TILE_BYTES // features[0].element_size(), PROGRAMS)
        # The mean over nothing is not a number.
        self.scales = tuple(1 / x.numel() if x.numel() else float("nan") for x in features)
        self.options = {"STUDENTS": len(features), **self.blocks(), "num_warps": WARPS}


def forward(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Loss of S maps against one target or one each; every map has one stride for its positions."""
    launch, maps = _Launch(features, targets), (*features, *targets)
    partial = features[0].new_empty(launch.grid, dtype=torch.float32)
    loss = features[0].new_empty((), dtype=torch.float32)
    feature_mse_fwd_sum_kernel[launch.grid](
        maps, launch.strides(maps), launch.extents, launch.scales, partial, **launch.options
    )
    feature_mse_fwd_finish_kernel[(1,)](partial, loss, partial.numel(), BLOCK=FINISH_BLOCK)
    return loss


def backward(
    gradient: Tensor, features: Sequence[Tensor], targets: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of those of (*features, *targets) that are wanted; one launch."""
    to = _students.Places(features, targets, wanted)
    launch = _Launch(features, targets, to.gradients)
    feature_mse_bwd_kernel[launch.grid](
        gradient, to.maps, to.gradients, launch.strides((*to.maps, *to.gradients)), launch.extents, launch.scales,
        WANTED=to.wanted, **launch.options,
    )  # fmt: skip
    return to.found
