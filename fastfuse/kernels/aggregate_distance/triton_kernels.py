"""Triton kernels of aggregate_distance: one walk over all maps at once, a second, small kernel adds partial sums.

`strides` are those of the maps, the target and then their gradients, or one entry for all: the compiler then computes
addresses once.
"""

from collections.abc import Sequence
from itertools import compress

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._device import Walk, ordered_sum, table, tile_address, tile_place, tile_turns

WARPS = 4
# Elements of a tile: 8 for each of 128 threads. A thread keeps a number and a sum for each of them and each map, so
# with more maps it takes fewer: more would spill registers.
TILES = ((4, 1024), (10, 512), (24, 256))
PROGRAMS = 2048
FINISH_BLOCK = 1024


@triton.jit
def _load(pointer, strides, INDEX: tl.constexpr, place):
    """Tile of map INDEX in float32, 0 outside."""
    at = tile_address(pointer, strides[INDEX % len(strides)], place[0], place[1], place[2])
    return tl.load(at, place[3], other=0).to(tl.float32)


@triton.jit
def _residual(maps, weights, weight_stride, target, strides, place):
    """sum_n w_n F_n - G."""
    total = tl.load(weights).to(tl.float32) * _load(maps[0], strides, 0, place)
    for n in tl.static_range(1, len(maps)):
        total += tl.load(weights + n * weight_stride).to(tl.float32) * _load(maps[n], strides, n, place)
    return total - _load(target, strides, len(maps), place)


@triton.jit
def _none_yet(maps, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    found = ()
    for _ in tl.static_range(len(maps)):
        found += (tl.zeros((BLOCK_C, BLOCK_N), tl.float32),)
    return found


@triton.jit
def _add_products(sums, residual, maps, strides, place):
    """The sums, one for each map, with residual times map added; the compiler loads each map once."""
    found = ()
    for n in tl.static_range(len(maps)):
        found += (sums[n] + residual * _load(maps[n], strides, n, place),)
    return found


@triton.jit
def aggregate_distance_fwd_sum_kernel(
    maps, weights, weight_stride, target, strides, extent, partial,
    DOTS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of the squared residual and, with DOTS, of the residual times each map."""
    squares = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    dots = _none_yet(maps, BLOCK_C, BLOCK_N)
    for turn in range(0, tile_turns(extent, BLOCK_C, BLOCK_N)):
        place = tile_place(turn, extent, BLOCK_C, BLOCK_N)
        residual = _residual(maps, weights, weight_stride, target, strides, place)
        squares += residual * residual
        if DOTS:
            dots = _add_products(dots, residual, maps, strides, place)
    tl.store(partial + tl.program_id(0), tl.sum(squares))
    if DOTS:
        for n in tl.static_range(len(maps)):
            tl.store(partial + (n + 1) * tl.num_programs(0) + tl.program_id(0), tl.sum(dots[n]))


@triton.jit
def aggregate_distance_fwd_finish_kernel(partial, distance, dots, count, scale, BLOCK: tl.constexpr):
    """Add the partial sums in a fixed order: block 0 those of the distance, block n those of dot product n - 1."""
    which = tl.program_id(0)
    total = ordered_sum(partial + which * count, count, BLOCK)
    if which == 0:
        tl.store(distance, total * scale)
    else:
        tl.store(dots + which - 1, total)


@triton.jit
def aggregate_distance_bwd_kernel(
    gradient, maps, weights, weight_stride, target, strides, dots, weight_gradient, target_gradient, map_gradients,
    extent, scale,
    WANTED_WEIGHTS: tl.constexpr, WANTED_TARGET: tl.constexpr, WANTED_MAPS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """All gradients that are wanted; bit n of WANTED_MAPS asks for that of map n."""
    N: tl.constexpr = len(maps)
    slope = 2 * scale * tl.load(gradient)
    if WANTED_WEIGHTS and tl.program_id(0) == 0:
        for n in tl.static_range(N):
            tl.store(weight_gradient + n, slope * tl.load(dots + n))
    if WANTED_TARGET or WANTED_MAPS:
        for turn in range(0, tile_turns(extent, BLOCK_C, BLOCK_N)):
            place = tile_place(turn, extent, BLOCK_C, BLOCK_N)
            change = slope * _residual(maps, weights, weight_stride, target, strides, place)
            if WANTED_TARGET:
                at = tile_address(
                    target_gradient, strides[(2 * N + 1) % len(strides)], place[0], place[1], place[2]
                )  # fmt: skip
                tl.store(at, -change, place[3])
            for n in tl.static_range(N):
                if (WANTED_MAPS >> n) & 1:
                    at = tile_address(
                        map_gradients[n], strides[(N + 1 + n) % len(strides)], place[0], place[1], place[2]
                    )  # fmt: skip
                    tl.store(at, tl.load(weights + n * weight_stride).to(tl.float32) * change, place[3])


def _walk(maps: Sequence[Tensor], others: Sequence[Tensor]) -> tuple[Walk, dict]:
    """The walk over all of them, and what both kernels take of it."""
    tile = next(size for most, size in TILES if len(maps) <= most)
    walk = Walk([(*maps, *others)], tile, PROGRAMS)
    options = {
        "strides": table(walk.strides((*maps, *others))),
        "extent": walk.extents[0],
        **walk.blocks(),
        "num_warps": WARPS,
    }
    return walk, options


def forward(
    maps: Sequence[Tensor], weights: Tensor, target: Tensor, with_dots: bool, reduction: str
) -> tuple[Tensor, Tensor]:
    """The distance, and if asked the dot products [N] of the residual with each map; otherwise [0]."""
    walk, options = _walk(maps, [target])
    sums = 1 + len(maps) if with_dots else 1
    kept = {"dtype": torch.float32, "device": target.device}
    partial = torch.empty(sums, walk.grid[0], **kept)
    distance, dots = torch.empty((), **kept), torch.empty(sums - 1, **kept)
    count = walk.grid[0] if target.numel() else 0
    if count:
        aggregate_distance_fwd_sum_kernel[walk.grid](
            tuple(maps), weights, weights.stride(0), target, partial=partial, DOTS=with_dots, **options
        )
    # The mean over nothing is not a number.
    scale = 1.0 if reduction == "sum" else 1 / target.numel() if count else float("nan")
    aggregate_distance_fwd_finish_kernel[(sums,)](partial, distance, dots, count, scale, BLOCK=FINISH_BLOCK)
    return distance, dots


def backward(
    gradient: Tensor,
    maps: Sequence[Tensor],
    weights: Tensor,
    target: Tensor,
    dots: Tensor,
    wanted: Sequence[bool],
    reduction: str,
) -> list[Tensor]:
    """Gradients of those of (weights, target, *maps) that are wanted; one launch."""
    tensors = (weights, target, *maps)
    # An unwanted gradient's place in the table is taken by its tensor, which is not written to.
    places = [torch.empty_like(x) if asked else x for x, asked in zip(tensors, wanted, strict=True)]
    walk, options = _walk(maps, (target, *places[2:], places[1]))
    aggregate_distance_bwd_kernel[walk.grid if any(wanted[1:]) else (1,)](
        gradient, tuple(maps), weights, weights.stride(0), target, dots=dots,
        weight_gradient=places[0], target_gradient=places[1], map_gradients=tuple(places[2:]),
        scale=1 / max(target.numel(), 1) if reduction == "mean" else 1.0,
        WANTED_WEIGHTS=wanted[0], WANTED_TARGET=wanted[1],
        WANTED_MAPS=sum(asked << n for n, asked in enumerate(wanted[2:])), **options,
    )  # fmt: skip
    return list(compress(places, wanted))
