"""Batch norm and ReLU of deep_to_shallow's stage, and the merging of what the programs summed up, in fixed order.

A map's strides travel as a tuple (sample, channel, position). Tuples of pointers hold one per transform.
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import divide, pick_pointer
from fastfuse.kernels.deep_to_shallow.triton_tiles import map_offsets, map_tile, relu


@triton.jit
def deep_to_shallow_fwd_statistics_kernel(
    partial, means_out, rstds, running_means, running_vars, tiles, count, momentum, eps, BLOCK: tl.constexpr
):
    """Merge the tiles' statistics of one channel in fixed order (Chan's formula); update the running statistics."""
    c, channels, t = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    partial += t.to(tl.int64) * (2 * channels + 1) * tiles
    means = partial + c * tiles
    squares, counts = means + channels * tiles, partial + 2 * channels * tiles
    # Means relative to the first tile's, so that their common part is not rounded in the sum.
    origin = tl.load(means)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        n = tl.load(counts + i, i < tiles, 0.0)
        total += n * (tl.load(means + i, i < tiles, 0.0) - origin)
    average = origin + divide(tl.sum(total, 0), count)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        i = start + tl.arange(0, BLOCK)
        deviation = tl.load(means + i, i < tiles, 0.0) - average
        n = tl.load(counts + i, i < tiles, 0.0)
        total += tl.load(squares + i, i < tiles, 0.0) + n * deviation * deviation
    deviations = tl.sum(total, 0)
    tl.store(pick_pointer(means_out, t) + c, average)
    tl.store(pick_pointer(rstds, t) + c, tl.div_rn(1.0, tl.sqrt_rn(divide(deviations, count) + eps)))
    running_mean, running_var = pick_pointer(running_means, t) + c, pick_pointer(running_vars, t) + c
    old = tl.load(running_mean).to(tl.float32)
    tl.store(running_mean, (1 - momentum) * old + momentum * average)
    old = tl.load(running_var).to(tl.float32)
    tl.store(running_var, (1 - momentum) * old + momentum * divide(deviations, count - 1))


@triton.jit
def _norm(gammas, betas, means, rstds, t, channels, BLOCK_C: tl.constexpr):
    """A program's channels, which of them exist, and per channel mean, reciprocal deviation, scale and shift."""
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = c < channels
    inverse = tl.load(pick_pointer(rstds, t) + c, known, 0.0)
    scale = inverse * tl.load(pick_pointer(gammas, t) + c, known, 0.0).to(tl.float32)
    shift = tl.load(pick_pointer(betas, t) + c, known, 0.0).to(tl.float32)
    return c, known, tl.load(pick_pointer(means, t) + c, known, 0.0), inverse, scale, shift


