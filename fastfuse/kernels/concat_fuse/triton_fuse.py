"""concat_fuse in Triton: kernels. The 1x1 products are those of concat_conv1x1; the launchers are in triton_launch.py.

The depthwise output is never stored: it is computed again, unrounded, wherever it is needed (9 products a value).
Statistics are taken per tile as mean and sum of squared differences, and merged by Chan's formula in a fixed order.
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import pick, pick_pointer
from fastfuse.kernels.concat_fuse.triton_kernels import at, locate, store_moments


@triton.jit
def convolve(
    base, stride_n, taps, tap_i, tap_j, row, column, height, width, inside, present,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A 3x3 stencil on the tile that `base` points to; its weights, per channel, begin at `taps`."""
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for i in tl.static_range(3):
        in_row = inside & (row + i >= 1) & (row + i <= height)
        for j in tl.static_range(3):
            there = in_row & (column + j >= 1) & (column + j <= width)
            shift = ((i - 1) * width + (j - 1)) * stride_n
            x = tl.load(base + shift, mask=there[:, None] & present[None, :], other=0.0)
            k = tl.load(taps + i * tap_i + j * tap_j, mask=present, other=0.0)
            total += x.to(tl.float32) * k.to(tl.float32)[None, :]
    return total


@triton.jit
def filtered_tile(
    features, strides_b, strides_c, strides_n, channels, firsts, depthwise, tap_c, tap_i, tap_j,
    positions, height, width, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Depthwise output of this program's tile, with its positions and channels of the concatenation and their masks."""
    which, begin = locate(channels, tl.program_id(1), CHANNELS)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = begin + tl.arange(0, CHANNELS)
    inside, present = p < positions, c < pick(channels, which)
    stride_n = pick(strides_n, which)
    base = pick_pointer(features, which) + c[None, :] * pick(strides_c, which)
    base += at(p, height * width, pick(strides_b, which), stride_n)[:, None]
    c += pick(firsts, which)
    z = convolve(
        base, stride_n, depthwise + c * tap_c, tap_i, tap_j, p % (height * width) // width, p % width, height, width,
        inside, present, POSITIONS, CHANNELS,
    )  # fmt: skip
    return z, p, c, inside, present


@triton.jit
def standardise(x, mean, var, eps, c, present):
    """A tile minus its channels' means, over their standard deviations; and the inverse of the latter."""
    inverse = tl.rsqrt(tl.load(var + c, mask=present, other=1.0).to(tl.float32) + eps)
    centre = tl.load(mean + c, mask=present, other=0.0).to(tl.float32)
    return (x - centre[None, :]) * inverse[None, :], inverse


@triton.jit
def scale_shift_relu(x, weight, bias, c, present):
    """relu(weight x + bias) per channel; NaN stays NaN, as in torch."""
    scale = tl.load(weight + c, mask=present, other=0.0).to(tl.float32)
    y = x * scale[None, :] + tl.load(bias + c, mask=present, other=0.0).to(tl.float32)[None, :]
    return tl.where(y < 0, 0.0, y)


@triton.jit
def store_or_apply(
    g, x, inverse, weight, partial, sums, out, offsets, mask, c, present, positions, total_channels, BATCH: tl.constexpr
):
    """Backward of a batch norm on a tile of cotangents `g` and standardised values `x`.

    Where `partial` [2, tiles, C] is given, the tile's sums of g and of g x; else, with their totals in `sums` [2, C]
    where the batch's statistics were used, the gradient of the norm's input.
    """
    if partial is not None:
        # These sums cancel (a norm's gradients have none): float64 keeps them as good as eager's.
        place = partial + tl.program_id(0) * total_channels + c
        tl.store(place, tl.sum(g.to(tl.float64), 0), mask=present)
        tl.store(place + tl.num_programs(0) * total_channels, tl.sum((g * x).to(tl.float64), 0), mask=present)
    else:
        if BATCH:
            of_bias = tl.load(sums + c, mask=present, other=0.0) / positions
            of_weight = tl.load(sums + total_channels + c, mask=present, other=0.0) / positions
            g -= of_bias[None, :] + x * of_weight[None, :]
        scale = tl.load(weight + c, mask=present, other=0.0).to(tl.float32) * inverse
        tl.store(out + offsets, g * scale[None, :], mask=mask)


@triton.jit
def concat_fuse_fwd_depthwise_kernel(
    features, strides_b, strides_c, strides_n, channels, firsts, depthwise, tap_c, tap_i, tap_j,
    mean, var, eps, weight, bias, hidden, hidden_b, hidden_c, hidden_n, partial,
    positions, height, width, total_channels, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Moments of the depthwise output's tiles where `partial` is given, else relu(batch norm) of it into `hidden`."""
    z, p, c, inside, present = filtered_tile(
        features, strides_b, strides_c, strides_n, channels, firsts, depthwise, tap_c, tap_i, tap_j,
        positions, height, width, POSITIONS, CHANNELS,
    )  # fmt: skip
    if partial is not None:
        store_moments(partial, z, c, inside, present, total_channels)
    else:
        x, _ = standardise(z, mean, var, eps, c, present)
        offsets = at(p, height * width, hidden_b, hidden_n)[:, None] + c[None, :] * hidden_c
        y = scale_shift_relu(x, weight, bias, c, present)
        tl.store(hidden + offsets, y, mask=inside[:, None] & present[None, :])


@triton.jit
def concat_fuse_fwd_merge_kernel(
    partial, statistics, running_mean, running_var, momentum, tiles, tile_positions, positions, channels,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of the batch from its tiles' moments; running statistics as torch updates them."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    present = c < channels
    near = tl.load(partial + c, mask=present, other=0.0)
    total = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        count = tl.minimum(positions - tile * tile_positions, tile_positions).to(tl.float32)[:, None]
        mask = (tile < tiles)[:, None] & present[None, :]
        place = partial + tile[:, None] * channels + c[None, :]
        apart = tl.load(place, mask=mask, other=0.0) - near[None, :]
        total += tl.sum(tl.where(mask, apart * count, 0.0), 0)
    mean = near + total / positions
    squares = tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        count = tl.minimum(positions - tile * tile_positions, tile_positions).to(tl.float32)[:, None]
        mask = (tile < tiles)[:, None] & present[None, :]
        place = partial + tile[:, None] * channels + c[None, :]
        apart = tl.load(place, mask=mask, other=0.0) - mean[None, :]
        within = tl.load(place + tiles * channels, mask=mask, other=0.0)
        squares += tl.sum(tl.where(mask, within + apart * apart * count, 0.0), 0)
    tl.store(statistics + c, mean, mask=present)
    tl.store(statistics + channels + c, squares / positions, mask=present)
    old = tl.load(running_mean + c, mask=present, other=0.0).to(tl.float32)
    tl.store(running_mean + c, (1 - momentum) * old + momentum * mean, mask=present)
    old = tl.load(running_var + c, mask=present, other=0.0).to(tl.float32)
    tl.store(running_var + c, (1 - momentum) * old + momentum * squares / (positions - 1), mask=present)


@triton.jit
def concat_fuse_fwd_finish_kernel(
    pre, pre_b, pre_c, pre_n, mean, var, eps, weight, bias, fused, fused_b, fused_c, fused_n, attention, pooled,
    spatial, outputs, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """relu(batch norm) of the 1x1 convolution at some positions of a sample, their attention, and their mean's part."""
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = block * POSITIONS + tl.arange(0, POSITIONS)
    inside = n < spatial
    energy = tl.zeros((POSITIONS,), tl.float32)
    for start in range(0, outputs, CHANNELS):
        c = start + tl.arange(0, CHANNELS)
        present = c < outputs
        mask = inside[:, None] & present[None, :]
        x = tl.load(pre + sample * pre_b + n[:, None] * pre_n + c[None, :] * pre_c, mask=mask, other=0.0)
        x, _ = standardise(x.to(tl.float32), mean, var, eps, c, present)
        y = scale_shift_relu(x, weight, bias, c, present).to(fused.dtype.element_ty)
        tl.store(fused + sample * fused_b + n[:, None] * fused_n + c[None, :] * fused_c, y, mask=mask)
        y = tl.where(mask, y.to(tl.float32), 0.0)
        energy += tl.sum(y * y, 1)
        if pooled is not None:
            place = pooled + (block * tl.num_programs(0) + sample) * outputs + c
            tl.store(place, tl.sum(y, 0) / spatial, mask=present)
    if attention is not None:
        tl.store(attention + sample * spatial + n, energy / outputs, mask=inside)


@triton.jit
def concat_fuse_bwd_norm2_kernel(
    pre, pre_b, pre_c, pre_n, mean, var, eps, weight, bias,
    of_fused, fused_b, fused_c, fused_n, of_attention, attention_b, attention_n, of_pooled, pooled_b, pooled_c,
    partial, sums, out, out_b, out_c, out_n, positions, spatial, outputs,
    BATCH: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Cotangents of all results, through ReLU, and backward of the second norm: see store_or_apply."""
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    inside, present = p < positions, c < outputs
    mask = inside[:, None] & present[None, :]
    values = tl.load(pre + at(p, spatial, pre_b, pre_n)[:, None] + c[None, :] * pre_c, mask=mask, other=0.0)
    x, inverse = standardise(values.to(tl.float32), mean, var, eps, c, present)
    y = scale_shift_relu(x, weight, bias, c, present).to(values.dtype).to(tl.float32)
    g = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    if of_fused is not None:
        offsets = at(p, spatial, fused_b, fused_n)[:, None] + c[None, :] * fused_c
        g += tl.load(of_fused + offsets, mask=mask, other=0.0).to(tl.float32)
    if of_attention is not None:
        a = tl.load(of_attention + at(p, spatial, attention_b, attention_n), mask=inside, other=0.0)
        g += a.to(tl.float32)[:, None] * (y * (2.0 / outputs))
    if of_pooled is not None:
        offsets = (p // spatial).to(tl.int64)[:, None] * pooled_b + c[None, :] * pooled_c
        g += tl.load(of_pooled + offsets, mask=mask, other=0.0).to(tl.float32) / spatial
    g = tl.where((y <= 0) | ~mask, 0.0, g)
    offsets = at(p, spatial, out_b, out_n)[:, None] + c[None, :] * out_c
    store_or_apply(g, x, inverse, weight, partial, sums, out, offsets, mask, c, present, positions, outputs, BATCH)


@triton.jit
def concat_fuse_bwd_norm1_kernel(
    features, strides_b, strides_c, strides_n, channels, firsts, depthwise, tap_c, tap_i, tap_j,
    mean, var, eps, weight, bias, of_hidden, hidden_b, hidden_c, hidden_n, partial, sums,
    positions, height, width, total_channels,
    BATCH: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The same for the first norm, whose input is computed again; its gradient replaces that of its ReLU's output."""
    z, p, c, inside, present = filtered_tile(
        features, strides_b, strides_c, strides_n, channels, firsts, depthwise, tap_c, tap_i, tap_j,
        positions, height, width, POSITIONS, CHANNELS,
    )  # fmt: skip
    x, inverse = standardise(z, mean, var, eps, c, present)
    y = scale_shift_relu(x, weight, bias, c, present).to(of_hidden.dtype.element_ty)
    offsets = at(p, height * width, hidden_b, hidden_n)[:, None] + c[None, :] * hidden_c
    mask = inside[:, None] & present[None, :]
    g = tl.load(of_hidden + offsets, mask=mask, other=0.0).to(tl.float32)
    g = tl.where((y <= 0) | ~mask, 0.0, g)
    store_or_apply(
        g, x, inverse, weight, partial, sums, of_hidden, offsets, mask, c, present, positions, total_channels, BATCH
    )


@triton.jit
def concat_fuse_bwd_merge_kernel(
    partial, sums, of_weight, of_bias, tiles, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Totals [2, C] of the tiles' sums in a fixed order; they are the gradients of the norm's bias and weight."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    present = c < channels
    bias, weight = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, tiles, ROWS):
        tile = start + tl.arange(0, ROWS)
        mask = (tile < tiles)[:, None] & present[None, :]
        place = partial + tile[:, None] * channels + c[None, :]
        bias += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
        weight += tl.sum(tl.load(place + tiles * channels, mask=mask, other=0.0), 0)
    tl.store(sums + c, bias, mask=present)
    tl.store(sums + channels + c, weight, mask=present)
    tl.store(of_bias + c, bias, mask=present)
    tl.store(of_weight + c, weight, mask=present)


@triton.jit
def concat_fuse_bwd_features_kernel(
    grad, grad_b, grad_c, grad_n, depthwise, tap_c, tap_i, tap_j,
    gradients, strides_b, strides_c, strides_n, channels, firsts, positions, height, width,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A tile of one map's gradient: the stencil turned round, on the gradient of the depthwise output."""
    which, begin = locate(channels, tl.program_id(1), CHANNELS)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = begin + tl.arange(0, CHANNELS)
    inside, present = p < positions, c < pick(channels, which)
    whole = c + pick(firsts, which)
    total = convolve(
        grad + at(p, height * width, grad_b, grad_n)[:, None] + whole[None, :] * grad_c, grad_n,
        depthwise + whole * tap_c + 2 * tap_i + 2 * tap_j, -tap_i, -tap_j,
        p % (height * width) // width, p % width, height, width, inside, present, POSITIONS, CHANNELS,
    )  # fmt: skip
    offsets = at(p, height * width, pick(strides_b, which), pick(strides_n, which))[:, None]
    offsets += c[None, :] * pick(strides_c, which)
    tl.store(pick_pointer(gradients, which) + offsets, total, mask=inside[:, None] & present[None, :])


@triton.jit
def concat_fuse_bwd_depthwise_kernel(
    grad, grad_b, grad_c, grad_n, features, strides_b, strides_c, strides_n, channels, firsts, partial,
    positions, height, width, total_channels, chunk, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of channels' 3x3 weights, summed over one chunk of positions."""
    which, begin = locate(channels, tl.program_id(1), CHANNELS)
    c = begin + tl.arange(0, CHANNELS)
    present = c < pick(channels, which)
    stride_b, stride_n = pick(strides_b, which), pick(strides_n, which)
    columns = pick_pointer(features, which) + c[None, :] * pick(strides_c, which)
    c += pick(firsts, which)
    split, tap = tl.program_id(0), tl.arange(0, 16)
    total = tl.zeros((16, CHANNELS), tl.float32)
    for start in range(split * chunk, tl.minimum((split + 1) * chunk, positions), POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        inside, row, column = p < positions, p % (height * width) // width, p % width
        offsets = at(p, height * width, grad_b, grad_n)[:, None] + c[None, :] * grad_c
        g = tl.load(grad + offsets, mask=inside[:, None] & present[None, :], other=0.0).to(tl.float32)
        base = columns + at(p, height * width, stride_b, stride_n)[:, None]
        for i in tl.static_range(3):
            in_row = inside & (row + i >= 1) & (row + i <= height)
            for j in tl.static_range(3):
                there = in_row & (column + j >= 1) & (column + j <= width)
                mask = there[:, None] & present[None, :]
                x = tl.load(base + ((i - 1) * width + (j - 1)) * stride_n, mask=mask, other=0.0).to(tl.float32)
                total += tl.where((tap == 3 * i + j)[:, None], tl.sum(g * x, 0)[None, :], 0.0)
    offsets = (split * total_channels + c)[None, :] * 9 + tap[:, None]
    tl.store(partial + offsets, total, mask=(tap < 9)[:, None] & present[None, :])
