"""concat_conv1x1 in Triton: one matrix product per output tile that walks through the maps, no concatenation.

Each launch serves the products of all modules given; concat_conv1x1 has one. Sums run in float32 and in a fixed order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._device import pick, pick_pointer
from fastfuse.kernels._triton import empty_map
from fastfuse.kernels.concat_fuse.triton_tables import Maps, at, locate, some_of, table_of, tiles, weights_of

# Tiles of 64 positions by 64 channels in steps of 32 for two warp groups: with one, or with wider steps, registers
# spill on some GPU where a map's odd size allows no wide loads. Exact float32 products run on ordinary cores, whose
# operands live in registers: half the step, and half the channels of a map's gradient.
POSITIONS = 64
OUTPUTS = 64
CHANNELS = 64
GRADIENT_CHANNELS = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
INNER = {torch.float32: 16, torch.float16: 32, torch.bfloat16: 32}
WARPS = 8
# The weight gradient sums over all positions: split until the device is filled twice, by shapes alone so that results
# are the same on every GPU, and into no pieces smaller than this.
PROGRAMS = 264
LEAST_POSITIONS = 256
REDUCE_ELEMENTS = 128
REDUCE_ROWS = 16


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
    mean = tl.sum(tl.where(inside[:, None], x, 0.0), 0) / count
    difference = tl.where(inside[:, None], x - mean[None, :], 0.0)
    # The mean's own rounding matters where it is large against the spread; what it left over is added back.
    slip = tl.sum(difference, 0) / count
    return mean + slip, tl.sum(difference * difference, 0) - count * slip * slip


@triton.jit
def concat_conv1x1_fwd_kernel(
    features, weights, outs, partial, positions, spatial, total_outputs,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One [positions, outputs] tile: the sum over maps and channels; its moments too where `partial` is given."""
    which, begin = locate(outs.channels, tl.program_id(1), OUTPUTS)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    o = begin + tl.arange(0, OUTPUTS)
    inside, wanted = (p < positions)[:, None], (o < pick(outs.channels, which))[None, :]
    columns = pick_pointer(weights.pointers, which) + o[None, :] * pick(weights.o, which)
    weight_c = pick(weights.c, which)
    total = tl.zeros((POSITIONS, OUTPUTS), tl.float32)
    for s in tl.static_range(len(features.pointers)):
        rows = features.pointers[s] + at(p, spatial, features.b[s], features.n[s])[:, None]
        # A map of another product gives no step.
        for start in range(0, tl.where(which == features.owners[s], features.channels[s], 0), INNER):
            c = start + tl.arange(0, INNER)
            present = c < features.channels[s]
            x = tl.load(rows + c[None, :] * features.c[s], mask=inside & present[None, :], other=0.0)
            w = tl.load(
                columns + (features.inner[s] + c)[:, None] * weight_c, mask=wanted & present[:, None], other=0.0
            )
            total = tl.dot(x, w.to(x.dtype), total, input_precision=PRECISION)
    offsets = at(p, spatial, pick(outs.b, which), pick(outs.n, which))[:, None] + o[None, :] * pick(outs.c, which)
    tl.store(pick_pointer(outs.pointers, which) + offsets, total, mask=inside & wanted)
    if partial is not None:
        there = o < pick(outs.channels, which)
        store_moments(partial, total, pick(outs.first, which) + o, p < positions, there, total_outputs)


