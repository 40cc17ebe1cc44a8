"""concat_conv1x1 in Triton: one matrix product per output tile that walks through the maps, no concatenation.

Positions of all samples are numbered through (p = b N + n) and channels of all maps likewise; a map is addressed by its
three strides, so contiguous and channels-last maps take the same code. Sums run in float32 and in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._device import pick, pick_pointer
from fastfuse.kernels._triton import map_strides
from fastfuse.kernels.concat_fuse.layout import empty_map, gradient_of

# Tiles of 64 positions by 64 channels in steps of 32: a warp group's matrix instruction, and no spilled registers where
# an odd map size allows no wide loads. Exact float32 products run on ordinary cores and take twice the warps for that.
POSITIONS = 64
OUTPUTS = 64
CHANNELS = 64
INNER = 32
WARPS = {torch.float32: 8, torch.float16: 4, torch.bfloat16: 4}
# The weight gradient sums over all positions: split until the device is filled twice, by shapes alone so that results
# are the same on every GPU, and into no pieces smaller than this.
PROGRAMS = 264
LEAST_POSITIONS = 256
REDUCE_ELEMENTS = 128
REDUCE_ROWS = 16


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


@triton.jit
def store_moments(partial, x, c, inside, present, channels):
    """Mean and sum of squared differences from it, per channel, of a tile [positions, channels] into [2, tiles, C]."""
    count = tl.sum(inside.to(tl.float32))
    mean = tl.sum(tl.where(inside[:, None], x, 0.0), 0) / count
    difference = tl.where(inside[:, None], x - mean[None, :], 0.0)
    # The mean's own rounding matters where it is large against the spread; what it left over is added back.
    slip = tl.sum(difference, 0) / count
    squares = tl.sum(difference * difference, 0) - count * slip * slip
    place = partial + tl.program_id(0) * channels + c
    tl.store(place, mean + slip, mask=present)
    tl.store(place + tl.num_programs(0) * channels, squares, mask=present)


@triton.jit
def concat_conv1x1_fwd_kernel(
    features, strides_b, strides_c, strides_n, channels, weight, weight_o, weight_c,
    out, out_b, out_c, out_n, partial, positions, spatial, outputs,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One [positions, outputs] tile: the sum over maps and channels; its moments too where `partial` is given."""
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    inside, wanted = (p < positions)[:, None], (o < outputs)[None, :]
    total = tl.zeros((POSITIONS, OUTPUTS), tl.float32)
    first = 0
    for s in tl.static_range(len(features)):
        rows = features[s] + at(p, spatial, strides_b[s], strides_n[s])[:, None]
        for start in range(0, channels[s], INNER):
            c = start + tl.arange(0, INNER)
            present = c < channels[s]
            x = tl.load(rows + c[None, :] * strides_c[s], mask=inside & present[None, :], other=0.0)
            w = tl.load(
                weight + o[None, :] * weight_o + (first + c)[:, None] * weight_c,
                mask=wanted & present[:, None],
                other=0.0,
            )
            total = tl.dot(x, w.to(x.dtype), total, input_precision=PRECISION)
        first += channels[s]
    offsets = at(p, spatial, out_b, out_n)[:, None] + o[None, :] * out_c
    tl.store(out + offsets, total, mask=inside & wanted)
    if partial is not None:
        store_moments(partial, total, o, p < positions, o < outputs, outputs)


