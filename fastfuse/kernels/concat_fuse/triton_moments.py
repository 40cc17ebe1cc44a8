"""Statistics of a batch on the device: moments of tiles, in float32, merged by Chan's formula in a fixed order."""

import triton
import triton.language as tl

from fastfuse.kernels._device import divide


@triton.jit
def store_moments(partial, x, c, inside, present, channels):
    """Mean and sum of squared differences from it, per channel, of a tile [positions, channels] into [2, tiles, C]."""
    mean, squares = moments(x, inside)
    place = partial + tl.program_id(0) * channels + c
    tl.store(place, mean, mask=present)
    tl.store(place + tl.num_programs(0) * channels, squares, mask=present)


@triton.jit
def moments(x, inside):
    """Mean of each column of a tile, over its rows that are inside, and the sum of squared differences from it."""
    count = tl.sum(inside.to(tl.float32))
    # One division for all channels: with one for each, registers spill on sm_100.
    share = divide(1.0, count)
    mean = tl.sum(tl.where(inside[:, None], x, 0.0), 0) * share
    difference = tl.where(inside[:, None], x - mean[None, :], 0.0)
    # The mean's own rounding matters where it is large against the spread; what it left over is added back.
    slip = tl.sum(difference, 0) * share
    return mean + slip, tl.sum(difference * difference, 0) - count * slip * slip


@triton.jit
def merged_moments(partial, tiles, tile_positions, positions, total_channels, c, present, ROWS: tl.constexpr):
    """Mean and biased variance from the moments [2, tiles, C] of shares of the positions, in a fixed order."""
    near = tl.load(partial + c, mask=present, other=0.0)
    mean, squares = tl.zeros_like(near), tl.zeros_like(near)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        count = tl.minimum(positions - tile * tile_positions, tile_positions).to(tl.float32)[:, None]
        mask = (tile < tiles)[:, None] & present[None, :]
        apart = tl.load(partial + tile[:, None] * total_channels + c[None, :], mask=mask, other=0.0) - near[None, :]
        mean += tl.sum(tl.where(mask, apart * count, 0.0), 0)
    mean = near + divide(mean, positions)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        count = tl.minimum(positions - tile * tile_positions, tile_positions).to(tl.float32)[:, None]
        mask = (tile < tiles)[:, None] & present[None, :]
        place = partial + tile[:, None] * total_channels + c[None, :]
        apart = tl.load(place, mask=mask, other=0.0) - mean[None, :]
        within = tl.load(place + tiles * total_channels, mask=mask, other=0.0)
        squares += tl.sum(tl.where(mask, within + apart * apart * count, 0.0), 0)
    return mean, divide(squares, positions)
