"""Device helpers that the Triton kernels of several ops share; imported by `triton_kernels.py` files only."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels import _triton
from fastfuse.kernels._limits import check_count


@triton.jit
def pick(table, index):
    """Entry `index`, known only on the device, of a tuple of scalars that travels as kernel parameters."""
    found = table[0]
    for i in tl.static_range(1, len(table)):
        found = tl.where(index == i, table[i], found)
    return found


@triton.jit
def pick_pointer(table, index):
    """Entry `index` of a tuple of pointers, as a pointer of the first one's type.

    Selected as pointers, not as addresses: the compiler keeps track of their alignment and loads 16 bytes at once.
    """
    found = table[0]
    for i in tl.static_range(1, len(table)):
        found = tl.where(index == i, table[i].to(table[0].dtype), found)
    return found


@triton.jit
def divide(x, by):
    """x / by in float32, rounded to the nearest: a GPU's plain division may be two units in the last place off."""
    return tl.div_rn(x, tl.zeros((), tl.float32) + by)


@triton.jit
def ordered_sum(values, count, BLOCK: tl.constexpr, DTYPE: tl.constexpr = tl.float32):
    """Sum of `count` numbers in memory, in an order that depends on nothing but `count`."""
    total = tl.zeros((BLOCK,), DTYPE)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(values + place, mask=place < count, other=0).to(DTYPE)
    return tl.sum(total)


@triton.jit
def sum_of_samples(per_sample, count, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Loss of a pair from those of its samples, in a fixed order: their sum, or their mean."""
    loss = ordered_sum(per_sample, count, BLOCK)
    if MEAN:
        loss = divide(loss, count)
    return loss


@triton.jit
def pieces(extent, BLOCK: tl.constexpr):
    """How many blocks an extent comes to, at least one; tl.cdiv would exceed 32 bits where the extent nearly does."""
    return (extent - 1) // BLOCK + 1


@triton.jit
def tile_turns(extent, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tiles a block of a `Walk` comes to, at most."""
    tiles = pieces(extent[1], BLOCK_C) * pieces(extent[2], BLOCK_N) * extent[0]
    return tl.cdiv(tiles, tl.num_programs(0))


@triton.jit
def tile_place(turn, extent, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sample, channels, positions and mask of the tile that a block comes to in one of its turns."""
    across, down = pieces(extent[2], BLOCK_N), pieces(extent[1], BLOCK_C)
    tile = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
    sample = tile // (across * down)
    channel = (tile // across % down * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    position = (tile % across * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (channel < tl.where(sample < extent[0], extent[1], 0)) & (position < extent[2])
    return sample, channel, position, inside


@triton.jit
def tile_address(pointer, stride, sample, channel, position):
    """Where the elements of a tile lie in a map."""
    return pointer + (sample * stride[0] + channel * stride[1] + position * stride[2])


class Walk:
    """How blocks walk over maps [B, C, H, W] in one launch: extents, tile, grid.

    One linear walk where the maps lie alike in memory (all contiguous or all channels-last), otherwise tiles of
    channels and positions that strides address.

    Args:
        groups: maps of one shape that are walked over together; each group has blocks of its own along the grid's
            second axis.
        tile: elements of a tile.
        programs: blocks at most, of all groups together; each takes several tiles.
    """

    def __init__(self, groups: Sequence[Sequence[Tensor]], tile: int, programs: int) -> None:
        self.flat = all(_dense_alike(group) for group in groups)
        self.extents = tuple(self._extent(group[0]) for group in groups)
        channels, positions = (max(extent[axis] for extent in self.extents) for axis in (1, 2))
        if groups[0][0].stride(1) == 1 and not self.flat:
            self.block_c = min(triton.next_power_of_2(channels), 256)
            self.block_n = tile // self.block_c
        else:
            self.block_n = tile if self.flat else min(triton.next_power_of_2(positions), 256)
            self.block_c = tile // self.block_n
        tiles = max(b * triton.cdiv(c, self.block_c) * triton.cdiv(n, self.block_n) for b, c, n in self.extents)
        check_count("a map", groups[0][0], "tiles", tiles)
        self.grid = (min(max(tiles, 1), max(programs // len(groups), 1)), len(groups))

    def _extent(self, x: Tensor) -> tuple[int, int, int]:
        return (1, 1, x.numel()) if self.flat else (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])

    def strides(self, maps: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
        """Strides of sample, channel and position of each map."""
        return tuple((0, 0, 1) if self.flat else _triton.map_strides(x, far=True)[1:] for x in maps)

    def blocks(self) -> dict[str, int]:
        """The tile's sides, constants of the kernels."""
        return {"BLOCK_C": self.block_c, "BLOCK_N": self.block_n}


def _dense_alike(maps: Sequence[Tensor]) -> bool:
    formats = (torch.contiguous_format, torch.channels_last)
    return any(all(x.is_contiguous(memory_format=f) for x in maps) for f in formats)


def table(values: Sequence[float]) -> tuple:
    """A table for `pick`, one entry if all are equal: the compiler then knows a stride of 1 as such."""
    return (values[0],) if all(value == values[0] for value in values) else tuple(values)