@triton.jit
def concat_conv1x1_bwd_features_kernel(
    grads, weights, gradients, positions, spatial,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One [positions, channels] tile of one map's gradient: the sum over outputs."""
    which, begin = locate(gradients.channels, tl.program_id(1), CHANNELS)
    owner = pick(gradients.owners, which)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = begin + tl.arange(0, CHANNELS)
    inside, present = (p < positions)[:, None], (c < pick(gradients.channels, which))[None, :]
    outputs, grad_o, weight_o = pick(grads.channels, owner), pick(grads.c, owner), pick(weights.o, owner)
    rows = pick_pointer(grads.pointers, owner) + at(p, spatial, pick(grads.b, owner), pick(grads.n, owner))[:, None]
    columns = pick_pointer(weights.pointers, owner)
    columns += (pick(gradients.inner, which) + c)[None, :] * pick(weights.c, owner)
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for start in range(0, outputs, INNER):
        o = start + tl.arange(0, INNER)
        g = tl.load(rows + o[None, :] * grad_o, mask=inside & (o < outputs)[None, :], other=0.0)
        w = tl.load(columns + o[:, None] * weight_o, mask=present & (o < outputs)[:, None], other=0.0)
        total = tl.dot(g, w.to(g.dtype), total, input_precision=PRECISION)
    offsets = at(p, spatial, pick(gradients.b, which), pick(gradients.n, which))[:, None]
    offsets += c[None, :] * pick(gradients.c, which)
    tl.store(pick_pointer(gradients.pointers, which) + offsets, total, mask=inside & present)


@triton.jit
def concat_conv1x1_bwd_weight_kernel(
    grads, features, partials, inputs, positions, spatial, chunk,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One [outputs, channels] tile of a weight's gradient, summed over one chunk of positions."""
    which, begin = locate(features.channels, tl.program_id(0), CHANNELS)
    owner, split = pick(features.owners, which), tl.program_id(2)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    c = begin + tl.arange(0, CHANNELS)
    outputs = pick(grads.channels, owner)
    wanted, present = (o < outputs)[:, None], (c < pick(features.channels, which))[None, :]
    rows = pick_pointer(grads.pointers, owner) + o[:, None] * pick(grads.c, owner)
    columns = pick_pointer(features.pointers, which) + c[None, :] * pick(features.c, which)
    grad_b, grad_n = pick(grads.b, owner), pick(grads.n, owner)
    stride_b, stride_n = pick(features.b, which), pick(features.n, which)
    # The grid is as wide as the widest product: beyond its own outputs a product has nothing to add.
    end = tl.where(tl.program_id(1) * OUTPUTS < outputs, tl.minimum((split + 1) * chunk, positions), 0)
    total = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    for start in range(split * chunk, end, POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        inside = p < positions
        g = tl.load(rows + at(p, spatial, grad_b, grad_n)[None, :], mask=inside[None, :] & wanted, other=0.0)
        x = tl.load(columns + at(p, spatial, stride_b, stride_n)[:, None], mask=inside[:, None] & present, other=0.0)
        total = tl.dot(g, x, total, input_precision=PRECISION)
    offsets = (split.to(tl.int64) * outputs + o)[:, None] * pick(inputs, owner) + pick(features.inner, which)
    tl.store(pick_pointer(partials, owner) + offsets + c[None, :], total, mask=wanted & present)


@triton.jit
def concat_conv1x1_bwd_reduce_kernel(sums, ELEMENTS: tl.constexpr, ROWS: tl.constexpr):
    """The sum of each [parts, rows, columns] over its parts, in a fixed order."""
    which, begin = locate(sums.elements, tl.program_id(0), ELEMENTS)
    i = begin + tl.arange(0, ELEMENTS)
    parts, elements, inner = pick(sums.parts, which), pick(sums.elements, which), pick(sums.columns, which)
    partial = pick_pointer(sums.partials, which)
    total = tl.zeros((ELEMENTS,), tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        mask = (part < parts)[:, None] & (i < elements)[None, :]
        total += tl.sum(tl.load(partial + part.to(tl.int64)[:, None] * elements + i[None, :], mask=mask, other=0.0), 0)
    offsets = (i // inner) * pick(sums.row, which) + (i % inner) * pick(sums.column, which)
    tl.store(pick_pointer(sums.outs, which) + offsets, total, mask=i < elements)


class Sums(NamedTuple):
    """Partial sums [parts, rows, columns] in float32, the tensors that take their totals, and the strides of these."""

    partials: tuple
    parts: tuple
    elements: tuple
    columns: tuple
    outs: tuple
    row: tuple
    column: tuple


def precision(x: Tensor) -> str:
    """How products of a dtype are taken: float32 exactly, unless the user lets matrix products use TF32."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and x.dtype == torch.float32 else "ieee"


def width_of(channels: int, most: int) -> int:
    """Width of a channel tile: a power of two between 16, the least of a matrix product, and `most`."""
    return min(most, max(16, triton.next_power_of_2(channels)))


def launch_fwd(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    """See `fastfuse::concat_conv1x1_fwd`."""
    out = empty_map(features[0], weight.shape[0])
    if out.numel():
        convolve([features], [weight], [out], None)
    return out


def convolve(
    features: Sequence[Sequence[Tensor]], weights: Sequence[Tensor], outs: Sequence[Tensor], partial: Tensor | None
) -> None:
    """The products of all modules; moments of each tile of POSITIONS positions go to `partial` [2, tiles, C_out]."""
    batch, _, height, width = outs[0].shape
    positions, table = batch * height * width, table_of([[x] for x in outs])
    columns = width_of(max(table.channels), OUTPUTS)
    concat_conv1x1_fwd_kernel[(triton.cdiv(positions, POSITIONS), tiles(table, columns))](
        table_of(features), weights_of(weights), table, partial, positions, height * width, sum(table.channels),
        PRECISION=precision(outs[0]), POSITIONS=POSITIONS, OUTPUTS=columns, INNER=INNER[outs[0].dtype],
        num_warps=WARPS,
    )  # fmt: skip


def launch_bwd(
    grad: Tensor, features: Sequence[Tensor], weight: Tensor, needs_features: Sequence[bool], needs_weight: bool
) -> list[Tensor]:
    """See `fastfuse::concat_conv1x1_bwd`."""
    gradients = [empty_map(x) if needed else None for x, needed in zip(features, needs_features, strict=True)]
    found = [x for x in gradients if x is not None]
    if any(x.numel() for x in found):
        bwd_features([grad], [weight], some_of(table_of([features]), gradients))
    if needs_weight:
        found.append(torch.empty_like(weight))
        if weight.numel():
            add_parts([(bwd_weights([grad], [features])[0], found[-1], *found[-1].stride()[:2])])
    return found


def bwd_features(grads: Sequence[Tensor], weights: Sequence[Tensor], gradients: Maps) -> None:
    """Fill the gradients of maps, given the gradient of each module's product."""
    (batch, _, height, width), dtype = grads[0].shape, grads[0].dtype
    positions, columns = batch * height * width, width_of(max(gradients.channels), GRADIENT_CHANNELS[dtype])
    concat_conv1x1_bwd_features_kernel[(triton.cdiv(positions, POSITIONS), tiles(gradients, columns))](
        table_of([[x] for x in grads]), weights_of(weights), gradients, positions, height * width,
        PRECISION=precision(grads[0]), POSITIONS=POSITIONS, CHANNELS=columns, INNER=INNER[dtype],
        num_warps=WARPS,
    )  # fmt: skip


def bwd_weights(grads: Sequence[Tensor], features: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Parts [parts, C_out, C] of the gradient of each module's weight."""
    (batch, _, height, width), dtype = grads[0].shape, grads[0].dtype
    positions, table, outs = batch * height * width, table_of(features), table_of([[x] for x in grads])
    rows, columns = width_of(max(outs.channels), OUTPUTS), width_of(max(table.channels), CHANNELS)
    grid = tiles(table, columns), triton.cdiv(max(outs.channels), rows)
    chunk = max(LEAST_POSITIONS, triton.cdiv(positions, triton.cdiv(PROGRAMS, grid[0] * grid[1])))
    chunk = triton.cdiv(chunk, INNER[dtype]) * INNER[dtype]
    parts = max(1, triton.cdiv(positions, chunk))
    inputs = tuple(sum(x.shape[1] for x in maps) for maps in features)
    sizes = zip(outs.channels, inputs, strict=True)
    partials = [torch.empty((parts, *size), dtype=torch.float32, device=grads[0].device) for size in sizes]
    concat_conv1x1_bwd_weight_kernel[(*grid, parts)](
        outs, table, tuple(partials), inputs, positions, height * width, chunk,
        PRECISION=precision(grads[0]), POSITIONS=INNER[dtype], OUTPUTS=rows, CHANNELS=columns, num_warps=WARPS,
    )  # fmt: skip
    return partials


def add_parts(sums: Sequence[tuple[Tensor, Tensor, int, int]]) -> None:
    """Totals of partial sums [parts, rows, columns] into tensors with the strides given; one launch per dtype."""
    for dtype in dict.fromkeys(out.dtype for _, out, _, _ in sums):
        partials, outs, row, column = zip(*(entry for entry in sums if entry[1].dtype == dtype), strict=True)
        parts, columns = tuple(x.shape[0] for x in partials), tuple(x.shape[2] for x in partials)
        elements = tuple(x.shape[1] * x.shape[2] for x in partials)
        programs = sum(triton.cdiv(n, REDUCE_ELEMENTS) for n in elements)
        table = Sums(partials, parts, elements, columns, outs, row, column)
        concat_conv1x1_bwd_reduce_kernel[(programs,)](table, ELEMENTS=REDUCE_ELEMENTS, ROWS=REDUCE_ROWS)
