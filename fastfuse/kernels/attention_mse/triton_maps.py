"""Triton kernels of attention_map, and what they share with those of attention_mse: the walk over channels."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels import _triton
from fastfuse.kernels.attention_mse.layout import gradient_like

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
    tl.store(attention + sample * positions + position, squares / total, mask=inside)


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
    factor = tl.load(cotangent + place, mask=inside, other=0) * 2 / total
    for s in tl.static_range(len(features)):
        feature, gradient = features[s] + sample * strides[s][0], gradients[s] + sample * gradient_strides[s][0]
        rescale(
            feature, strides[s][1], strides[s][2], gradient, gradient_strides[s][1], gradient_strides[s][2], factor,
            channels[s], position, inside, BLOCK_C,
        )  # fmt: skip


def tile_sides(maps: Sequence[Tensor], tile: int) -> dict[str, int]:
    """BLOCK_C and BLOCK_N of a tile of so many elements: long along the contiguous axis, no larger than the maps."""
    channels = triton.next_power_of_2(max([x.shape[1] for x in maps if x.dim() == 4], default=1) or 1)
    extents = [x.shape[-2] * x.shape[-1] for x in maps]
    positions = triton.next_power_of_2(max(extents) or 1)
    if any(x.dim() == 4 and x.stride(1) == 1 for x in maps):
        across = min(channels, LONG_SIDE)
        return {"BLOCK_C": across, "BLOCK_N": min(positions, tile // across)}
    across = min(positions, LONG_SIDE)
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
        attention_map_fwd_kernel[(batch, triton.cdiv(height * width, sides["BLOCK_N"]))](
            tuple(features), strides, channels, attention, height * width, sum(channels), **sides, num_warps=WARPS
        )  # fmt: skip
    return attention


def backward(cotangent: Tensor, wanted: Sequence[Tensor], total: int) -> list[Tensor]:
    """Gradients of those features that are wanted; `total` counts the channels of all. One launch."""
    gradients = [gradient_like(x) for x in wanted]
    batch, _, height, width = wanted[0].shape
    cotangent, stride_b, _, stride_n = _triton.map_strides(cotangent)
    channels, strides = tuple(x.shape[1] for x in wanted), _strides(wanted)
    sides = tile_sides(wanted, MAP_TILE)
    if cotangent.numel():
        attention_map_bwd_kernel[(batch, triton.cdiv(height * width, sides["BLOCK_N"]))](
            cotangent, (stride_b, stride_n), tuple(wanted), strides, tuple(gradients), _strides(gradients), channels,
            height * width, total, **sides, num_warps=WARPS,
        )  # fmt: skip
    return gradients