@triton.jit
def concat_conv1x1_bwd_features_kernel(
    grad, grad_b, grad_o, grad_n, weight, weight_o, weight_c,
    gradients, strides_b, strides_c, strides_n, channels, firsts, positions, spatial, outputs,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One [positions, channels] tile of one map's gradient: the sum over outputs."""
    which, begin = locate(channels, tl.program_id(1), CHANNELS)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = begin + tl.arange(0, CHANNELS)
    inside, present = (p < positions)[:, None], (c < pick(channels, which))[None, :]
    rows = grad + at(p, spatial, grad_b, grad_n)[:, None]
    columns = weight + (pick(firsts, which) + c)[None, :] * weight_c
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for start in range(0, outputs, INNER):
        o = start + tl.arange(0, INNER)
        g = tl.load(rows + o[None, :] * grad_o, mask=inside & (o < outputs)[None, :], other=0.0)
        w = tl.load(columns + o[:, None] * weight_o, mask=present & (o < outputs)[:, None], other=0.0)
        total = tl.dot(g, w.to(g.dtype), total, input_precision=PRECISION)
    offsets = at(p, spatial, pick(strides_b, which), pick(strides_n, which))[:, None]
    offsets += c[None, :] * pick(strides_c, which)
    tl.store(pick_pointer(gradients, which) + offsets, total, mask=inside & present)


@triton.jit
def concat_conv1x1_bwd_weight_kernel(
    grad, grad_b, grad_o, grad_n, features, strides_b, strides_c, strides_n, channels, firsts,
    partial, positions, spatial, outputs, inputs, chunk,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One [outputs, channels] tile of the weight's gradient, summed over one chunk of positions."""
    which, begin = locate(channels, tl.program_id(0), CHANNELS)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    c = begin + tl.arange(0, CHANNELS)
    split = tl.program_id(2)
    wanted, present = (o < outputs)[:, None], (c < pick(channels, which))[None, :]
    columns = pick_pointer(features, which) + c[None, :] * pick(strides_c, which)
    stride_b, stride_n = pick(strides_b, which), pick(strides_n, which)
    total = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, positions), POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        inside = p < positions
        g = tl.load(
            grad + at(p, spatial, grad_b, grad_n)[None, :] + o[:, None] * grad_o,
            mask=inside[None, :] & wanted,
            other=0.0,
        )
        x = tl.load(columns + at(p, spatial, stride_b, stride_n)[:, None], mask=inside[:, None] & present, other=0.0)
        total = tl.dot(g, x, total, input_precision=PRECISION)
    offsets = (split.to(tl.int64) * outputs + o)[:, None] * inputs + pick(firsts, which) + c[None, :]
    tl.store(partial + offsets, total, mask=wanted & present)


@triton.jit
def concat_conv1x1_bwd_reduce_kernel(
    partial, out, out_o, out_c, parts, elements, inputs, ELEMENTS: tl.constexpr, ROWS: tl.constexpr
):
    """The sum of [parts, outputs, inputs] over its parts, in a fixed order."""
    i = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
    total = tl.zeros((ELEMENTS,), tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        mask = (part < parts)[:, None] & (i < elements)[None, :]
        total += tl.sum(tl.load(partial + part.to(tl.int64)[:, None] * elements + i[None, :], mask=mask, other=0.0), 0)
    tl.store(out + (i // inputs) * out_o + (i % inputs) * out_c, total, mask=i < elements)


def precision(x: Tensor) -> str:
    """How products of a dtype are taken: float32 exactly, unless the user lets matrix products use TF32."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and x.dtype == torch.float32 else "ieee"


def width_of(channels: int, most: int) -> int:
    """Width of a channel tile: a power of two between 16, the least of a matrix product, and `most`."""
    return min(most, max(16, triton.next_power_of_2(channels)))


def columns(maps: Sequence[Tensor]) -> tuple[tuple, tuple, tuple, tuple]:
    """The maps as kernels take them, and their strides of sample, channel and position."""
    return tuple(zip(*(map_strides(x) for x in maps), strict=True))


def first_channels(maps: Sequence[Tensor]) -> tuple[int, ...]:
    """Where each map's channels begin in the concatenation."""
    return tuple(sum(x.shape[1] for x in maps[:s]) for s in range(len(maps)))


def tiles(maps: Sequence[Tensor], width: int) -> int:
    """How many channel tiles of a width all maps have together."""
    return sum(triton.cdiv(x.shape[1], width) for x in maps)


def launch_fwd(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    """See `fastfuse::concat_conv1x1_fwd`."""
    return convolved(features, weight, None)


def convolved(features: Sequence[Tensor], weight: Tensor, partial: Tensor | None) -> Tensor:
    """The convolution; moments of each tile of POSITIONS positions go to `partial` [2, tiles, C_out] where given."""
    out = empty_map(features[0], weight.shape[0])
    if out.numel() == 0:
        return out
    outputs, spatial = out.shape[1], out.shape[2] * out.shape[3]
    positions, width = out.shape[0] * spatial, width_of(outputs, OUTPUTS)
    concat_conv1x1_fwd_kernel[(triton.cdiv(positions, POSITIONS), triton.cdiv(outputs, width))](
        *columns(features), tuple(x.shape[1] for x in features), weight, weight.stride(0), weight.stride(1),
        *map_strides(out), partial, positions, spatial, outputs,
        PRECISION=precision(out), POSITIONS=POSITIONS, OUTPUTS=width, INNER=INNER, num_warps=WARPS[out.dtype],
    )  # fmt: skip
    return out


def launch_bwd(
    grad: Tensor, features: Sequence[Tensor], weight: Tensor, needs_features: Sequence[bool], needs_weight: bool
) -> list[Tensor]:
    """See `fastfuse::concat_conv1x1_bwd`."""
    gradients = [gradient_of(x) if needed else None for x, needed in zip(features, needs_features, strict=True)]
    found = [x for x in gradients if x is not None]
    firsts = [first for first, x in zip(first_channels(features), gradients, strict=True) if x is not None]
    if any(x.numel() for x in found):
        bwd_features(grad, weight, found, tuple(firsts))
    return [*found, bwd_weight(grad, features, weight)] if needs_weight else found


def bwd_features(grad: Tensor, weight: Tensor, gradients: list[Tensor], firsts: tuple[int, ...]) -> None:
    """Fill the gradients of maps whose channels begin at `firsts` in the concatenation."""
    channels = tuple(x.shape[1] for x in gradients)
    spatial = grad.shape[2] * grad.shape[3]
    positions, width = grad.shape[0] * spatial, width_of(max(channels), CHANNELS)
    concat_conv1x1_bwd_features_kernel[(triton.cdiv(positions, POSITIONS), tiles(gradients, width))](
        *map_strides(grad), weight, weight.stride(0), weight.stride(1),
        *columns(gradients), channels, firsts, positions, spatial, grad.shape[1],
        PRECISION=precision(grad), POSITIONS=POSITIONS, CHANNELS=width, INNER=INNER, num_warps=WARPS[grad.dtype],
    )  # fmt: skip


def bwd_weight(grad: Tensor, features: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The weight's gradient, in its dtype."""
    out = torch.empty_like(weight)
    if out.numel() == 0:
        return out
    channels, (outputs, inputs) = tuple(x.shape[1] for x in features), weight.shape[:2]
    spatial = grad.shape[2] * grad.shape[3]
    positions, rows, width = grad.shape[0] * spatial, width_of(outputs, OUTPUTS), width_of(max(channels), CHANNELS)
    grid = tiles(features, width), triton.cdiv(outputs, rows)
    chunk = max(LEAST_POSITIONS, triton.cdiv(positions, triton.cdiv(PROGRAMS, grid[0] * grid[1])))
    chunk = triton.cdiv(chunk, INNER) * INNER
    parts = max(1, triton.cdiv(positions, chunk))
    partial = torch.empty((parts, outputs, inputs), dtype=torch.float32, device=grad.device)
    concat_conv1x1_bwd_weight_kernel[(*grid, parts)](
        *map_strides(grad), *columns(features), channels, first_channels(features),
        partial, positions, spatial, outputs, inputs, chunk,
        PRECISION=precision(grad), POSITIONS=INNER, OUTPUTS=rows, CHANNELS=width, num_warps=WARPS[grad.dtype],
    )  # fmt: skip
    add_parts(partial, out, out.stride(0), out.stride(1))
    return out


def add_parts(partial: Tensor, out: Tensor, row_stride: int, column_stride: int) -> None:
    """The sum of the parts [parts, rows, columns] into `out`."""
    parts, rows, columns = partial.shape
    concat_conv1x1_bwd_reduce_kernel[(triton.cdiv(rows * columns, REDUCE_ELEMENTS),)](
        partial, out, row_stride, column_stride, parts, rows * columns, columns,
        ELEMENTS=REDUCE_ELEMENTS, ROWS=REDUCE_ROWS,
    )  # fmt: skip
