"""Triton kernel of augment: gather, padding, mirror, crop and normalisation in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._limits import check_span, grid

# Elements of the result that a block writes, and the longest run of them along a row.
TILE = 2048
LONGEST_RUN = 256
WARPS = 4


@triton.jit
def _reflect(position, size: tl.constexpr):
    """Fold positions in 1 - size .. 2 * size - 2 back into 0 .. size - 1, the border itself not repeated."""
    return (size - 1) - tl.abs((size - 1) - tl.abs(position))


@triton.jit
def augment_fwd_kernel(
    images, image_strides, indices, index_stride, offsets, offset_strides, flips, flip_stride,
    mean, mean_stride, std, std_stride, result,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr, PADDING: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Write [BLOCK_R, BLOCK_X] elements of one sample, seen as [C H, W] or, channels-last, as [H, W C]."""
    rows: tl.constexpr = HEIGHT if CHANNELS_LAST else CHANNELS * HEIGHT
    length: tl.constexpr = WIDTH * CHANNELS if CHANNELS_LAST else WIDTH
    sample = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    x = (tl.program_id(2) * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]
    inside = (row < rows) & (x < length)
    # The divisions are by constants, and along one axis of the tile only.
    if CHANNELS_LAST:
        i, j, channel, exists = row, x // CHANNELS, x % CHANNELS, x < length
    else:
        i, j, channel, exists = row % HEIGHT, x, row // HEIGHT, row < rows
    offset = offsets + sample * offset_strides[0]
    i = _reflect((tl.load(offset).to(tl.int32) + i - PADDING), HEIGHT)
    j = tl.load(offset + offset_strides[1]).to(tl.int32) + j - PADDING
    j = _reflect(tl.where(tl.load(flips + sample * flip_stride) != 0, WIDTH - 1 - j, j), WIDTH)
    image = images + tl.load(indices + sample * index_stride).to(tl.int64) * image_strides[0]
    pixel = tl.load(image + i * image_strides[1] + j * image_strides[2] + channel * image_strides[3], inside, other=0)
    centre = tl.load(mean + channel * mean_stride, exists, other=0)
    scale = tl.load(std + channel * std_stride, exists, other=1)
    # Divisions rounded as IEEE demands, in the published order: the same bits as the reference.
    if result.dtype.element_ty == tl.float64:
        found = (pixel.to(tl.float64) / 255.0 - centre.to(tl.float64)) / scale.to(tl.float64)
    else:
        found = tl.div_rn(tl.div_rn(pixel.to(tl.float32), 255.0) - centre, scale)
    tl.store(result + sample * (rows * length) + row * length + x, found, inside)


def forward(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    mean: Tensor,
    std: Tensor,
    padding: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """[B, C, H, W] of `dtype`, channels-last or contiguous; every input may be a strided view."""
    height, width, channels = images.shape[1:]
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    shape = (indices.shape[0], channels, height, width)
    check_span(images, "images")
    result = torch.empty(shape, dtype=dtype, device=images.device, memory_format=memory_format)
    rows, length = (height, width * channels) if channels_last else (channels * height, width)
    block_x = min(triton.next_power_of_2(length), LONGEST_RUN)
    block_r = min(triton.next_power_of_2(rows), TILE // block_x)
    programs = indices.shape[0], triton.cdiv(rows, block_r), triton.cdiv(length, block_x)
    if result.numel():
        augment_fwd_kernel[grid("images", images, *programs)](
            images, images.stride(), indices, indices.stride(0), offsets, offsets.stride(), flips, flips.stride(0),
            mean, mean.stride(0), std, std.stride(0), result,
            HEIGHT=height, WIDTH=width, CHANNELS=channels, PADDING=padding,
            CHANNELS_LAST=channels_last, BLOCK_R=block_r, BLOCK_X=block_x, num_warps=WARPS,
        )  # fmt: skip
    return result
