"""Launchers of batch_norm_act's Triton kernels; README.md beside this file counts launches and bytes."""

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

import triton
from torch import Tensor

from fastfuse.kernels._device import table
from fastfuse.kernels._limits import check_positions
from fastfuse.kernels._triton import launch_constants, map_strides
from fastfuse.kernels.batch_norm_act import layout
from fastfuse.kernels.batch_norm_act import triton_backward as bwd
from fastfuse.kernels.batch_norm_act import triton_forward as fwd

TILE_BYTES = 8192  # of a map
WARP_ELEMENTS = 512  # of a tile: 16 for each thread; with half as many ptxas still spills float32 on sm_90
# Registers a thread in the backward of contiguous float32 maps. Left alone, the assembler takes a few too little and
# spills 8 bytes (56 on sm_100 with triton 3.6, 80 on sm_90 with triton 3.8).
CONTIGUOUS_REGISTERS = 128
# Registers a thread of the forward, at most. Left alone, the assembler takes 48 or 80 and spills 16 to 24 bytes
# (bfloat16, sm_90, triton 3.8); 64 are too few elsewhere.
REGISTERS = 128
WIDEST, NARROWEST = 64, 16  # channels of a block: a line of 128 bytes, or a sector of 32, of half-precision channels
PROGRAMS = 528  # four for each multiprocessor of an H200
FEW = 264  # with fewer programs than this, narrower blocks of channels make more of them
MOST_CHUNKS = 256
OWN_TILES = 4  # a batch of so few tiles is walked over twice by one program, without a launch for its sums
MERGED_ELEMENTS = 2048  # of the chunks' sums that a program loads at once
ATTENTION_BLOCK = 1024


class Plan(NamedTuple):
    """How programs share a map.

    Attributes:
        grid: blocks of channels, chunks of positions.
        blocks: blocks of channels of one network.
        chunk: positions of a chunk.
        extents: spatial positions, positions of all samples, channels, channels of a network, chunk.
        tile: sides of a tile and its warps, as the kernels take them.
        limit: what the backward's last kernel is told besides.
    """

    grid: tuple[int, int]
    blocks: int
    chunk: int
    extents: tuple[int, ...]
    tile: dict[str, int]
    limit: dict[str, int]

    @property
    def own(self) -> bool:
        """Whether one program has all positions of its channels."""
        return self.grid[1] == 1


