"""Triton kernels of attention_mse: one launch for all pairs and samples, a second, small one adds the samples."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels import _triton
from fastfuse.kernels._device import divide, pick, pick_pointer, sum_of_samples, table
from fastfuse.kernels._limits import check_count, grid
from fastfuse.kernels._triton import launch_constants, map_like
from fastfuse.kernels.attention_mse.triton_maps import (
    LONG_SIDE,
    TILE,
    WARPS,
    compare_maps,
    map_gradient,
    rescale,
    square_sum,
    tile_sides,
)

REDUCE_BLOCK = 1024
# In place of a channel count: the map is an attention map already.
READY = -1
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _attention(
    maps, layout, pair, sample, position, inside,
    FEATURE: tl.constexpr, READY_MAP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of one sample of one pair at BLOCK_N positions, computed or ready; 0 outside the map."""
    channels, stride_c, stride_n = pick(layout[0], pair), pick(layout[2], pair), pick(layout[3], pair)
    start = pick_pointer(maps, pair)
    offset = sample * pick(layout[1], pair)
    if channels < 0:
        ready = start.to(tl.pointer_type(READY_MAP)) + offset
        attention = tl.load(ready + position * stride_n, mask=inside, other=0).to(tl.float32)
    else:
        feature = start.to(tl.pointer_type(FEATURE)) + offset
        squares = square_sum(feature, stride_c, stride_n, channels, position, inside, BLOCK_C, BLOCK_N)
        attention = divide(squares, channels)
    return attention


