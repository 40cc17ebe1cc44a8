"""What the Triton kernels of deep_to_shallow and their launchers share: addressing, tiles, groups of like layout."""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._triton import launch_constants, map_strides
from fastfuse.kernels.deep_to_shallow.outputs import alike

# Rows, columns and depth of a program's matrix product. Exact float32 products run on the ordinary arithmetic units,
# whose operands live in registers: smaller tiles.
HALF_TILE, FLOAT_TILE = (64, 64, 32), (32, 32, 16)
HALF_STAGES, FLOAT_STAGES = 3, 2
WARP_ELEMENTS = 512  # of a product's accumulator; at twice as many Triton 3.6 spills registers
SMALLEST = 16  # side of a tile that tl.dot takes
PRECISION = "ieee"  # of float32 products
MAP_TILE = 2048  # elements of a tile of an elementwise pass
MERGE_BLOCK = 1024  # partial sums read at once
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

Strides = tuple[int, int, int]


@triton.jit
def relu(x):
    """NaN stays NaN, as in torch."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def load_tile(pointer, rows, columns, row_mask, column_mask, ROWS_FAST: tl.constexpr):
    """A [rows, columns] tile, 0 outside; lanes run along the rows where those are contiguous in memory."""
    if ROWS_FAST:
        mask = column_mask[:, None] & row_mask[None, :]
        tile = tl.trans(tl.load(pointer + (columns[:, None] + rows[None, :]), mask=mask, other=0.0))
    else:
        mask = row_mask[:, None] & column_mask[None, :]
        tile = tl.load(pointer + (rows[:, None] + columns[None, :]), mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(pointer, tile, rows, columns, row_mask, column_mask, ROWS_FAST: tl.constexpr):
    """The counterpart of load_tile."""
    if ROWS_FAST:
        mask = column_mask[:, None] & row_mask[None, :]
        tl.store(pointer + (columns[:, None] + rows[None, :]), tl.trans(tile), mask=mask)
    else:
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(pointer + (rows[:, None] + columns[None, :]), tile, mask=mask)


@triton.jit
def deep_positions(start, batch, height, width, BLOCK: tl.constexpr):
    """Sample, row and column of BLOCK positions of the deep map, counted through the batch, and which of them exist."""
    m = start + tl.arange(0, BLOCK)
    n = m % (height * width)
    return (m // (height * width)).to(tl.int64), n // width, n % width, m < batch * height * width


@triton.jit
def map_tile(tile, positions, channels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sample, positions and mask of a [BLOCK_C, BLOCK_P] tile; the grid's second axis counts blocks of channels."""
    tiles = tl.cdiv(positions, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (tile % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    return (tile // tiles).to(tl.int64), n, (c < channels)[:, None] & (n < positions)[None, :]


@triton.jit
def map_offsets(b, c, n, strides):
    """Where the elements of a tile of a map lie."""
    return b * strides[0] + (c[:, None] * strides[1] + n[None, :] * strides[2])


def rows_fast(strides: Sequence[int]) -> bool:
    """Whether a map's positions, rather than its channels, are contiguous in memory."""
    return strides[2] == 1 and strides[1] != 1


def product_tile(
    launch: str, like: Tensor, dtype: torch.dtype, columns: int, depth: int, rows: int | None = None
) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Tile of a program's product (rows, columns, depth), no larger than the extents ask for, and launch options."""
    single = dtype == torch.float32
    limits = FLOAT_TILE if single else HALF_TILE
    own = launch_constants(
        launch, like, dtype, ROWS=limits[0], COLUMNS=limits[1], DEPTH=limits[2], WARP_ELEMENTS=WARP_ELEMENTS,
        STAGES=FLOAT_STAGES if single else HALF_STAGES,
    )  # fmt: skip
    limits = own.ROWS, own.COLUMNS, own.DEPTH
    extents = (limits[0] if rows is None else rows, columns, depth)
    tile = tuple(
        min(limit, max(SMALLEST, triton.next_power_of_2(extent))) for extent, limit in zip(extents, limits, strict=True)
    )
    warps = max(4, tile[0] * tile[1] // own.WARP_ELEMENTS)
    return tile, {"num_warps": warps, "num_stages": own.STAGES}


def map_grid(x: Tensor, strides: Sequence[int], most: int = MAP_TILE) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tiles of an elementwise pass over a map (of positions, of channels), and their sides, long where memory runs."""
    batch, channels, height, width = x.shape
    along, across = (height * width, channels) if rows_fast(strides) else (channels, height * width)
    long = min(triton.next_power_of_2(along), most // SMALLEST)
    short = min(triton.next_power_of_2(across), most // long)
    blocks = (short, long) if rows_fast(strides) else (long, short)
    return (batch * triton.cdiv(height * width, blocks[1]), triton.cdiv(channels, blocks[0])), blocks


def strided(*lists: Sequence[Tensor]) -> Iterator[tuple[list[int], list[tuple[Tensor, ...]], list[Strides]]]:
    """Groups of transforms whose maps lie alike in memory: what a launch takes strides from holds for all of them.

    Args:
        lists: the T maps or weights of each kind; an empty list stands for a kind that is not there.

    Returns:
        For each group its members, per kind the members' tensors, and per kind their common strides.
    """
    addressed = [[map_strides(x) for x in own] for own in lists]
    count = max(map(len, addressed))
    keys = [[own[t][1:] for own in addressed if own] for t in range(count)]
    for members in alike(keys):
        tensors = [tuple(own[t][0] for t in members) if own else None for own in addressed]
        yield members, tensors, [own[members[0]][1:] if own else (0, 0, 0) for own in addressed]


def chosen(values: Sequence[Tensor], members: Sequence[int]) -> tuple[Tensor, ...] | None:
    """The members' tensors as kernels take them, None for a list that is empty."""
    return tuple(values[t] for t in members) if values else None