def plan_of(x: Tensor, groups: int, launch: str = "batch_norm_act_fwd") -> Plan:
    """The plan for a map that holds so many networks, or 0 where nothing is done per network."""
    given = launch_constants(
        launch, x, TILE_BYTES=TILE_BYTES, WARP_ELEMENTS=WARP_ELEMENTS, WIDEST=WIDEST, PROGRAMS=PROGRAMS
    )  # fmt: skip
    batch, channels, height, width = x.shape
    positions, own = batch * height * width, channels // (groups or 1)
    # Every program merges all chunks: many chunks cost more than they hide.
    most = max(1, min(MOST_CHUNKS, isqrt(positions) // 2))
    block = min(given.WIDEST, triton.next_power_of_2(own))
    # A network's attention map comes out of one block where that is wide enough.
    while not groups and block > NARROWEST and most * triton.cdiv(own, block) < FEW:
        block //= 2
    # Channels that start at odd places are loaded one by one, each with an address of its own: fewer fit the registers.
    uneven = x.stride(1) != 1 and (height * width) % 16
    elements = given.TILE_BYTES // x.element_size()
    columns = (elements // 2 if uneven else elements) // block
    blocks = triton.cdiv(own, block)
    programs = blocks * (groups or 1)
    tiles = triton.cdiv(positions, columns)
    chunks = 1 if tiles <= OWN_TILES else min(most, triton.cdiv(given.PROGRAMS, programs), tiles)
    chunk = max(triton.cdiv(tiles, chunks), 1) * columns
    extents = height * width, positions, channels, own, chunk
    columns = min(columns, triton.next_power_of_2(max(positions, 1)))
    tile = {"BLOCK_C": block, "BLOCK_P": columns, "num_warps": max(4, elements // given.WARP_ELEMENTS)}
    contiguous = x.stride(1) != 1 and x.element_size() == 4
    limit = {"maxnreg": CONTIGUOUS_REGISTERS} if contiguous else {}
    return Plan((programs, triton.cdiv(positions, chunk)), blocks, chunk, extents, tile, limit)


def _rows(tile: dict[str, int]) -> int:
    return MERGED_ELEMENTS // tile["BLOCK_C"]


def _maps(*maps: Tensor | None) -> tuple[tuple[Tensor | None, ...], tuple]:
    """Maps as kernels take them, the first of them not None, and the table of their strides."""
    found = [None if x is None else map_strides(x, far=True) for x in maps]
    strides = [tuple((one or found[0])[1:]) for one in found]
    return tuple(one and one[0] for one in found), table(strides)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
    attention_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch on running statistics or where one program owns a batch, else two; see the README for attention."""
    check_positions("x", x)
    found = out, attention, statistics = layout.empty_results(x, attention_groups)
    if x.numel() == 0:
        return found
    plan = plan_of(x, attention_groups)
    (x, residual, _), strides = _maps(x, residual, out)
    partial = None
    if mean is None and not plan.own:
        partial = statistics.new_empty(2, plan.grid[1], x.shape[1])
        fwd.batch_norm_act_fwd_moments_kernel[plan.grid](x, strides[0], partial, *plan.extents, **plan.tile)
    parts = attention
    if attention_groups and plan.blocks > 1:
        parts = attention.new_empty(plan.blocks, attention.numel())
    fwd.batch_norm_act_fwd_apply_kernel[plan.grid](
        x, residual, out, strides, parts if attention_groups else None, weight, bias, statistics,
        mean, var, running_mean, running_var, momentum, eps, partial, plan.grid[1], *plan.extents,
        RELU=relu, ROWS=_rows(plan.tile), **plan.tile, maxnreg=REGISTERS,
    )  # fmt: skip
    if parts is not attention:
        size = attention.numel()
        fwd.batch_norm_act_fwd_attention_kernel[(triton.cdiv(size, ATTENTION_BLOCK),)](
            parts, attention, size, PARTS=plan.blocks, BLOCK=ATTENTION_BLOCK
        )
    return found


def backward(
    grad: Tensor | None,
    of_attention: Tensor | None,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    training: bool,
    relu: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """One launch where no sums are needed or one program owns a batch, else two."""
    of_x, of_residual, of_weight, of_bias = found = layout.empty_gradients(x, weight, bias, needed)
    plan = plan_of(x, 0 if of_attention is None else len(of_attention), "batch_norm_act_bwd")
    maps, strides = _maps(x, grad, out, of_x if of_residual is None else of_residual)
    energy = None
    if of_attention is not None:
        of_attention, *attention_strides = map_strides(of_attention, far=True)
        energy = of_attention, tuple(attention_strides)
    norm = weight, bias, statistics
    sums = of_weight is not None or of_bias is not None or (training and of_x is not None)
    grid, partial = plan.grid, None
    if sums and not plan.own:
        partial = statistics.new_empty(2, grid[1], x.shape[1])
        if x.numel():
            bwd.batch_norm_act_bwd_sums_kernel[grid](
                maps[:3], strides, energy, *norm, of_residual, None if training else of_x, partial, *plan.extents,
                RELU=relu, **plan.tile,
            )  # fmt: skip
        if of_residual is not None:
            # It is the incoming gradient itself: one map to read in place of up to three.
            maps, strides = _maps(maps[0], of_residual, None, of_residual)
            of_residual, energy, relu = None, None, False
        if not training or x.numel() == 0:
            of_x = None
        if of_x is None:
            grid = grid[0], 1
    if sums or x.numel():
        bwd.batch_norm_act_bwd_input_kernel[grid](
            maps[:3], strides, energy, *norm, of_x, of_residual, of_weight, of_bias, partial, plan.grid[1],
            *plan.extents, SUMS=sums, BATCH=training, RELU=relu, ROWS=_rows(plan.tile), **plan.tile, **plan.limit,
        )  # fmt: skip
    return [g for g in found if g is not None]
