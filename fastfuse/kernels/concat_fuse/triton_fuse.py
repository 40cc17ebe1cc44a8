"""concat_fuse in Triton: kernels of the forward. The 1x1 products are those of concat_conv1x1.

Every launch serves all modules of a call. The depthwise output is never stored: it is computed again, unrounded,
wherever it is needed (9 products a value). Statistics are taken per share of the positions as mean and sum of squared
differences, and merged by Chan's formula in a fixed order, for the first norm by the programs that need them.
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import divide, pick, pick_pointer
from fastfuse.kernels.concat_fuse.triton_kernels import scale_shift_relu
from fastfuse.kernels.concat_fuse.triton_moments import merged_moments, moments
from fastfuse.kernels.concat_fuse.triton_tables import at, locate


@triton.jit
def convolve(
    base, stride_n, taps, tap_i, tap_j, row, column, height, width, inside, present,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A 3x3 stencil on the tile that `base` points to; its weights, per channel, begin at `taps`."""
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    # A row at a time: with all nine elements in flight registers spill.
    for i in range(3):
        in_row = inside & (row + i >= 1) & (row + i <= height)
        for j in tl.static_range(3):
            there = in_row & (column + j >= 1) & (column + j <= width)
            shift = ((i - 1) * width + (j - 1)) * stride_n
            x = tl.load(base + shift, mask=there[:, None] & present[None, :], other=0.0)
            k = tl.load(taps + i * tap_i + j * tap_j, mask=present, other=0.0)
            total += x.to(tl.float32) * k.to(tl.float32)[None, :]
    return total


@triton.jit
def channel_tile(maps, CHANNELS: tl.constexpr):
    """This program's map and module, channels of the map, in its module and among all maps, and which there are."""
    which, begin = locate(maps.channels, tl.program_id(1), CHANNELS)
    c = begin + tl.arange(0, CHANNELS)
    inner, whole = c + pick(maps.inner, which), c + pick(maps.first, which)
    return which, pick(maps.owners, which), c, inner, whole, c < pick(maps.channels, which)


@triton.jit
def filtered(
    maps, which, taps, owner, c, inner, present, p, inside, height, width,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Depthwise output at positions p of this program's channels."""
    spatial, stride_n = height * width, pick(maps.n, which)
    base = pick_pointer(maps.pointers, which) + c[None, :] * pick(maps.c, which)
    base += at(p, spatial, pick(maps.b, which), stride_n)[:, None]
    weights = pick_pointer(taps.pointers, owner) + inner * pick(taps.c, owner)
    return convolve(
        base, stride_n, weights, pick(taps.i, owner), pick(taps.j, owner), p % spatial // width, p % width,
        height, width, inside, present, POSITIONS, CHANNELS,
    )  # fmt: skip


@triton.jit
def keep_statistics(norms, owner, c, present, channels, mean, var, positions):
    """Statistics for the backward, and the running ones as torch updates them: by one program per channel."""
    place = pick_pointer(norms.statistics, owner) + c
    tl.store(place, mean, mask=present)
    tl.store(place + channels, var, mask=present)
    momentum = pick(norms.momentum, owner)
    place = pick_pointer(norms.mean, owner) + c
    old = tl.load(place, mask=present, other=0.0).to(tl.float32)
    tl.store(place, (1 - momentum) * old + momentum * mean, mask=present)
    place = pick_pointer(norms.var, owner) + c
    old = tl.load(place, mask=present, other=0.0).to(tl.float32)
    unbiased = var * divide(positions * 1.0, positions - 1.0)
    tl.store(place, (1 - momentum) * old + momentum * unbiased, mask=present)


@triton.jit
def at_channels(pointers, owner, c, present):
    """A module's vector at some channels, in float32."""
    return tl.load(pick_pointer(pointers, owner) + c, mask=present, other=0.0).to(tl.float32)


@triton.jit
def standardise(x, mean, var, eps, present):
    """A tile minus its channels' means, over their standard deviations; and the inverse of the latter."""
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.where(present, var, 1.0) + eps))
    return (x - mean[None, :]) * inverse[None, :], inverse


