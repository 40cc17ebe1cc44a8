"""Tables of maps, weights and norms as the kernels of this folder take them: tuples that travel as kernel parameters.

Several modules (products, fusion modules) share a launch. Channels of all maps are numbered through in tiles, and so
are the positions of all samples (p = b N + n); a map is addressed by its three strides, so contiguous and channels-last
maps take the same code.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._triton import map_strides


class Maps(NamedTuple):
    """One entry per map.

    Attributes:
        pointers: where each begins.
        b, c, n: strides of sample, channel and position, in elements.
        channels: how many.
        owners: the module that a map belongs to.
        inner: where its channels begin in the concatenation of its module.
        first: where they begin if the channels of all maps are numbered through.
    """

    pointers: tuple
    b: tuple
    c: tuple
    n: tuple
    channels: tuple
    owners: tuple
    inner: tuple
    first: tuple


class Weights(NamedTuple):
    """The 1x1 weights [C_out, C, 1, 1] of each module, and their strides of output and input channel."""

    pointers: tuple
    o: tuple
    c: tuple


def columns(maps: Sequence[Tensor]) -> tuple[tuple, tuple, tuple, tuple]:
    """The maps as kernels address them, and their strides of sample, channel and position."""
    return tuple(zip(*(map_strides(x) for x in maps), strict=True))


def table_of(groups: Sequence[Sequence[Tensor]]) -> Maps:
    """The maps of every module."""
    maps = [x for group in groups for x in group]
    channels = tuple(x.shape[1] for x in maps)
    owners = tuple(m for m, group in enumerate(groups) for _ in group)
    inner = tuple(sum(x.shape[1] for x in group[:s]) for group in groups for s in range(len(group)))
    first = tuple(sum(channels[:s]) for s in range(len(maps)))
    return Maps(*columns(maps), channels, owners, inner, first)


def entries_of(table: Maps, places: Sequence[int]) -> Maps:
    """The maps at some places of a table."""
    return Maps(*(tuple(entries[s] for s in places) for entries in table))


def some_of(table: Maps, gradients: Sequence[Tensor | None]) -> Maps:
    """The table of those gradients that are wanted, each in the place of its map."""
    places = [s for s, x in enumerate(gradients) if x is not None]
    return Maps(*columns([gradients[s] for s in places]), *entries_of(table, places)[4:])


def weights_of(weights: Sequence[Tensor]) -> Weights:
    """The 1x1 weights of the modules."""
    return Weights(tuple(weights), tuple(w.stride(0) for w in weights), tuple(w.stride(1) for w in weights))


def tiles(table: Maps, width: int) -> int:
    """How many channel tiles of a width all maps have together."""
    return sum(triton.cdiv(channels, width) for channels in table.channels)


@triton.jit
def locate(channels, tile, BLOCK: tl.constexpr):
    """The map of a tile, where the channel tiles of all maps are numbered through, and the tile's first channel."""
    which, before, end = tile * 0, tile * 0, tile * 0
    for s in tl.static_range(len(channels) - 1):
        end += tl.cdiv(channels[s], BLOCK)
        which = tl.where(tile >= end, s + 1, which)
        before = tl.where(tile >= end, end, before)
    return which, (tile - before) * BLOCK


@triton.jit
def at(p, spatial, stride_b, stride_n):
    """Offsets of positions numbered through all samples; int64, a whole map may exceed 2^31 elements."""
    return (p // spatial).to(tl.int64) * stride_b + (p % spatial) * stride_n