@triton.jit
def deep_to_shallow_fwd_normalise_kernel(
    normed, out, gammas, betas, means, rstds, positions, channels, strides,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Batch norm with the merged statistics, and ReLU."""
    t = tl.program_id(2)
    c, _, mean, _, scale, shift = _norm(gammas, betas, means, rstds, t, channels, BLOCK_C)
    b, n, inside = map_tile(tl.program_id(0), positions, channels, BLOCK_C, BLOCK_P)
    place = map_offsets(b, c, n, strides)
    centred = tl.load(pick_pointer(normed, t) + place, inside, 0.0).to(tl.float32) - mean[:, None]
    tl.store(pick_pointer(out, t) + place, relu(centred * scale[:, None] + shift[:, None]), inside)


@triton.jit
def _incoming(
    grads, carried, kept, t, b, c, n, inside, mean, inverse, scale, shift, g_strides, c_strides, k_strides,
    KEEP: tl.constexpr,
):  # fmt: skip
    """The gradient of what went into the ReLU, and the centred and scaled map (0 where it was not kept)."""
    g = tl.zeros(inside.shape, tl.float32)
    if grads is not None:
        g += tl.load(pick_pointer(grads, t) + map_offsets(b, c, n, g_strides), inside, 0.0).to(tl.float32)
    if carried is not None:
        g += tl.load(pick_pointer(carried, t) + map_offsets(b, c, n, c_strides), inside, 0.0).to(tl.float32)
    value = tl.load(pick_pointer(kept, t) + map_offsets(b, c, n, k_strides), inside, 0.0).to(tl.float32)
    centred = tl.zeros(inside.shape, tl.float32)
    if KEEP:
        centred = value - mean[:, None]
        # The same operations as forward, so that both agree on where the ReLU cuts.
        value = centred * scale[:, None] + shift[:, None]
        centred = tl.where(inside, centred * inverse[:, None], 0.0)
    return tl.where(value <= 0, 0.0, g), centred


@triton.jit
def deep_to_shallow_bwd_sums_kernel(
    grads, carried, kept, gammas, betas, means, rstds, partial, tiles, positions, channels,
    g_strides, c_strides, k_strides, KEEP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Per share of the tiles and channel, into `partial` [T, 2, C, shares]: sums of gradient and gradient x map."""
    share, shares, t = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    c, known, mean, inverse, scale, shift = _norm(gammas, betas, means, rstds, t, channels, BLOCK_C)
    beta_sum, gamma_sum = tl.zeros([BLOCK_C, BLOCK_P], tl.float32), tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for tile in range(share, tiles, shares):
        b, n, inside = map_tile(tile, positions, channels, BLOCK_C, BLOCK_P)
        g, centred = _incoming(
            grads, carried, kept, t, b, c, n, inside, mean, inverse, scale, shift, g_strides, c_strides, k_strides, KEEP
        )
        beta_sum += g
        gamma_sum += g * centred
    place = (t * 2 * channels + c) * shares + share
    tl.store(partial + place, tl.sum(beta_sum, 1), known)
    tl.store(partial + place + channels * shares, tl.sum(gamma_sum, 1), known)


@triton.jit
def _merged(partial, known, shares, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of BLOCK_C rows of so many shares, in an order that depends on nothing but their number."""
    total = tl.zeros([BLOCK_C, BLOCK], tl.float32)
    for first in range(0, shares, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(partial[:, None] + i[None, :], known[:, None] & (i < shares)[None, :], 0.0)
    return tl.sum(total, 1)


@triton.jit
def deep_to_shallow_bwd_norm_kernel(
    grads, carried, kept, gammas, betas, means, rstds, partial, grad_gammas, grad_betas, grad_maps,
    tiles, shares, positions, channels, count, g_strides, c_strides, k_strides,
    TRAINING: tl.constexpr, KEEP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of the transposed convolution's output, and of the norm's weight and bias, where they are wanted.

    Every program merges the shares' sums of its channels (`partial`, if given); the first ones write them as gradients,
    which no program reads.
    """
    t = tl.program_id(2)
    c, known, mean, inverse, scale, shift = _norm(gammas, betas, means, rstds, t, channels, BLOCK_C)
    average, slope = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    if partial is not None:
        own = partial + (t * 2 * channels + c) * shares
        beta_sum = _merged(own, known, shares, BLOCK_C, BLOCK_P)
        gamma_sum = _merged(own + channels * shares, known, shares, BLOCK_C, BLOCK_P)
        if tl.program_id(0) == 0:
            if grad_betas is not None:
                tl.store(pick_pointer(grad_betas, t) + c, beta_sum, known)
            if grad_gammas is not None:
                tl.store(pick_pointer(grad_gammas, t) + c, gamma_sum, known)
        if TRAINING:
            average, slope = divide(beta_sum, count), divide(gamma_sum, count)
    if grad_maps is not None:
        target = pick_pointer(grad_maps, t)
        for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
            b, n, inside = map_tile(tile, positions, channels, BLOCK_C, BLOCK_P)
            g, centred = _incoming(
                grads, carried, kept, t, b, c, n, inside, mean, inverse, scale, shift,
                g_strides, c_strides, k_strides, KEEP,
            )  # fmt: skip
            if TRAINING:
                g -= average[:, None] + centred * slope[:, None]
            tl.store(target + map_offsets(b, c, n, k_strides), g * scale[:, None], inside)
