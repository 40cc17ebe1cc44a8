"""Triton kernels of the joint form: feature and attention distance from one read of the maps.

A block takes some positions of a sample and walks over all channels, so that the attention at its positions is complete
when it ends; on the way each of its tiles leaves the sums of `triton_sums`.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels import _triton
from fastfuse.kernels._device import divide, pick, pick_pointer, table
from fastfuse.kernels._limits import check_count, grid
from fastfuse.kernels.attention_mse.triton_maps import LONG_SIDE, compare_maps, map_gradient, tile_sides
from fastfuse.kernels.normalized_lp.layout import gradient_like
from fastfuse.kernels.normalized_lp.triton_sums import (
    combine,
    distance_slope,
    map_slope,
    normalized_lp_fwd_reduce_kernel,
    norms,
    store_distance,
    store_squares,
)

# 16 elements of each map for each of 128 threads: in bf16 four 16-byte loads in flight per thread. Larger tiles with as
# many elements a thread spill 8 bytes on sm_80.
TILE = 2048
WARPS = 4
# Registers a thread of the backward in float32: left alone, the assembler takes 96 and spills 8 bytes (triton 3.6).
BACKWARD_REGISTERS = 128
COMBINE_BLOCK = 128
MAP_BLOCK = 1024
REDUCE_BLOCK = 1024


@triton.jit
def _offsets(layout, pair, sample, channel, position):
    """Where a tile lies, in elements from the start of a map."""
    start = sample * pick(layout[0], pair)
    return start + ((channel * pick(layout[1], pair))[:, None] + (position * pick(layout[2], pair))[None, :])


@triton.jit
def _tile(x, x_layout, y, y_layout, pair, sample, channel, channels, position, inside):
    """The elements of one tile of a pair's maps in fp32, 0 outside."""
    mask = (channel < channels)[:, None] & inside[None, :]
    a = tl.load(pick_pointer(x, pair) + _offsets(x_layout, pair, sample, channel, position), mask=mask, other=0)
    b = tl.load(pick_pointer(y, pair) + _offsets(y_layout, pair, sample, channel, position), mask=mask, other=0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _first_tile(extents, pair, sample, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """The place of a sample's first tile among all tiles, how many it has, and how many lie at the same positions."""
    deep = tl.cdiv(pick(extents[1], pair), BLOCK_C)
    tiles = tl.cdiv(pick(extents[2], pair), BLOCK_N) * deep
    return pick(extents[3], pair) + sample * tiles, tiles, deep


@triton.jit
def normalized_lp_fwd_joint_kernel(
    x, x_layout, y, y_layout, extents, partial, plane, maps, half,
    P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per sample and BLOCK_N positions: attention of both maps there, and the sums of its tiles."""
    sample, block, pair = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    channels, positions = pick(extents[1], pair), pick(extents[2], pair)
    if (sample < pick(extents[0], pair)) & (block * BLOCK_N < positions):
        position = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = position < positions
        first, _, deep = _first_tile(extents, pair, sample, BLOCK_C, BLOCK_N)
        place = partial + first + block * deep
        x_squares, y_squares = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        for step in range(0, deep):
            channel = step * BLOCK_C + tl.arange(0, BLOCK_C)
            a, b = _tile(x, x_layout, y, y_layout, pair, sample, channel, channels, position, inside)
            a_square, b_square = tl.sum(a * a, 0), tl.sum(b * b, 0)
            x_squares += a_square
            y_squares += b_square
            product = tl.sum(tl.sum(a * b, 0))
            store_squares(place + step, plane, a, b, tl.sum(a_square), tl.sum(b_square), product, P)
        own = maps + pick(extents[4], pair) + sample * positions + position
        tl.store(own, divide(x_squares, channels), mask=inside)
        tl.store(own + half, divide(y_squares, channels), mask=inside)


@triton.jit
def normalized_lp_fwd_joint_distance_kernel(
    x, x_layout, y, y_layout, extents, partial, plane,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same blocks and tiles again, p = 1: sums of |e|, sign(e) xh and -sign(e) yh with e = xh - yh."""
    sample, block, pair = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    channels, positions = pick(extents[1], pair), pick(extents[2], pair)
    if (sample < pick(extents[0], pair)) & (block * BLOCK_N < positions):
        position = block * BLOCK_N + tl.arange(0, BLOCK_N)
        first, tiles, deep = _first_tile(extents, pair, sample, BLOCK_C, BLOCK_N)
        x_norm, y_norm = norms(partial + first, plane, tiles, BLOCK)
        for step in range(0, deep):
            channel = step * BLOCK_C + tl.arange(0, BLOCK_C)
            a, b = _tile(x, x_layout, y, y_layout, pair, sample, channel, channels, position, position < positions)
            store_distance(partial + first + block * deep + step, plane, a, b, x_norm, y_norm)


@triton.jit
def normalized_lp_fwd_joint_combine_kernel(
    extents, partial, plane, maps, half, features, attentions, stats, row,
    P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr, MAP_BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per sample and pair: its two losses, and what the backward needs of either."""
    sample, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if sample < pick(extents[0], pair):
        channels, positions = pick(extents[1], pair), pick(extents[2], pair)
        first, tiles, _ = _first_tile(extents, pair, sample, BLOCK_C, BLOCK_N)
        place, step = pair * row + sample, tl.num_programs(1) * row
        combine(
            partial + first, plane, tiles, channels * positions, features + place, stats + place, step, P, BLOCK
        )  # fmt: skip
        own = maps + pick(extents[4], pair) + sample * positions
        x_square, y_square = tl.zeros((MAP_BLOCK,), tl.float32), tl.zeros((MAP_BLOCK,), tl.float32)
        for start in range(0, positions, MAP_BLOCK):
            position = start + tl.arange(0, MAP_BLOCK)
            a = tl.load(own + position, mask=position < positions, other=0)
            b = tl.load(own + half + position, mask=position < positions, other=0)
            x_square += a * a
            y_square += b * b
        loss, found = attentions + place, stats + 6 * step + place
        compare_maps(own, own + half, positions, x_square, y_square, loss, found, step, MAP_BLOCK)


@triton.jit
def _attention_slope(
    cotangent, strides, maps, half, stats, plane, row, extents, item, side, sample, position, MEAN: tl.constexpr
):
    """What a map is multiplied by at some positions to give its gradient through its attention."""
    batch, channels, positions = pick(extents[0], item), pick(extents[1], item), pick(extents[2], item)
    start = pick(extents[3], item) + sample * positions
    slope = map_gradient(
        cotangent, strides, maps, half, stats + 6 * plane, plane, row, pick(extents[4], item), side, sample, start,
        position, positions,
    )  # fmt: skip
    if MEAN:
        slope = divide(slope, batch)
    return divide(slope * 2, channels)


@triton.jit
def normalized_lp_bwd_joint_kernel(
    cotangents, cotangent_strides, stats, plane, row, maps, half,
    x, x_layout, y, y_layout, dx, dx_layout, dy, dy_layout, extents,
    P: tl.constexpr, MEAN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per sample and BLOCK_N positions: both losses' gradients, added in registers."""
    sample, block, item = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, channels, positions = pick(extents[0], item), pick(extents[1], item), pick(extents[2], item)
    if (sample < batch) & (block * BLOCK_N < positions):
        position = block * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = position < positions
        pair = pick(extents[4], item)
        x_slope = _attention_slope(
            cotangents[1], cotangent_strides[1], maps, half, stats, plane, row, extents, item, 0, sample, position, MEAN
        )
        y_slope = _attention_slope(
            cotangents[1], cotangent_strides[1], maps, half, stats, plane, row, extents, item, 1, sample, position, MEAN
        )
        strides = cotangent_strides[0]
        upstream = tl.load(cotangents[0] + pair * strides[0] + sample * strides[1])
        upstream = divide(upstream, channels * positions)
        if MEAN:
            upstream = divide(upstream, batch)
        place = stats + pair * row + sample
        for first in range(0, channels, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            mask = (channel < channels)[:, None] & inside[None, :]
            a, b = _tile(x, x_layout, y, y_layout, item, sample, channel, channels, position, inside)
            g = distance_slope(place, plane, a, b, P)
            if pick(extents[5], item):
                gradient = map_slope(place, plane, a, g, upstream, P, 0) + x_slope[None, :] * a
                to = pick_pointer(dx, item) + _offsets(dx_layout, item, sample, channel, position)
                tl.store(to, gradient, mask=mask)
            if pick(extents[6], item):
                gradient = map_slope(place, plane, b, g, upstream, P, 1) + y_slope[None, :] * b
                to = pick_pointer(dy, item) + _offsets(dy_layout, item, sample, channel, position)
                tl.store(to, gradient, mask=mask)


class _Launch:
    """Geometry of the launches over pairs: extents, tables of strides, tile and grid."""

    def __init__(self, name: str, *columns: Sequence[Tensor]) -> None:
        """Each column holds one tensor of every pair: x, y and, backward, their gradients."""
        own = _triton.launch_constants(name, columns[0][0], TILE=TILE, WARPS=WARPS, LONG_SIDE=LONG_SIDE)
        shapes = [x.shape for x in columns[0]]
        self.batches, self.channels = [shape[0] for shape in shapes], [shape[1] for shape in shapes]
        self.positions = [shape[2] * shape[3] for shape in shapes]
        self.warps = own.WARPS
        self.sides = tile_sides([x for column in columns for x in column], own.TILE, own.LONG_SIDE)
        self.layouts = [
            tuple(table(values) for values in zip(*(_triton.map_strides(x)[1:] for x in column), strict=True))
            for column in columns
        ]
        blocks = [triton.cdiv(n, self.sides["BLOCK_N"]) for n in self.positions]
        deep = [triton.cdiv(c, self.sides["BLOCK_C"]) for c in self.channels]
        self.tiles = [b * n * d for b, n, d in zip(self.batches, blocks, deep, strict=True)]
        check_count("inputs", columns[0][0], "partial sums", 5 * sum(self.tiles))
        check_count("inputs", columns[0][0], "statistics", 10 * len(shapes) * max(self.batches))
        self.grid = grid("inputs", columns[0][0], max(self.batches), max(blocks), len(shapes))

    def extents(self, *columns: Sequence[int]) -> tuple:
        """Tables of batch, channels and positions, and of further numbers of every pair."""
        return tuple(table(values) for values in (self.batches, self.channels, self.positions, *columns))


def forward(
    inputs: Sequence[Tensor], targets: Sequence[Tensor], p: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both losses [P] or [P, B], attention maps [2, sum of B H W], stats [10, P, B]: features' six, maps' four.

    Three launches; p = 1: one more, "none": one less.
    """
    launch = _Launch("normalized_lp_joint_fwd", inputs, targets)
    row, blocks, pairs = launch.grid
    sizes = [b * n for b, n in zip(launch.batches, launch.positions, strict=True)]
    starts = ([0, *accumulate(values)][:-1] for values in (launch.tiles, sizes))
    extents, plane, half = launch.extents(*starts), sum(launch.tiles), sum(sizes)
    empty = inputs[0].new_empty
    partial, maps = empty((5, plane), dtype=torch.float32), empty((2, half), dtype=torch.float32)
    stats = empty((10, pairs, row), dtype=torch.float32)
    per_sample = tuple(empty((pairs, row), dtype=torch.float32) for _ in range(2))
    tensors = tuple(inputs), launch.layouts[0], tuple(targets), launch.layouts[1], extents, partial, plane
    if row and blocks:
        normalized_lp_fwd_joint_kernel[launch.grid](*tensors, maps, half, p, **launch.sides, num_warps=launch.warps)
        if p == 1 and plane:
            normalized_lp_fwd_joint_distance_kernel[launch.grid](
                *tensors, COMBINE_BLOCK, **launch.sides, num_warps=launch.warps
            )  # fmt: skip
    if row:
        normalized_lp_fwd_joint_combine_kernel[(row, pairs)](
            extents, partial, plane, maps, half, *per_sample, stats, row, p, **launch.sides,
            BLOCK=COMBINE_BLOCK, MAP_BLOCK=min(MAP_BLOCK, triton.next_power_of_2(max(*launch.positions, 1))),
        )  # fmt: skip
    if reduction == "none":
        return *per_sample, maps, stats
    losses = tuple(empty((pairs,), dtype=torch.float32) for _ in range(2))
    normalized_lp_fwd_reduce_kernel[(pairs, 2)](
        per_sample, row, table(launch.batches), losses, MEAN=reduction == "mean", BLOCK=REDUCE_BLOCK
    )
    return *losses, maps, stats


def backward(
    feature_cotangent: Tensor,
    attention_cotangent: Tensor,
    maps: Tensor,
    stats: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    pairs: Sequence[int],
    starts: Sequence[int],
    wanted: Sequence[bool],
    p: int,
    reduction: str,
) -> list[Tensor]:
    """Gradients of those of (*inputs, *targets) that are wanted; the inputs' pairs are counted as in the forward.

    One launch: the maps are read once.
    """
    tensors = (*inputs, *targets)
    # An unwanted gradient's place in the table is taken by its map, which is not written to.
    places = [gradient_like(x) if asked else x for x, asked in zip(tensors, wanted, strict=True)]
    count, row = len(inputs), stats.shape[2]
    columns = tuple(inputs), tuple(targets), tuple(places[:count]), tuple(places[count:])
    launch = _Launch("normalized_lp_joint_bwd", *columns)
    flags = ([int(asked) for asked in side] for side in (wanted[:count], wanted[count:]))
    cotangents = feature_cotangent, attention_cotangent
    limit = {"maxnreg": BACKWARD_REGISTERS} if tensors[0].dtype == torch.float32 else {}
    if launch.grid[0] and launch.grid[1] and any(launch.tiles):
        normalized_lp_bwd_joint_kernel[launch.grid](
            cotangents, tuple((x.stride(0), x.stride(1) if reduction == "none" else 0) for x in cotangents),
            stats, stats.shape[1] * row, row, maps, maps.shape[1],
            *(x for column in zip(columns, launch.layouts, strict=True) for x in column),
            launch.extents(starts, pairs, *flags), p, reduction == "mean", **launch.sides, num_warps=launch.warps,
            **limit,
        )  # fmt: skip
    return [x for x, asked in zip(places, wanted, strict=True) if asked]
