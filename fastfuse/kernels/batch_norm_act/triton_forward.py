"""Forward kernels of batch_norm_act, and what those of the backward share with them.

A program owns a block of channels, which never holds two networks', and a chunk of positions, counted over all samples.
It walks over the chunk in tiles [channels, positions]. A map's strides travel as a tuple (sample, channel, position),
those of several maps as a tuple of such, which has one entry if all are equal: addresses are then computed once.
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import divide


@triton.jit
def own_channels(group_channels, BLOCK_C: tl.constexpr):
    """This program's network, block within the network, channels, and which of the channels exist."""
    blocks = tl.cdiv(group_channels, BLOCK_C)
    group, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return group, block, group * group_channels + c, c < group_channels


@triton.jit
def place(p, spatial, c, strides):
    """Offsets of a tile's elements."""
    columns = (p // spatial).to(tl.int64) * strides[0] + (p % spatial).to(tl.int64) * strides[2]
    return (c.to(tl.int64) * strides[1])[:, None] + columns[None, :]


@triton.jit
def pivot(x, strides, c, present):
    """The channels' first values. Statistics are taken of differences from them, so that a large mean costs no bits."""
    return tl.load(x + c.to(tl.int64) * strides[1], present, 0.0).to(tl.float32)


@triton.jit
def moments(x, strides, near, first, last, spatial, c, present, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Mean, less `near`, and sum of squared differences from it, per channel, of the positions from first to last.

    Welford's recurrence in each lane of the tile; the lanes are merged by Chan's formula.
    """
    mean, squares = tl.zeros((BLOCK_C, BLOCK_P), tl.float32), tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    steps = 0.0
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = present[:, None] & (p < last)[None, :]
        value = tl.load(x + place(p, spatial, c, strides), mask, 0.0).to(tl.float32) - near[:, None]
        steps += 1.0
        difference = tl.where(mask, value - mean, 0.0)
        # Plain: rounded to the nearest it would take up to 46 registers more, and a lane's mean corrects itself.
        mean += difference * (1.0 / steps)
        squares += difference * (value - mean)
    # How many values a lane saw; none where the chunk is shorter than a tile.
    count = tl.cdiv(last - first - tl.arange(0, BLOCK_P), BLOCK_P).to(tl.float32)[None, :]
    average = divide(tl.sum(mean * count, 1), last - first)
    apart = mean - average[:, None]
    return average, tl.sum(squares + count * apart * apart, 1)


@triton.jit
def merged_moments(partial, tiles, chunk, positions, channels, c, present, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """The same of all positions, from those of the chunks [2, tiles, channels], by Chan's formula in a fixed order."""
    average = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        mask = (tile < tiles)[:, None] & present[None, :]
        count = tl.minimum(positions - tile * chunk, chunk).to(tl.float32)[:, None]
        mean = tl.load(partial + tile[:, None] * channels + c[None, :], mask, 0.0)
        average += divide(tl.sum(mean * count, 0), positions)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        mask = (tile < tiles)[:, None] & present[None, :]
        count = tl.minimum(positions - tile * chunk, chunk).to(tl.float32)[:, None]
        at = partial + tile[:, None] * channels + c[None, :]
        apart = tl.load(at, mask, 0.0) - average[None, :]
        within = tl.load(at + tiles * channels, mask, 0.0)
        squares += tl.sum(tl.where(mask, within + apart * apart * count, 0.0), 0)
    return average, squares


@triton.jit
def batch_norm_act_fwd_moments_kernel(
    x, strides, partial, spatial, positions, channels, group_channels, chunk,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Moments of a chunk into `partial` [2, tiles, channels]."""
    _, _, c, present = own_channels(group_channels, BLOCK_C)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, positions)
    near = pivot(x, strides, c, present)
    mean, squares = moments(x, strides, near, first, last, spatial, c, present, BLOCK_C, BLOCK_P)
    at = partial + tl.program_id(1) * channels + c
    tl.store(at, mean, present)
    tl.store(at + tl.num_programs(1) * channels, squares, present)


@triton.jit
def update(running, batch, momentum, c, present):
    """A running statistic as torch updates it."""
    old = tl.load(running + c, present, 0.0).to(tl.float32)
    tl.store(running + c, (1 - momentum) * old + momentum * batch, present)


@triton.jit
def batch_norm_act_fwd_apply_kernel(
    x, residual, out, strides, attention, weight, bias, statistics,
    mean, var, running_mean, running_var, momentum, eps, partial, tiles,
    spatial, positions, channels, group_channels, chunk,
    RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The result on a chunk: with mean and var where given, else with the batch's.

    Those are merged from `partial`, or without it taken here: then one chunk is the whole batch.
    """
    group, block, c, present = own_channels(group_channels, BLOCK_C)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, positions)
    if mean is not None:
        centre = tl.load(mean + c, present, 0.0).to(tl.float32)
        spread = tl.load(var + c, present, 1.0).to(tl.float32)
    else:
        near = pivot(x, strides[0], c, present)
        if partial is not None:
            apart, squares = merged_moments(partial, tiles, chunk, positions, channels, c, present, BLOCK_C, ROWS)
        else:
            apart, squares = moments(x, strides[0], near, first, last, spatial, c, present, BLOCK_C, BLOCK_P)
        centre = near + apart
        spread = divide(squares, positions)
        if tl.program_id(1) == 0:
            update(running_mean, centre, momentum, c, present)
            update(running_var, divide(squares, positions - 1), momentum, c, present)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(spread + eps))
    if tl.program_id(1) == 0:
        tl.store(statistics + c, centre, present)
        tl.store(statistics + channels + c, inverse, present)
    scale = inverse * tl.load(weight + c, present, 0.0).to(tl.float32)
    shift = tl.load(bias + c, present, 0.0).to(tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = p < last
        mask = present[:, None] & inside[None, :]
        value = tl.load(x + place(p, spatial, c, strides[0]), mask, 0.0).to(tl.float32)
        value = (value - centre[:, None]) * scale[:, None] + shift[:, None]
        if residual is not None:
            value += tl.load(residual + place(p, spatial, c, strides[1 % len(strides)]), mask, 0.0).to(tl.float32)
        if RELU:
            value = tl.where(value <= 0, 0.0, value)  # not a number stays so, as in torch
        value = value.to(out.dtype.element_ty)
        tl.store(out + place(p, spatial, c, strides[2 % len(strides)]), value, mask)
        if attention is not None:
            wide = tl.where(mask, value.to(tl.float32), 0.0)
            row = block.to(tl.int64) * (channels // group_channels) + group
            tl.store(attention + row * positions + p, divide(tl.sum(wide * wide, 0), group_channels), inside)


@triton.jit
def batch_norm_act_fwd_attention_kernel(parts, attention, size, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Add what the blocks of a network's channels gave, in their order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(PARTS):
        total += tl.load(parts + at, at < size, 0.0)
        parts += size
    tl.store(attention + at, total, at < size)
