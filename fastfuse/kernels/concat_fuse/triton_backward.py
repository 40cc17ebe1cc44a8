"""concat_fuse in Triton: kernels of the backward; every launch serves all modules of a call.

A norm's backward takes two launches: sums over shares of the positions, then their totals and the input's gradient.
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import divide, pick, pick_pointer
from fastfuse.kernels.concat_fuse.triton_fuse import (
    at_channels,
    channel_tile,
    convolve,
    filtered,
    standardise,
)
from fastfuse.kernels.concat_fuse.triton_kernels import scale_shift_relu
from fastfuse.kernels.concat_fuse.triton_tables import at


@triton.jit
def norm_constants(norms, owner, c, present):
    """Mean, variance, scale and shift of a norm at some channels."""
    mean, var = at_channels(norms.mean, owner, c, present), at_channels(norms.var, owner, c, present)
    return mean, var, at_channels(norms.weight, owner, c, present), at_channels(norms.bias, owner, c, present)


@triton.jit
def total_sums(partial, shares, total_channels, c, present, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Totals of the shares' sums [2, shares, C] in a fixed order: of the cotangents, and of these times the values."""
    bias, weight = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    for start in range(0, shares, ROWS):
        share = start + tl.arange(0, ROWS)
        mask = (share < shares)[:, None] & present[None, :]
        place = partial + share[:, None] * total_channels + c[None, :]
        bias += tl.sum(tl.load(place, mask=mask, other=0.0), 0)
        weight += tl.sum(tl.load(place + shares * total_channels, mask=mask, other=0.0), 0)
    return bias, weight


@triton.jit
def store_totals(of_weights, of_biases, owner, c, present, weight, bias):
    """The totals are the gradients of a norm's weight and bias; one program per channel keeps them."""
    tl.store(pick_pointer(of_weights, owner) + c, weight, mask=present)
    tl.store(pick_pointer(of_biases, owner) + c, bias, mask=present)


