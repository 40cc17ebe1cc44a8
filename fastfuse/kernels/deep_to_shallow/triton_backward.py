"""Backward launchers of deep_to_shallow's Triton kernels, one stage at a time."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fastfuse.kernels._triton import launch_constants
from fastfuse.kernels.deep_to_shallow import outputs
from fastfuse.kernels.deep_to_shallow import triton_norm as norm
from fastfuse.kernels.deep_to_shallow import triton_products as products
from fastfuse.kernels.deep_to_shallow.triton_tiles import (
    MAP_TILE,
    MERGE_BLOCK,
    PRECISION,
    Strides,
    chosen,
    map_grid,
    product_tile,
    rows_fast,
    strided,
)

# To fill an H200's 132 multiprocessors a sum over positions is split into shares, but not into less than so many tiles
# each. The number of transforms plays no part: the same map gives the same bits in any company.
PROGRAMS, STEPS = 528, 8
WARPS = 8  # of the walks over maps: with 4, 246 registers a thread let two programs run on a multiprocessor

Maps = tuple[Tensor, ...]


def launch_bwd(
    grads: Sequence[Tensor],
    carried: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    kept: Sequence[Tensor],
    means: Sequence[Tensor],
    rstds: Sequence[Tensor],
    training: bool,
    keep: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Up to four launches for all transforms that lie alike in memory: sums, norm, weight, the gradients."""
    found = outputs.stage_gradients((xs, weights, gammas, betas), needed)
    flat = [g for own in found for g in own]
    if kept[0].numel() == 0:
        return [g.zero_() for g in flat]
    grad_xs, grad_weights, grad_gammas, grad_betas = found
    for members, maps, strides in strided(grads, carried, kept, xs, weights, grad_xs, grad_weights):
        vectors = [chosen(own, members) for own in (gammas, betas, means, rstds, grad_gammas, grad_betas)]
        grad_maps = _through_norm(maps[:3], strides[:3], *vectors, training, keep, needed)
        if grad_maps is not None:
            _products(grad_maps, strides[2], maps[3:], strides[3:])
    return flat


def _through_norm(
    maps: Sequence[Maps | None],
    strides: Sequence[Strides],
    gammas: Maps,
    betas: Maps,
    means: Maps,
    rstds: Maps,
    grad_gammas: Maps | None,
    grad_betas: Maps | None,
    training: bool,
    keep: bool,
    needed: Sequence[bool],
) -> Maps | None:
    """Gradients of the norm's weight and bias, and those of its input where the products need them."""
    kept, count = maps[2], len(gammas)
    channels, positions = kept[0].shape[1], kept[0].shape[2] * kept[0].shape[3]
    own = launch_constants("deep_to_shallow_bwd_norm", kept[0], MAP_TILE=MAP_TILE, WARPS=WARPS)
    (tiles, columns), blocks = map_grid(kept[0], strides[2], own.MAP_TILE)
    shares = _shares(tiles, columns)
    given = (*maps, gammas, betas, means, rstds)
    partial = None
    if training or needed[2] or needed[3]:
        partial = means[0].new_empty(count * 2 * channels * shares)
        norm.deep_to_shallow_bwd_sums_kernel[(shares, columns, count)](
            *given, partial, tiles, positions, channels, *strides, keep, *blocks, num_warps=own.WARPS
        )
    grad_maps = tuple(torch.empty_like(x) for x in kept) if needed[0] or needed[1] else None
    norm.deep_to_shallow_bwd_norm_kernel[(1 if grad_maps is None else shares, columns, count)](
        *given, partial, grad_gammas, grad_betas, grad_maps, tiles, shares, positions, channels,
        kept[0].shape[0] * positions, *strides, training, keep, *blocks, num_warps=own.WARPS,
    )  # fmt: skip
    return grad_maps


def _products(grad_maps: Maps, d_strides: Strides, tensors: Sequence[Maps | None], strides: Sequence[Strides]) -> None:
    """Gradients of the deep maps and of the weights, those that there is room for."""
    xs, weights, grad_xs, grad_weights = tensors
    x_strides, w_strides, gx_strides, gw_strides = strides
    count = len(xs)
    batch, channels_in, height, width = xs[0].shape
    channels_out, *shallow = grad_maps[0].shape[1:]
    positions = batch * height * width
    extents = batch, height, width, *shallow, channels_in, channels_out
    dtype, d_fast = grad_maps[0].dtype, rows_fast(d_strides)
    partial, splits, merges = None, 0, 0
    if grad_weights is not None:
        tile, options = product_tile("deep_to_shallow_bwd_weight", xs[0], dtype, channels_out, positions, channels_in)
        tiles = triton.cdiv(channels_in, tile[0]) * triton.cdiv(channels_out, tile[1])
        steps = triton.cdiv(triton.cdiv(positions, tile[2]), _shares(triton.cdiv(positions, tile[2]), 9 * tiles))
        splits = triton.cdiv(triton.cdiv(positions, tile[2]), steps)
        size = grad_weights[0].numel()
        partial = torch.empty(count * splits * size, dtype=torch.float32, device=xs[0].device)
        products.deep_to_shallow_bwd_weight_kernel[(tiles, 9 * count, splits)](
            xs, grad_maps, partial, *extents, steps, x_strides, d_strides,
            PRECISION, rows_fast(x_strides), d_fast, *tile, **options,
        )  # fmt: skip
        merges = triton.cdiv(size, MERGE_BLOCK)
    tile, options = product_tile("deep_to_shallow_bwd_input", xs[0], dtype, channels_in, channels_out)
    tiles = 0 if grad_xs is None else triton.cdiv(positions, tile[0]) * triton.cdiv(channels_in, tile[1])
    products.deep_to_shallow_bwd_gradients_kernel[(merges + tiles, count)](
        partial, grad_weights, grad_maps, weights, grad_xs, merges, splits, *extents,
        d_strides, w_strides, gw_strides, gx_strides, PRECISION, d_fast, rows_fast(gx_strides),
        MERGE_BLOCK, *tile, **options,
    )  # fmt: skip


def _shares(tiles: int, columns: int) -> int:
    """Programs among which the tiles of one column of programs are shared out."""
    return max(1, min(triton.cdiv(tiles, STEPS), PROGRAMS // columns))
