"""Launchers of deep_to_shallow's Triton kernels, one stage at a time; README.md beside this file counts launches."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._triton import map_strides
from fastfuse.kernels.deep_to_shallow import outputs
from fastfuse.kernels.deep_to_shallow import triton_conv as conv
from fastfuse.kernels.deep_to_shallow import triton_norm as norm

# Rows, columns and depth of a program's matrix product. Exact float32 products run on the ordinary arithmetic units,
# whose operands live in registers: smaller tiles.
HALF_TILE, FLOAT_TILE = (64, 64, 32), (32, 32, 16)
HALF_STAGES, FLOAT_STAGES = 3, 2
WARP_ELEMENTS = 512  # of a product's accumulator; at twice as many Triton 3.6 spills registers
SMALLEST = 16  # side of a tile that tl.dot takes
PRECISION = "ieee"  # of float32 products
MAP_TILE = 2048  # elements that one program of an elementwise pass handles
MERGE_BLOCK = 1024  # partial sums read at once
WEIGHT_PROGRAMS = 528  # to fill an H200's 132 multiprocessors the sum over positions is split,
WEIGHT_STEPS = 8  # but not into less than so many blocks of positions each
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

Strides = tuple[int, int, int]


def launch_fwd(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    padding: Sequence[int],
    training: bool,
    keep: bool,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One launch on running statistics, three on batch statistics."""
    found = out, normed, mean, rstd = outputs.stage_outputs(x, weight, padding, keep, dtype)
    if out.numel() == 0:
        return found
    batch, channels, height, width = out.shape
    (x, *xs), (weight, *ws), (_, *strides) = map_strides(x), map_strides(weight), map_strides(out)
    tile, options = _product(dtype, channels, x.shape[1])
    grid = (triton.cdiv(batch * x.shape[2] * x.shape[3], tile[0]), triton.cdiv(channels, tile[1]), 4)
    tiles = 4 * grid[0]
    partial = mean.new_empty((2 * channels + 1) * tiles) if training else None
    conv.deep_to_shallow_fwd_phases_kernel[grid](
        x, weight, normed if keep else None, None if training else out, gamma, beta, running_mean, running_var,
        mean, rstd, partial, batch, *x.shape[2:], height, width, x.shape[1], channels, eps,
        tuple(xs), tuple(ws), tuple(strides), PRECISION, _rows_fast(xs), _rows_fast(strides), DTYPES[dtype],
        *tile, **options,
    )  # fmt: skip
    if training:
        positions = height * width
        norm.deep_to_shallow_fwd_statistics_kernel[(channels,)](
            partial, mean, rstd, running_mean, running_var, tiles, batch * positions, momentum, eps, MERGE_BLOCK
        )
        grid, blocks = _map_grid(out, strides)
        norm.deep_to_shallow_fwd_normalise_kernel[grid](
            normed, out, gamma, beta, mean, rstd, positions, channels, tuple(strides), *blocks
        )
    return found