@triton.jit
def second_cotangents(
    pre, cotangents, gives, which, c, present, p, inside, spatial, mean, var, eps, scale, shift,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Cotangents of all results at a tile, through the ReLU; the standardised values and the inverse deviations."""
    mask, outputs = inside[:, None] & present[None, :], pick(pre.channels, which)
    offsets = at(p, spatial, pick(pre.b, which), pick(pre.n, which))[:, None] + c[None, :] * pick(pre.c, which)
    values = tl.load(pick_pointer(pre.pointers, which) + offsets, mask=mask, other=0.0)
    x, inverse = standardise(values.to(tl.float32), mean, var, eps, present)
    y = scale_shift_relu(x, scale, shift).to(values.dtype).to(tl.float32)
    g = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    if cotangents.fused is not None:
        of = cotangents.fused
        offsets = at(p, spatial, pick(of.b, which), pick(of.n, which))[:, None] + c[None, :] * pick(of.c, which)
        there = mask & (c < outputs * pick(gives.fused, which))[None, :]
        g += tl.load(pick_pointer(of.pointers, which) + offsets, mask=there, other=0.0).to(tl.float32)
    if cotangents.attention is not None:
        of = cotangents.attention
        there = inside & (p * 0 < pick(gives.attention, which))
        offsets = at(p, spatial, pick(of.b, which), pick(of.n, which))
        a = tl.load(pick_pointer(of.pointers, which) + offsets, mask=there, other=0.0).to(tl.float32)
        g += a[:, None] * (y * divide(2.0, outputs))
    if cotangents.pooled is not None:
        of = cotangents.pooled
        there = mask & (c < outputs * pick(gives.pooled, which))[None, :]
        offsets = (p // spatial).to(tl.int64)[:, None] * pick(of.b, which) + c[None, :] * pick(of.c, which)
        pooled = tl.load(pick_pointer(of.pointers, which) + offsets, mask=there, other=0.0).to(tl.float32)
        g += pooled * divide(1.0, spatial)
    return tl.where((y <= 0) | ~mask, 0.0, g), x, inverse


@triton.jit
def concat_fuse_bwd_norm2_sums_kernel(
    pre, norms, cotangents, gives, partial, positions, spatial, total_channels, chunk,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums [2, shares, C] of the second norms' backward over this program's share of the positions."""
    which, _, c, _, whole, present = channel_tile(pre, CHANNELS)
    share, eps = tl.program_id(0), pick(norms.eps, which)
    mean, var, scale, shift = norm_constants(norms, which, c, present)
    # These sums cancel (a norm's gradients have none): float64 keeps them as good as eager's.
    bias, weight = tl.zeros((CHANNELS,), tl.float64), tl.zeros((CHANNELS,), tl.float64)
    for start in range(share * chunk, tl.minimum((share + 1) * chunk, positions), POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        g, x, _inverse = second_cotangents(
            pre, cotangents, gives, which, c, present, p, p < positions, spatial, mean, var, eps, scale, shift,
            POSITIONS, CHANNELS,
        )  # fmt: skip
        bias += tl.sum(g.to(tl.float64), 0)
        weight += tl.sum((g * x).to(tl.float64), 0)
    tl.store(partial + share * total_channels + whole, bias, mask=present)
    tl.store(partial + (tl.num_programs(0) + share) * total_channels + whole, weight, mask=present)


@triton.jit
def concat_fuse_bwd_norm2_kernel(
    pre, norms, cotangents, gives, partial, shares, of_weights, of_biases, outs, positions, spatial, total_channels,
    chunk, BATCH: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the second norms' parameters and, where `outs` are given, of their inputs."""
    which, _, c, _, whole, present = channel_tile(pre, CHANNELS)
    share = tl.program_id(0)
    bias, weight = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    if partial is not None:
        bias, weight = total_sums(partial, shares, total_channels, whole, present, ROWS, CHANNELS)
        if share == 0:
            store_totals(of_weights, of_biases, which, c, present, weight, bias)
    if outs is not None:
        eps = pick(norms.eps, which)
        mean, var, scale, shift = norm_constants(norms, which, c, present)
        out = pick_pointer(outs.pointers, which) + c[None, :] * pick(outs.c, which)
        for start in range(share * chunk, tl.minimum((share + 1) * chunk, positions), POSITIONS):
            p = start + tl.arange(0, POSITIONS)
            g, x, inverse = second_cotangents(
                pre, cotangents, gives, which, c, present, p, p < positions, spatial, mean, var, eps, scale, shift,
                POSITIONS, CHANNELS,
            )  # fmt: skip
            if BATCH:
                g -= divide(bias, positions)[None, :] + x * divide(weight, positions)[None, :]
            offsets = at(p, spatial, pick(outs.b, which), pick(outs.n, which))[:, None]
            tl.store(out + offsets, g * (scale * inverse)[None, :], mask=(p < positions)[:, None] & present[None, :])


@triton.jit
def first_cotangents(
    maps, taps, of_hidden, which, owner, c, inner, present, p, inside, height, width, mean, var, eps, scale, shift,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Cotangents of the first ReLU's output through it; the standardised values, made again, inverse deviations."""
    z = filtered(maps, which, taps, owner, c, inner, present, p, inside, height, width, POSITIONS, CHANNELS)
    x, inverse = standardise(z, mean, var, eps, present)
    y = scale_shift_relu(x, scale, shift).to(of_hidden.pointers[0].dtype.element_ty)
    offsets = at(p, height * width, pick(of_hidden.b, owner), pick(of_hidden.n, owner))[:, None]
    offsets += inner[None, :] * pick(of_hidden.c, owner)
    mask = inside[:, None] & present[None, :]
    place = pick_pointer(of_hidden.pointers, owner) + offsets
    g = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    return tl.where((y <= 0) | ~mask, 0.0, g), x, inverse, place


@triton.jit
def concat_fuse_bwd_norm1_sums_kernel(
    maps, taps, norms, of_hidden, partial, positions, height, width, total_channels, chunk,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums [2, shares, C] of the first norms' backward over this program's share of the positions."""
    which, owner, c, inner, whole, present = channel_tile(maps, CHANNELS)
    share, eps = tl.program_id(0), pick(norms.eps, owner)
    mean, var, scale, shift = norm_constants(norms, owner, inner, present)
    bias, weight = tl.zeros((CHANNELS,), tl.float64), tl.zeros((CHANNELS,), tl.float64)
    for start in range(share * chunk, tl.minimum((share + 1) * chunk, positions), POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        g, x, _inverse, _place = first_cotangents(
            maps, taps, of_hidden, which, owner, c, inner, present, p, p < positions, height, width, mean, var, eps,
            scale, shift, POSITIONS, CHANNELS,
        )  # fmt: skip
        bias += tl.sum(g.to(tl.float64), 0)
        weight += tl.sum((g * x).to(tl.float64), 0)
    tl.store(partial + share * total_channels + whole, bias, mask=present)
    tl.store(partial + (tl.num_programs(0) + share) * total_channels + whole, weight, mask=present)


@triton.jit
def concat_fuse_bwd_norm1_kernel(
    maps, taps, norms, of_hidden, partial, shares, of_weights, of_biases, positions, height, width, total_channels,
    chunk, BATCH: tl.constexpr, INPUT: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of the first norms' parameters; where `INPUT`, that of their input replaces the ReLU's output's."""
    which, owner, c, inner, whole, present = channel_tile(maps, CHANNELS)
    share = tl.program_id(0)
    bias, weight = tl.zeros((CHANNELS,), tl.float32), tl.zeros((CHANNELS,), tl.float32)
    if partial is not None:
        bias, weight = total_sums(partial, shares, total_channels, whole, present, ROWS, CHANNELS)
        if share == 0:
            store_totals(of_weights, of_biases, owner, inner, present, weight, bias)
    if INPUT:
        eps = pick(norms.eps, owner)
        mean, var, scale, shift = norm_constants(norms, owner, inner, present)
        for start in range(share * chunk, tl.minimum((share + 1) * chunk, positions), POSITIONS):
            p = start + tl.arange(0, POSITIONS)
            g, x, inverse, place = first_cotangents(
                maps, taps, of_hidden, which, owner, c, inner, present, p, p < positions, height, width, mean, var,
                eps, scale, shift, POSITIONS, CHANNELS,
            )  # fmt: skip
            if BATCH:
                g -= divide(bias, positions)[None, :] + x * divide(weight, positions)[None, :]
            tl.store(place, g * (scale * inverse)[None, :], mask=(p < positions)[:, None] & present[None, :])


@triton.jit
def concat_fuse_bwd_features_kernel(
    grads, taps, gradients, positions, height, width, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    """A tile of one map's gradient: the stencil turned round, on the gradient of the depthwise output."""
    which, owner, c, inner, _, present = channel_tile(gradients, CHANNELS)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    inside, spatial = p < positions, height * width
    base = pick_pointer(grads.pointers, owner) + inner[None, :] * pick(grads.c, owner)
    base += at(p, spatial, pick(grads.b, owner), pick(grads.n, owner))[:, None]
    tap_i, tap_j = pick(taps.i, owner), pick(taps.j, owner)
    weights = pick_pointer(taps.pointers, owner) + inner * pick(taps.c, owner) + 2 * tap_i + 2 * tap_j
    total = convolve(
        base, pick(grads.n, owner), weights, -tap_i, -tap_j, p % spatial // width, p % width, height, width,
        inside, present, POSITIONS, CHANNELS,
    )  # fmt: skip
    offsets = at(p, spatial, pick(gradients.b, which), pick(gradients.n, which))[:, None]
    offsets += c[None, :] * pick(gradients.c, which)
    tl.store(pick_pointer(gradients.pointers, which) + offsets, total, mask=inside[:, None] & present[None, :])


@triton.jit
def concat_fuse_bwd_depthwise_kernel(
    grads, maps, partials, positions, height, width, chunk, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Gradient of a tile of channels' 3x3 weights, summed over one share of the positions."""
    which, owner, c, inner, _, present = channel_tile(maps, CHANNELS)
    stride_b, stride_n, spatial = pick(maps.b, which), pick(maps.n, which), height * width
    columns = pick_pointer(maps.pointers, which) + c[None, :] * pick(maps.c, which)
    rows = pick_pointer(grads.pointers, owner) + inner[None, :] * pick(grads.c, owner)
    share, tap = tl.program_id(0), tl.arange(0, 16)
    total = tl.zeros((16, CHANNELS), tl.float32)
    for start in range(share * chunk, tl.minimum((share + 1) * chunk, positions), POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        inside, row, column = p < positions, p % spatial // width, p % width
        offsets = at(p, spatial, pick(grads.b, owner), pick(grads.n, owner))[:, None]
        g = tl.load(rows + offsets, mask=inside[:, None] & present[None, :], other=0.0).to(tl.float32)
        base = columns + at(p, spatial, stride_b, stride_n)[:, None]
        for i in tl.static_range(3):
            in_row = inside & (row + i >= 1) & (row + i <= height)
            for j in tl.static_range(3):
                there = in_row & (column + j >= 1) & (column + j <= width)
                mask = there[:, None] & present[None, :]
                x = tl.load(base + ((i - 1) * width + (j - 1)) * stride_n, mask=mask, other=0.0).to(tl.float32)
                total += tl.where((tap == 3 * i + j)[:, None], tl.sum(g * x, 0)[None, :], 0.0)
    offsets = (share.to(tl.int64) * pick(grads.channels, owner) + inner)[None, :] * 9 + tap[:, None]
    tl.store(pick_pointer(partials, owner) + offsets, total, mask=(tap < 9)[:, None] & present[None, :])
