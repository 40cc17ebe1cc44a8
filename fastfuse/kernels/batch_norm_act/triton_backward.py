"""Backward kernels of batch_norm_act. Programs own what they own in the forward.

The maps that are read travel as a tuple (x, gradient of the result, result), each but x None where there is none; the
strides are theirs and those of the gradients that are written. The gradient of the attention maps travels as `energy`
(map, strides of network, sample and position), the norm as its channels' (mean, reciprocal deviation, scale, shift).
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import divide
from fastfuse.kernels.batch_norm_act.triton_forward import own_channels, place


@triton.jit
def norm_of(statistics, weight, bias, channels, c, present):
    """What the forward did to the channels."""
    inverse = tl.load(statistics + channels + c, present, 0.0)
    scale = inverse * tl.load(weight + c, present, 0.0).to(tl.float32)
    return tl.load(statistics + c, present, 0.0), inverse, scale, tl.load(bias + c, present, 0.0).to(tl.float32)


@triton.jit
def incoming(maps, strides, energy, norm, p, spatial, group, group_channels, c, mask, inside, RELU: tl.constexpr):
    """Gradient of what went into the ReLU, and x minus its mean, on a tile; the former is 0 outside."""
    centred = tl.load(maps[0] + place(p, spatial, c, strides[0]), mask, 0.0).to(tl.float32) - norm[0][:, None]
    g = tl.zeros(mask.shape, tl.float32)
    if maps[1] is not None:
        g += tl.load(maps[1] + place(p, spatial, c, strides[1 % len(strides)]), mask, 0.0).to(tl.float32)
    if RELU or energy is not None:
        if maps[2] is not None:
            value = tl.load(maps[2] + place(p, spatial, c, strides[2 % len(strides)]), mask, 0.0).to(tl.float32)
        else:
            # The same operations and the same rounding as in the forward, so that both agree on where the ReLU cuts.
            value = centred * norm[2][:, None] + norm[3][:, None]
            value = value.to(maps[0].dtype.element_ty).to(tl.float32)
        if energy is not None:
            at = (p // spatial).to(tl.int64) * energy[1][1] + (p % spatial).to(tl.int64) * energy[1][2]
            at += group.to(tl.int64) * energy[1][0]
            slope = tl.load(energy[0] + at, inside, 0.0).to(tl.float32) * divide(2.0, group_channels)
            g += slope[None, :] * value
        if RELU:
            g = tl.where(value <= 0, 0.0, g)
    return tl.where(mask, g, 0.0), centred


@triton.jit
def gradient_sums(
    maps, strides, energy, norm, of_residual, of_x, first, last, spatial, group, group_channels, c, present,
    RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Per channel, from first to last: sums of the incoming gradient, and of its product with the normalised x.

    On the way, where they are asked for: the residual's gradient, and that of x where statistics are constants.
    """
    plain, product = tl.zeros((BLOCK_C, BLOCK_P), tl.float32), tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = p < last
        mask = present[:, None] & inside[None, :]
        g, centred = incoming(maps, strides, energy, norm, p, spatial, group, group_channels, c, mask, inside, RELU)
        if of_x is not None:
            tl.store(of_x + place(p, spatial, c, strides[3 % len(strides)]), g * norm[2][:, None], mask)
        if of_residual is not None:
            # What is stored is what is summed: the second kernel reads it back.
            rounded = g.to(of_residual.dtype.element_ty)
            tl.store(of_residual + place(p, spatial, c, strides[3 % len(strides)]), rounded, mask)
            g = rounded.to(tl.float32)
        plain += g
        product += tl.where(mask, g * centred, 0.0)
    # These sums cancel: added up in float64 they stay as good as eager's. A lane's own part is short.
    return tl.sum(plain.to(tl.float64), 1), tl.sum(product.to(tl.float64), 1) * norm[1]


@triton.jit
def batch_norm_act_bwd_sums_kernel(
    maps, strides, energy, weight, bias, statistics, of_residual, of_x, partial,
    spatial, positions, channels, group_channels, chunk,
    RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of a chunk into `partial` [2, tiles, channels]; see gradient_sums."""
    group, _, c, present = own_channels(group_channels, BLOCK_C)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, positions)
    norm = norm_of(statistics, weight, bias, channels, c, present)
    plain, product = gradient_sums(
        maps, strides, energy, norm, of_residual, of_x, first, last, spatial, group, group_channels, c, present,
        RELU, BLOCK_C, BLOCK_P,
    )  # fmt: skip
    at = partial + tl.program_id(1) * channels + c
    tl.store(at, plain, present)
    tl.store(at + tl.num_programs(1) * channels, product, present)


@triton.jit
def merged_sums(partial, tiles, channels, c, present, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """Sums of all chunks, in a fixed order."""
    plain, product = tl.zeros((BLOCK_C,), tl.float64), tl.zeros((BLOCK_C,), tl.float64)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        mask = (tile < tiles)[:, None] & present[None, :]
        at = partial + tile[:, None] * channels + c[None, :]
        plain += tl.sum(tl.load(at, mask, 0.0).to(tl.float64), 0)
        product += tl.sum(tl.load(at + tiles * channels, mask, 0.0).to(tl.float64), 0)
    return plain, product


@triton.jit
def batch_norm_act_bwd_input_kernel(
    maps, strides, energy, weight, bias, statistics, of_x, of_residual, of_weight, of_bias, partial, tiles,
    spatial, positions, channels, group_channels, chunk,
    SUMS: tl.constexpr, BATCH: tl.constexpr, RELU: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients that are asked for; of x through the batch's statistics (BATCH) or constant ones.

    The sums, where SUMS says that they are needed, are merged from `partial`, or without it taken here: then one chunk
    is the whole batch. The first chunk's programs write the norm's gradients.
    """
    group, _, c, present = own_channels(group_channels, BLOCK_C)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, positions)
    norm = norm_of(statistics, weight, bias, channels, c, present)
    average, slope = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    if SUMS:
        if partial is not None:
            plain, product = merged_sums(partial, tiles, channels, c, present, BLOCK_C, ROWS)
        else:
            plain, product = gradient_sums(
                maps, strides, energy, norm, None, None, first, last, spatial, group, group_channels, c, present,
                RELU, BLOCK_C, BLOCK_P,
            )  # fmt: skip
        if tl.program_id(1) == 0:
            if of_bias is not None:
                tl.store(of_bias + c, plain, present)
            if of_weight is not None:
                tl.store(of_weight + c, product, present)
        if BATCH and of_x is not None:
            average, slope = (plain / positions).to(tl.float32), (product / positions).to(tl.float32) * norm[1]
    if of_x is not None or of_residual is not None:
        for start in range(first, last, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            inside = p < last
            mask = present[:, None] & inside[None, :]
            g, centred = incoming(maps, strides, energy, norm, p, spatial, group, group_channels, c, mask, inside, RELU)
            if of_residual is not None:
                tl.store(of_residual + place(p, spatial, c, strides[3 % len(strides)]), g, mask)
            if of_x is not None:
                if BATCH:
                    g -= average[:, None] + centred * slope[:, None]
                tl.store(of_x + place(p, spatial, c, strides[3 % len(strides)]), g * norm[2][:, None], mask)