@triton.jit
def attention_mse_fwd_pair_kernel(
    inputs, input_layout, targets, target_layout, extents, maps, half, stats, losses, row,
    INPUT: tl.constexpr, READY_INPUT: tl.constexpr, TARGET: tl.constexpr, READY_TARGET: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per sample and pair: both attention maps, their norms, then the distance between them."""
    sample, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, positions = pick(extents[0], pair), pick(extents[1], pair)
    if sample < batch:
        own = maps + pick(extents[2], pair) + sample * positions
        goal = own + half
        a_square, t_square = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
        for first in range(0, positions, BLOCK_N):
            position = first + tl.arange(0, BLOCK_N)
            inside = position < positions
            a = _attention(inputs, input_layout, pair, sample, position, inside, INPUT, READY_INPUT, BLOCK_C, BLOCK_N)
            t = _attention(
                targets, target_layout, pair, sample, position, inside, TARGET, READY_TARGET, BLOCK_C, BLOCK_N
            )
            a_square += a * a
            t_square += t * t
            tl.store(own + position, a, mask=inside)
            tl.store(goal + position, t, mask=inside)
        # The maps come back from memory, perhaps to other threads of the block than those that wrote them.
        tl.debug_barrier()
        place, plane = pair * row + sample, tl.num_programs(1) * row
        compare_maps(own, goal, positions, a_square, t_square, losses + place, stats + place, plane, BLOCK_N)


@triton.jit
def attention_mse_fwd_reduce_kernel(per_sample, row, batches, losses, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program per pair adds its samples in a fixed order."""
    pair = tl.program_id(0)
    tl.store(losses + pair, sum_of_samples(per_sample + pair * row, pick(batches, pair), MEAN, BLOCK))


@triton.jit
def attention_mse_bwd_kernel(
    cotangent, cotangent_strides, maps, half, stats, plane, row, wanted, layout, gradients, gradient_layout, extents,
    MEAN: tl.constexpr, FEATURE: tl.constexpr, READY_MAP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per sample, BLOCK_N positions and map that needs a gradient."""
    sample, item = tl.program_id(0).to(tl.int64), tl.program_id(2)
    batch, positions = pick(extents[0], item), pick(extents[1], item)
    first = tl.program_id(1) * BLOCK_N
    if (sample < batch) & (first < positions):
        position = first + tl.arange(0, BLOCK_N)
        inside = position < positions
        pair, side = pick(extents[3], item), pick(extents[4], item)
        start = pick(extents[2], item) + sample * positions
        slope = map_gradient(
            cotangent, cotangent_strides, maps, half, stats, plane, row, pair, side, sample, start, position, positions
        )
        if MEAN:
            slope = divide(slope, batch)
        channels = pick(layout[0], item)
        gradient = pick_pointer(gradients, item)
        stride_c, stride_n = pick(gradient_layout[2], item), pick(gradient_layout[3], item)
        offset = sample * pick(gradient_layout[1], item)
        if channels < 0:
            tl.store(gradient.to(tl.pointer_type(READY_MAP)) + offset + position * stride_n, slope, mask=inside)
        else:
            feature = pick_pointer(wanted, item).to(tl.pointer_type(FEATURE)) + sample * pick(layout[1], item)
            rescale(
                feature, pick(layout[2], item), pick(layout[3], item),
                gradient.to(tl.pointer_type(FEATURE)) + offset, stride_c, stride_n,
                divide(slope * 2, channels), channels, position, inside, BLOCK_C,
            )  # fmt: skip


def _layout(maps: Sequence[Tensor]) -> tuple[tuple, ...]:
    """Tables of channels and of the strides of sample, channel and position."""
    rows = [(x.shape[1] if x.dim() == 4 else READY, *_triton.map_strides(x)[1:]) for x in maps]
    return tuple(table(values) for values in zip(*rows, strict=True))


def _types(maps: Sequence[Tensor]) -> tuple[tl.dtype, tl.dtype]:
    """Types of the feature maps and of the ready maps among them; any where there are none."""
    return tuple(next((TYPES[x.dtype] for x in maps if x.dim() == dim), tl.float32) for dim in (4, 3))


def forward(inputs: Sequence[Tensor], targets: Sequence[Tensor], reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [P] or [P, B], attention maps [2, sum of B H W], stats [4, P, B]: norms and dots for the backward."""
    pairs, batches = len(inputs), [x.shape[0] for x in inputs]
    positions = [x.shape[-2] * x.shape[-1] for x in inputs]
    starts = [0, *accumulate(b * n for b, n in zip(batches, positions, strict=True))]
    row = max(batches)
    check_count("inputs", inputs[0], "statistics", 4 * pairs * row)
    maps = inputs[0].new_empty((2, starts[-1]), dtype=torch.float32)
    stats = inputs[0].new_empty((4, pairs, row), dtype=torch.float32)
    per_sample = inputs[0].new_empty((pairs, row), dtype=torch.float32)
    own = launch_constants("attention_mse_fwd", inputs[0], TILE=TILE, WARPS=WARPS, LONG_SIDE=LONG_SIDE)
    if row:
        attention_mse_fwd_pair_kernel[(row, pairs)](
            tuple(inputs), _layout(inputs), tuple(targets), _layout(targets),
            (table(batches), table(positions), table(starts[:-1])), maps, starts[-1], stats, per_sample, row,
            *_types(inputs), *_types(targets), **tile_sides((*inputs, *targets), own.TILE, own.LONG_SIDE),
            num_warps=own.WARPS,
        )  # fmt: skip
    if reduction == "none":
        return per_sample, maps, stats
    losses = inputs[0].new_empty((pairs,), dtype=torch.float32)
    attention_mse_fwd_reduce_kernel[(pairs,)](
        per_sample, row, table(batches), losses, MEAN=reduction == "mean", BLOCK=REDUCE_BLOCK
    )
    return losses, maps, stats


def backward(
    cotangent: Tensor,
    maps: Tensor,
    stats: Tensor,
    wanted: Sequence[Tensor],
    places: Sequence[int],
    starts: Sequence[int],
    reduction: str,
) -> list[Tensor]:
    """Gradients of the wanted ones of (*inputs, *targets), which stand at `places` among them.

    One launch; two where the inputs' maps and the targets' maps differ in dtype.
    """
    gradients = [map_like(x) for x in wanted]
    pairs = stats.shape[1]
    items = list(zip(wanted, gradients, places, starts, strict=True))
    sides = [[item for item in items if item[2] // pairs == side] for side in (0, 1)]
    mixed = any(len({x.dtype for x in wanted if x.dim() == dim}) > 1 for dim in (3, 4))
    for group in sides if mixed else [items]:
        _backward_launch(cotangent, maps, stats, *zip(*group, strict=True), reduction)
    return gradients


def _backward_launch(
    cotangent: Tensor,
    maps: Tensor,
    stats: Tensor,
    wanted: Sequence[Tensor],
    gradients: Sequence[Tensor],
    places: Sequence[int],
    starts: Sequence[int],
    reduction: str,
) -> None:
    _, pairs, row = stats.shape
    batches, positions = [x.shape[0] for x in wanted], [x.shape[-2] * x.shape[-1] for x in wanted]
    extents = (batches, positions, starts, [i % pairs for i in places], [i // pairs for i in places])
    own = launch_constants("attention_mse_bwd", wanted[0], TILE=TILE, WARPS=WARPS, LONG_SIDE=LONG_SIDE)
    sides = tile_sides((*wanted, *gradients), own.TILE, own.LONG_SIDE)
    programs = max(batches), triton.cdiv(max(positions), sides["BLOCK_N"]), len(wanted)
    if programs[0] and programs[1]:
        attention_mse_bwd_kernel[grid("inputs or targets", wanted[0], *programs)](
            cotangent, (cotangent.stride(0), cotangent.stride(1) if reduction == "none" else 0),
            maps, maps.shape[1], stats, pairs * row, row, wanted, _layout(wanted), gradients, _layout(gradients),
            tuple(table(values) for values in extents), reduction == "mean", *_types(wanted), **sides,
            num_warps=own.WARPS,
        )  # fmt: skip