@triton.jit
def concat_fuse_fwd_moments_kernel(
    maps, taps, partial, positions, height, width, total_channels, chunk,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Moments [2, shares, C] of the depthwise output over this program's share of the positions."""
    which, owner, c, inner, whole, present = channel_tile(maps, CHANNELS)
    share = tl.program_id(0)
    mean, squares = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for start in range(share * chunk, tl.minimum((share + 1) * chunk, positions), POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        inside = p < positions
        z = filtered(
            maps, which, taps, owner, c, inner, present, p, inside, height, width, POSITIONS, CHANNELS
        )  # fmt: skip
        own_mean, own_squares = moments(z, inside)
        before, new = (start - share * chunk).to(tl.float32), tl.sum(inside.to(tl.float32))
        apart = own_mean - mean
        mean += apart * divide(new, before + new)
        squares += own_squares + apart * apart * divide(before * new, before + new)
    tl.store(partial + share * total_channels + whole, mean, mask=present)
    tl.store(partial + (tl.num_programs(0) + share) * total_channels + whole, squares, mask=present)


@triton.jit
def concat_fuse_fwd_hidden_kernel(
    maps, taps, norms, partial, hidden, positions, height, width, total_channels, chunk,
    ROWS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """relu(batch norm) of the depthwise output; by the batch's statistics where their `partial` moments are given."""
    which, owner, c, inner, whole, present = channel_tile(maps, CHANNELS)
    share, spatial = tl.program_id(0), height * width
    if partial is not None:
        shares = tl.num_programs(0)
        mean, var = merged_moments(partial, shares, chunk, positions, total_channels, whole, present, ROWS)
        if share == 0:
            keep_statistics(norms, owner, inner, present, pick(hidden.channels, owner), mean, var, positions)
    else:
        mean, var = at_channels(norms.mean, owner, inner, present), at_channels(norms.var, owner, inner, present)
    scale, shift = at_channels(norms.weight, owner, inner, present), at_channels(norms.bias, owner, inner, present)
    out = pick_pointer(hidden.pointers, owner) + inner[None, :] * pick(hidden.c, owner)
    for start in range(share * chunk, tl.minimum((share + 1) * chunk, positions), POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        inside = p < positions
        z = filtered(
            maps, which, taps, owner, c, inner, present, p, inside, height, width, POSITIONS, CHANNELS
        )  # fmt: skip
        x, _ = standardise(z, mean, var, pick(norms.eps, owner), present)
        offsets = at(p, spatial, pick(hidden.b, owner), pick(hidden.n, owner))[:, None]
        tl.store(out + offsets, scale_shift_relu(x, scale, shift), mask=inside[:, None] & present[None, :])


@triton.jit
def concat_fuse_fwd_merge_kernel(
    pre, norms, partial, tiles, tile_positions, positions, total_channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Statistics of the second norms from the moments of the products' tiles."""
    which, owner, _, inner, whole, present = channel_tile(pre, CHANNELS)
    mean, var = merged_moments(partial, tiles, tile_positions, positions, total_channels, whole, present, ROWS)
    keep_statistics(norms, owner, inner, present, pick(pre.channels, which), mean, var, positions)


@triton.jit
def concat_fuse_fwd_finish_kernel(
    pre, norms, fused, attention, pooled, gives, spatial, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    """relu(batch norm) of a 1x1 product at some positions of a sample, their attention, and their mean's part."""
    sample, block, m = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    n = block * POSITIONS + tl.arange(0, POSITIONS)
    inside, outputs = n < spatial, pick(pre.channels, m)
    rows = pick_pointer(pre.pointers, m) + sample * pick(pre.b, m) + n[:, None] * pick(pre.n, m)
    out = pick_pointer(fused.pointers, m) + sample * pick(fused.b, m) + n[:, None] * pick(fused.n, m)
    means = pick_pointer(pooled, m) + (block * tl.num_programs(0) + sample) * outputs
    energy = tl.zeros((POSITIONS,), tl.float32)
    for start in range(0, outputs, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        present = c < outputs
        mask = inside[:, None] & present[None, :]
        x = tl.load(rows + c[None, :] * pick(pre.c, m), mask=mask, other=0.0).to(tl.float32)
        mean, var = at_channels(norms.mean, m, c, present), at_channels(norms.var, m, c, present)
        x, _ = standardise(x, mean, var, pick(norms.eps, m), present)
        scale, shift = at_channels(norms.weight, m, c, present), at_channels(norms.bias, m, c, present)
        y = scale_shift_relu(x, scale, shift).to(pre.pointers[0].dtype.element_ty)
        tl.store(out + c[None, :] * pick(fused.c, m), y, mask=mask & (c < outputs * pick(gives.fused, m))[None, :])
        y = tl.where(mask, y.to(tl.float32), 0.0)
        energy += tl.sum(y * y, 1)
        tl.store(means + c, divide(tl.sum(y, 0), spatial), mask=c < outputs * pick(gives.pooled, m))
    place = pick_pointer(attention, m) + sample * spatial + n
    tl.store(place, divide(energy, outputs), mask=n < spatial * pick(gives.attention, m))
