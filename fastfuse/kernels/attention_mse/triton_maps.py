"""Triton kernels of attention_map, and what they share with those of attention_mse: the walk over channels."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels import _triton
from fastfuse.kernels._device import divide
from fastfuse.kernels._limits import grid
from fastfuse.kernels._triton import map_like

# 32 elements for each of 256 threads: in bf16 four 16-byte loads in flight per thread.
TILE = 8192
# attention_map walks over several maps at once and needs the registers (8 bytes spilled on sm_100 with the full tile).
MAP_TILE = 4096
WARPS = 8
# The longer side of a tile along the contiguous axis: 128 bf16 channels or positions are two full cache lines.
LONG_SIDE = 128


@triton.jit
def square_sum(feature, stride_c, stride_n, channels, position, inside, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sum of squares over the channels of one sample at BLOCK_N positions, 0 outside the map."""
    squares = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = (channel < channels)[:, None] & inside[None, :]
        place = (channel * stride_c)[:, None] + (position * stride_n)[None, :]
        x = tl.load(feature + place, mask=mask, other=0).to(tl.float32)
        squares += x * x
    return tl.sum(squares, 0)


@triton.jit
def rescale(
    feature, stride_c, stride_n, gradient, gradient_stride_c, gradient_stride_n, factor,
    channels, position, inside, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gradient = feature * factor for one sample at some positions; the factor is per position."""
    for first in range(0, channels, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        mask = (channel < channels)[:, None] & inside[None, :]
        place = (channel * stride_c)[:, None] + (position * stride_n)[None, :]
        x = tl.load(feature + place, mask=mask, other=0).to(tl.float32)
        place = (channel * gradient_stride_c)[:, None] + (position * gradient_stride_n)[None, :]
        tl.store(gradient + place, x * factor[None, :], mask=mask)


@triton.jit
def compare_maps(own, goal, positions, a_square, t_square, loss, stats, plane, BLOCK_N: tl.constexpr):
    """Squared distance of two attention maps of one sample in memory, each divided by its norm.

    a_square and t_square hold partial sums of the maps' squares. Stores the mean over positions and, `plane` apart in
    stats, both norms and the dots ah.(ah - th) and th.(th - ah) that the backward needs.
    """
    a_norm, t_norm = tl.sqrt_rn(tl.sum(a_square)), tl.sqrt_rn(tl.sum(t_square))
    a_scale, t_scale = tl.maximum(a_norm, 1e-12), tl.maximum(t_norm, 1e-12)
    square, a_dot = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    t_dot = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, positions, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        # Divided as eager divides: a product with 1 / |a| would let two maps of one position differ.
        a = tl.div_rn(tl.load(own + position, mask=position < positions, other=0), a_scale)
        t = tl.div_rn(tl.load(goal + position, mask=position < positions, other=0), t_scale)
        difference = a - t
        square += difference * difference
        a_dot += a * difference
        t_dot -= t * difference
    tl.store(loss, divide(tl.sum(square), positions))
    tl.store(stats, a_norm)
    tl.store(stats + plane, t_norm)
    tl.store(stats + 2 * plane, tl.sum(a_dot))
    tl.store(stats + 3 * plane, tl.sum(t_dot))


@triton.jit
def map_gradient(cotangent, strides, maps, half, stats, plane, row, pair, side, sample, start, position, positions):
    """Gradient with respect to one sample's attention map at some positions: 2 (e - (ah.e) ah) / (N |a|)."""
    place = pair * row + sample
    norm, other_norm = tl.load(stats + side * plane + place), tl.load(stats + (1 - side) * plane + place)
    dot = tl.load(stats + (2 + side) * plane + place)
    inside = position < positions
    # Scaled as in the forward, so that the dot, taken there, removes what rounding adds along ah.
    own = tl.load(maps + side * half + start + position, mask=inside, other=0)
    own = tl.div_rn(own, tl.maximum(norm, 1e-12))
    other = tl.load(maps + (1 - side) * half + start + position, mask=inside, other=0)
    other = tl.div_rn(other, tl.maximum(other_norm, 1e-12))
    # A map without a direction has no gradient; eager multiplies by 1e12 there.
    slope = tl.where(norm < 1e-12, 0.0, divide(2.0, tl.maximum(norm, 1e-12) * positions))
    upstream = tl.load(cotangent + pair * strides[0] + sample * strides[1])
    return slope * upstream * (own - other - dot * own)


@triton.jit
def attention_map_fwd_kernel(
    features, strides, channels, attention, positions, total, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):
    """One program per sample and BLOCK_N positions."""
    sample = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < positions
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for s in tl.static_range(len(features)):
        feature = features[s] + sample * strides[s][0]
        squares += square_sum(
            feature, strides[s][1], strides[s][2], channels[s], position, inside, BLOCK_C, BLOCK_N
        )  # fmt: skip
    tl.store(attention + sample * positions + position, divide(squares, total), mask=inside)


@triton.jit
def attention_map_bwd_kernel(
    cotangent, cotangent_strides, features, strides, gradients, gradient_strides, channels, positions, total,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per sample and BLOCK_N positions, for all the features that need it."""
    sample = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = position < positions
    place = sample * cotangent_strides[0] + position * cotangent_strides[1]
    factor = tl.load(cotangent + place, mask=inside, other=0) * divide(2.0, total)
    for s in tl.static_range(len(features)):
        feature, gradient = features[s] + sample * strides[s][0], gradients[s] + sample * gradient_strides[s][0]
        rescale(
            feature, strides[s][1], strides[s][2], gradient, gradient_strides[s][1], gradient_strides[s][2], factor,
            channels[s], position, inside, BLOCK_C,
        )  # fmt: skip


def tile_sides(maps: Sequence[Tensor], tile: int, long_side: int = LONG_SIDE) -> dict[str, int]:
    """BLOCK_C and BLOCK_N of a tile of so many elements: long along the contiguous axis, no larger than the maps."""
    channels = triton.next_power_of_2(max([x.shape[1] for x in maps if x.dim() == 4], default=1) or 1)
    extents = [x.shape[-2] * x.shape[-1] for x in maps]
    positions = triton.next_power_of_2(max(extents) or 1)
    if any(x.dim() == 4 and x.stride(1) == 1 for x in maps):
        across = min(channels, long_side)
        return {"BLOCK_C": across, "BLOCK_N": min(positions, tile // across)}
    across = min(positions, long_side)
    # Channels that start at odd places are loaded one by one, each with an address of its own: fewer fit the registers.
    if any(n % 16 for n in extents):
        tile //= 2
    return {"BLOCK_C": min(channels, tile // across), "BLOCK_N": across}


def _strides(maps: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
    return tuple(_triton.map_strides(x)[1:] for x in maps)


def forward(features: Sequence[Tensor]) -> Tensor:
    """[B, H, W] of S maps [B, C_s, H, W]: one launch, each map is read once."""
    batch, _, height, width = features[0].shape
    attention = features[0].new_empty((batch, height, width), dtype=torch.float32)
    channels, strides = tuple(x.shape[1] for x in features), _strides(features)
    sides = tile_sides(features, MAP_TILE)
    if attention.numel():
        programs = grid("features[0]", features[0], batch, triton.cdiv(height * width, sides["BLOCK_N"]))
        attention_map_fwd_kernel[programs](
            tuple(features), strides, channels, attention, height * width, sum(channels), **sides, num_warps=WARPS
        )  # fmt: skip
    return attention


def backward(cotangent: Tensor, wanted: Sequence[Tensor], total: int) -> list[Tensor]:
    """Gradients of those features that are wanted; `total` counts the channels of all. One launch."""
    gradients = [map_like(x) for x in wanted]
    batch, _, height, width = wanted[0].shape
    cotangent, stride_b, _, stride_n = _triton.map_strides(cotangent)
    channels, strides = tuple(x.shape[1] for x in wanted), _strides(wanted)
    sides = tile_sides(wanted, MAP_TILE)
    if cotangent.numel():
        programs = grid("features", wanted[0], batch, triton.cdiv(height * width, sides["BLOCK_N"]))
        attention_map_bwd_kernel[programs](
            cotangent, (stride_b, stride_n), tuple(wanted), strides, tuple(gradients), _strides(gradients), channels,
            height * width, total, **sides, num_warps=WARPS,
        )  # fmt: skip
    return gradients