def launch_bwd(
    grad: Tensor | None,
    carried: Tensor | None,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    kept: Tensor,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    keep: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Up to six launches: two for sums, one through the norm, two for the weight, one for the input."""
    found = outputs.stage_gradients(x, weight, gamma, beta, needed)
    grad_x, grad_weight, grad_gamma, grad_beta = found
    if kept.numel() == 0:
        return [g.zero_() for g in found if g is not None]
    kept, *strides = map_strides(kept)
    positions, channels = kept.shape[2] * kept.shape[3], kept.shape[1]
    grid, blocks = _map_grid(kept, strides)
    grad, *grad_strides = (None, 0, 0, 0) if grad is None else map_strides(grad)
    carried, *carried_strides = (None, 0, 0, 0) if carried is None else map_strides(carried)
    given = grad, carried, kept, gamma, beta, mean, rstd
    layouts = tuple(grad_strides), tuple(carried_strides), tuple(strides)
    sums = None
    if training or needed[2] or needed[3]:
        partial, sums = mean.new_empty(2 * channels * grid[0]), mean.new_empty(2 * channels)
        norm.deep_to_shallow_bwd_sums_kernel[grid](*given, partial, positions, channels, *layouts, keep, *blocks)
        norm.deep_to_shallow_bwd_merge_kernel[(channels,)](partial, sums, grad_gamma, grad_beta, grid[0], MERGE_BLOCK)
    if needed[0] or needed[1]:
        grad_map = torch.empty_like(kept)
        norm.deep_to_shallow_bwd_norm_kernel[grid](
            *given, sums if training else None, grad_map, positions, channels, kept.shape[0] * positions, *layouts,
            keep, *blocks,
        )  # fmt: skip
        if grad_weight is not None:
            _launch_weight(x, grad_map, tuple(strides), grad_weight)
        if grad_x is not None:
            _launch_input(grad_map, tuple(strides), weight, grad_x)
    return [g for g in found if g is not None]


def _launch_weight(x: Tensor, grad_map: Tensor, strides: Strides, grad_weight: Tensor) -> None:
    channels_in, channels_out = grad_weight.shape[:2]
    x, *xs = map_strides(x)
    _, *ws = map_strides(grad_weight)
    batch, _, height, width = x.shape
    tile, options = _product(grad_map.dtype, channels_out, batch * height * width, rows=channels_in)
    tiles = triton.cdiv(channels_in, tile[0]) * triton.cdiv(channels_out, tile[1])
    blocks = triton.cdiv(batch * height * width, tile[2])
    steps = max(WEIGHT_STEPS, triton.cdiv(blocks, triton.cdiv(WEIGHT_PROGRAMS, 9 * tiles)))
    splits = triton.cdiv(blocks, steps)
    partial = torch.empty(splits * grad_weight.numel(), dtype=torch.float32, device=x.device)
    conv.deep_to_shallow_bwd_weight_kernel[(tiles, 9, splits)](
        x, grad_map, partial, batch, height, width, *grad_map.shape[2:], channels_in, channels_out, steps,
        tuple(xs), strides, PRECISION, _rows_fast(xs), _rows_fast(strides), *tile, **options,
    )  # fmt: skip
    grid = (triton.cdiv(grad_weight.numel(), MERGE_BLOCK),)
    conv.deep_to_shallow_bwd_weight_merge_kernel[grid](
        partial, grad_weight, splits, channels_in, channels_out, tuple(ws), MERGE_BLOCK
    )


def _launch_input(grad_map: Tensor, strides: Strides, weight: Tensor, grad_x: Tensor) -> None:
    (weight, *ws), (_, *xs) = map_strides(weight), map_strides(grad_x)
    batch, channels, height, width = grad_x.shape
    tile, options = _product(grad_map.dtype, channels, weight.shape[1])
    grid = (triton.cdiv(batch * height * width, tile[0]), triton.cdiv(channels, tile[1]))
    conv.deep_to_shallow_bwd_input_kernel[grid](
        grad_map, weight, grad_x, batch, height, width, *grad_map.shape[2:], channels, weight.shape[1],
        strides, tuple(ws), tuple(xs), PRECISION, _rows_fast(strides), _rows_fast(xs), *tile, **options,
    )  # fmt: skip


def _product(dtype: torch.dtype, columns: int, depth: int, rows: int | None = None) -> tuple[tuple[int, ...], dict]:
    """Tile of a program's product (rows, columns, depth), no larger than the extents ask for, and launch options."""
    single = dtype == torch.float32
    limits = FLOAT_TILE if single else HALF_TILE
    extents = (limits[0] if rows is None else rows, columns, depth)
    tile = tuple(
        min(limit, max(SMALLEST, triton.next_power_of_2(extent))) for extent, limit in zip(extents, limits, strict=True)
    )
    warps = max(4, tile[0] * tile[1] // WARP_ELEMENTS)
    return tile, {"num_warps": warps, "num_stages": FLOAT_STAGES if single else HALF_STAGES}


def _map_grid(x: Tensor, strides: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Grid of an elementwise pass over a map, and its tile of channels and positions, long where memory runs."""
    batch, channels, height, width = x.shape
    along, across = (height * width, channels) if _rows_fast(strides) else (channels, height * width)
    long = min(triton.next_power_of_2(along), MAP_TILE // SMALLEST)
    short = min(triton.next_power_of_2(across), MAP_TILE // long)
    blocks = (short, long) if _rows_fast(strides) else (long, short)
    return (batch * triton.cdiv(height * width, blocks[1]), triton.cdiv(channels, blocks[0])), blocks


def _rows_fast(strides: Sequence[int]) -> bool:
    """Whether a map's positions, rather than its channels, are contiguous in memory."""
    return strides[2] == 1 and strides[1] != 1
