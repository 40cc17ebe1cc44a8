"""Triton kernels of normalized_lp: partial sums over tiles of a sample, combined per sample and then over samples.

p = 2 reads the maps once. p = 1 reads them twice: its distance cannot be taken before the norms are known.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._device import divide, pick, pick_pointer, table
from fastfuse.kernels._limits import check_count, check_span, grid
from fastfuse.kernels._triton import launch_constants
from fastfuse.kernels.normalized_lp.layout import gradient_like, rows
from fastfuse.kernels.normalized_lp.triton_sums import (
    combine,
    distance_slope,
    map_slope,
    normalized_lp_fwd_reduce_kernel,
    norms,
    store_distance,
    store_squares,
)

# 32 elements of each map for each of 128 threads: in bf16 eight 16-byte loads in flight per thread.
TILE = 4096
WARPS = 4
COMBINE_BLOCK = 128
REDUCE_BLOCK = 1024


@triton.jit
def _places(layout, row, pair, sample, element, FLAT: tl.constexpr):
    """Where some elements of a sample lie, in elements from the start of a tensor."""
    start = sample * pick(layout[0], pair)
    if FLAT:
        return start + element
    else:
        return start + element // row * pick(layout[1], pair) + element % row * pick(layout[2], pair)


@triton.jit
def _tile(x, x_layout, y, y_layout, extents, pair, sample, tile, FLAT: tl.constexpr, TILE: tl.constexpr):
    """The elements of one tile of a pair's maps in fp32, 0 outside."""
    element = tile * TILE + tl.arange(0, TILE)
    inside = element < pick(extents[1], pair)
    row = pick(extents[3], pair)
    a = tl.load(pick_pointer(x, pair) + _places(x_layout, row, pair, sample, element, FLAT), mask=inside, other=0)
    b = tl.load(pick_pointer(y, pair) + _places(y_layout, row, pair, sample, element, FLAT), mask=inside, other=0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _first_tile(extents, pair, sample, TILE: tl.constexpr):
    """The place of a sample's first tile among all tiles, and how many it has."""
    tiles = tl.cdiv(pick(extents[1], pair), TILE)
    return pick(extents[2], pair) + sample * tiles, tiles


@triton.jit
def normalized_lp_fwd_tile_kernel(
    x, x_layout, y, y_layout, extents, partial, plane, P: tl.constexpr, FLAT: tl.constexpr, TILE: tl.constexpr
):
    """One program per tile: |x|^2, |y|^2; for p = 2 also r, |x - r y|^2 and (x - r y).y with r = x.y / |y|^2."""
    sample, tile, pair = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first, tiles = _first_tile(extents, pair, sample, TILE)
    if (sample < pick(extents[0], pair)) & (tile < tiles):
        a, b = _tile(x, x_layout, y, y_layout, extents, pair, sample, tile, FLAT, TILE)
        store_squares(partial + first + tile, plane, a, b, tl.sum(a * a), tl.sum(b * b), tl.sum(a * b), P)


@triton.jit
def normalized_lp_fwd_distance_kernel(
    x, x_layout, y, y_layout, extents, partial, plane, FLAT: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per tile, p = 1: sums of |e|, sign(e) xh and -sign(e) yh with e = xh - yh."""
    sample, tile, pair = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    first, tiles = _first_tile(extents, pair, sample, TILE)
    if (sample < pick(extents[0], pair)) & (tile < tiles):
        x_norm, y_norm = norms(partial + first, plane, tiles, BLOCK)
        a, b = _tile(x, x_layout, y, y_layout, extents, pair, sample, tile, FLAT, TILE)
        store_distance(partial + first + tile, plane, a, b, x_norm, y_norm)


@triton.jit
def normalized_lp_fwd_combine_kernel(
    extents, partial, plane, losses, stats, row, P: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """One program per sample and pair, in fp64: its loss, norms, their ratio, xh.g and -yh.g with g = e or sign(e)."""
    sample, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if sample < pick(extents[0], pair):
        first, tiles = _first_tile(extents, pair, sample, TILE)
        place = pair * row + sample
        step = tl.num_programs(1) * row
        combine(partial + first, plane, tiles, pick(extents[1], pair), losses + place, stats + place, step, P, BLOCK)


@triton.jit
def normalized_lp_bwd_kernel(
    cotangent, cotangent_strides, stats, plane, row, x, x_layout, y, y_layout, dx, dx_layout, dy, dy_layout,
    extents, P: tl.constexpr, MEAN: tl.constexpr, FLAT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One program per tile: dx = (g - (xh.g) xh) / |x| and dy likewise with -g, where g = 2 e or sign(e), over B M."""
    sample, tile, item = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, elements = pick(extents[0], item), pick(extents[1], item)
    if (sample < batch) & (tile * TILE < elements):
        pair = pick(extents[4], item)
        place = stats + pair * row + sample
        a, b = _tile(x, x_layout, y, y_layout, extents, item, sample, tile, FLAT, TILE)
        g = distance_slope(place, plane, a, b, P)
        slope = divide(tl.load(cotangent + pair * cotangent_strides[0] + sample * cotangent_strides[1]), elements)
        if MEAN:
            slope = divide(slope, batch)
        element = tile * TILE + tl.arange(0, TILE)
        if pick(extents[5], item):
            to = _places(dx_layout, pick(extents[3], item), item, sample, element, FLAT)
            gradient = map_slope(place, plane, a, g, slope, P, 0)
            tl.store(pick_pointer(dx, item) + to, gradient, mask=element < elements)
        if pick(extents[6], item):
            to = _places(dy_layout, pick(extents[3], item), item, sample, element, FLAT)
            gradient = map_slope(place, plane, b, g, slope, P, 1)
            tl.store(pick_pointer(dy, item) + to, gradient, mask=element < elements)


class _Launch:
    """Geometry of the launches over pairs: tables of extents and strides, tile and grid."""

    def __init__(self, name: str, *columns: Sequence[Tensor]) -> None:
        """Each column holds one tensor of every pair: x, y and, backward, their gradients."""
        for column in columns:
            for x in column:
                check_span(x)
        own = launch_constants(name, columns[0][0], TILE=TILE, WARPS=WARPS)
        shapes = [x.shape for x in columns[0]]
        self.batches = [shape[0] for shape in shapes]
        self.elements = [shape[1:].numel() for shape in shapes]
        self.warps, self.tile = own.WARPS, min(own.TILE, triton.next_power_of_2(max(*self.elements, 1)))
        tiles = [triton.cdiv(elements, self.tile) for elements in self.elements]
        starts = list(accumulate((b * n for b, n in zip(self.batches, tiles, strict=True)), initial=0))
        self.plane = starts.pop()
        check_count("inputs", columns[0][0], "partial sums", 5 * self.plane)
        check_count("inputs", columns[0][0], "statistics", 6 * len(shapes) * max(self.batches))
        lines, addresses = zip(*(rows(pair) for pair in zip(*columns, strict=True)), strict=True)
        self.flat = all(strides.flat for pair in addresses for strides in pair)
        self.extents = tuple(table(values) for values in (self.batches, self.elements, starts, lines))
        self.layouts = [
            tuple(table(values) for values in zip(*(strides[:3] for strides in column), strict=True))
            for column in zip(*addresses, strict=True)
        ]
        self.grid = grid("inputs", columns[0][0], max(self.batches), max(tiles), len(shapes))

    def options(self) -> dict[str, int]:
        return {"FLAT": self.flat, "TILE": self.tile, "num_warps": self.warps}


def forward(inputs: Sequence[Tensor], targets: Sequence[Tensor], p: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Losses [P] or [P, B], stats [6, P, B]: norms, dots, ratios. Three launches; p = 1: one more, "none": one less."""
    launch = _Launch("normalized_lp_fwd", inputs, targets)
    row, _, pairs = launch.grid
    partial = inputs[0].new_empty((5, launch.plane), dtype=torch.float32)
    stats = inputs[0].new_empty((6, pairs, row), dtype=torch.float32)
    per_sample = inputs[0].new_empty((pairs, row), dtype=torch.float32)
    maps = tuple(inputs), launch.layouts[0], tuple(targets), launch.layouts[1], launch.extents
    if launch.plane:
        normalized_lp_fwd_tile_kernel[launch.grid](*maps, partial, launch.plane, p, **launch.options())
        if p == 1:
            normalized_lp_fwd_distance_kernel[launch.grid](
                *maps, partial, launch.plane, BLOCK=COMBINE_BLOCK, **launch.options()
            )  # fmt: skip
    if row:
        normalized_lp_fwd_combine_kernel[(row, pairs)](
            launch.extents, partial, launch.plane, per_sample, stats, row,
            P=p, TILE=launch.tile, BLOCK=COMBINE_BLOCK, num_warps=WARPS,
        )  # fmt: skip
    if reduction == "none":
        return per_sample, stats
    losses = inputs[0].new_empty((pairs,), dtype=torch.float32)
    normalized_lp_fwd_reduce_kernel[(pairs, 1)](
        (per_sample,), row, launch.extents[0], (losses,), MEAN=reduction == "mean", BLOCK=REDUCE_BLOCK
    )  # fmt: skip
    return losses, stats


def backward(
    cotangent: Tensor,
    stats: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    pairs: Sequence[int],
    wanted: Sequence[bool],
    p: int,
    reduction: str,
) -> list[Tensor]:
    """Gradients of those of (*inputs, *targets) that are wanted; the inputs' pairs are counted as in the forward.

    One launch: the maps are read once.
    """
    maps = (*inputs, *targets)
    # An unwanted gradient's place in the table is taken by its map, which is not written to.
    places = [gradient_like(x) if asked else x for x, asked in zip(maps, wanted, strict=True)]
    count, row = len(inputs), stats.shape[2]
    columns = tuple(inputs), tuple(targets), tuple(places[:count]), tuple(places[count:])
    launch = _Launch("normalized_lp_bwd", *columns)
    flags = (table([int(asked) for asked in side]) for side in (wanted[:count], wanted[count:]))
    if launch.plane:
        normalized_lp_bwd_kernel[launch.grid](
            cotangent, (cotangent.stride(0), cotangent.stride(1) if reduction == "none" else 0),
            stats, stats.shape[1] * row, row,
            *(x for column in zip(columns, launch.layouts, strict=True) for x in column),
            (*launch.extents, table(pairs), *flags), p, reduction == "mean", **launch.options(),
        )  # fmt: skip
    return [x for x, asked in zip(places, wanted, strict=True) if asked]
