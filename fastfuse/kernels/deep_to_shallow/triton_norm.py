"""Batch norm and ReLU of deep_to_shallow's stage, and the merging of what the programs summed up, in fixed order.

A map's strides travel as a tuple (sample, channel, position).
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import ordered_sum


@triton.jit
def relu(x):
    """NaN stays NaN, as in torch."""
    return tl.where(x <= 0, 0.0, x)


@triton.jit
def deep_to_shallow_fwd_statistics_kernel(
    partial, mean, rstd, running_mean, running_var, tiles, count, momentum, eps, BLOCK: tl.constexpr
):
    """Merge the tiles' statistics of one channel in fixed order (Chan's formula); update the running statistics."""
    c, channels = tl.program_id(0), tl.num_programs(0)
    means = partial + c * tiles
    squares, counts = means + channels * tiles, partial + 2 * channels * tiles
    # Means relative to the first tile's, so that their common part is not rounded in the sum.
    origin = tl.load(means)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        t = start + tl.arange(0, BLOCK)
        n = tl.load(counts + t, t < tiles, 0.0)
        total += n * (tl.load(means + t, t < tiles, 0.0) - origin)
    average = origin + tl.sum(total, 0) / count
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tiles, BLOCK):
        t = start + tl.arange(0, BLOCK)
        deviation = tl.load(means + t, t < tiles, 0.0) - average
        n = tl.load(counts + t, t < tiles, 0.0)
        total += tl.load(squares + t, t < tiles, 0.0) + n * deviation * deviation
    deviations = tl.sum(total, 0)
    tl.store(mean + c, average)
    tl.store(rstd + c, tl.div_rn(1.0, tl.sqrt_rn(deviations / count + eps)))
    old = tl.load(running_mean + c).to(tl.float32)
    tl.store(running_mean + c, (1 - momentum) * old + momentum * average)
    old = tl.load(running_var + c).to(tl.float32)
    tl.store(running_var + c, (1 - momentum) * old + momentum * (deviations / (count - 1)))


@triton.jit
def _map_tile(positions, channels, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Sample, channels and positions of a program's [BLOCK_C, BLOCK_P] tile of a map, and which of it exist."""
    tiles = tl.cdiv(positions, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    n = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    return (tl.program_id(0) // tiles).to(tl.int64), c, n, (c < channels)[:, None] & (n < positions)[None, :]


@triton.jit
def _at(b, c, n, strides):
    return b * strides[0] + (c[:, None] * strides[1] + n[None, :] * strides[2])


@triton.jit
def deep_to_shallow_fwd_normalise_kernel(
    normed, out, gamma, beta, mean, rstd, positions, channels, strides, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Batch norm with the merged statistics, and ReLU."""
    b, c, n, inside = _map_tile(positions, channels, BLOCK_C, BLOCK_P)
    known = c < channels
    scale = tl.load(rstd + c, known, 0.0) * tl.load(gamma + c, known, 0.0).to(tl.float32)
    centred = (
        tl.load(normed + _at(b, c, n, strides), inside, 0.0).to(tl.float32) - tl.load(mean + c, known, 0.0)[:, None]
    )
    shift = tl.load(beta + c, known, 0.0).to(tl.float32)
    tl.store(out + _at(b, c, n, strides), relu(centred * scale[:, None] + shift[:, None]), inside)


@triton.jit
def _incoming(
    grad, carried, kept, gamma, beta, mean, rstd, b, c, n, inside, channels, g_strides, c_strides, k_strides,
    KEEP: tl.constexpr,
):  # fmt: skip
    """The gradient of what went into the ReLU, and the centred and scaled map (0 where it was not kept)."""
    g = tl.zeros(inside.shape, tl.float32)
    if grad is not None:
        g += tl.load(grad + _at(b, c, n, g_strides), inside, 0.0).to(tl.float32)
    if carried is not None:
        g += tl.load(carried + _at(b, c, n, c_strides), inside, 0.0).to(tl.float32)
    value = tl.load(kept + _at(b, c, n, k_strides), inside, 0.0).to(tl.float32)
    centred = tl.zeros(inside.shape, tl.float32)
    if KEEP:
        known = c < channels
        inverse = tl.load(rstd + c, known, 0.0)
        centred = value - tl.load(mean + c, known, 0.0)[:, None]
        # The same operations as forward, so that both agree on where the ReLU cuts.
        scale = inverse * tl.load(gamma + c, known, 0.0).to(tl.float32)
        value = centred * scale[:, None] + tl.load(beta + c, known, 0.0).to(tl.float32)[:, None]
        centred = tl.where(inside, centred * inverse[:, None], 0.0)
    return tl.where(value <= 0, 0.0, g), centred


@triton.jit
def deep_to_shallow_bwd_sums_kernel(
    grad, carried, kept, gamma, beta, mean, rstd, partial, positions, channels, g_strides, c_strides, k_strides,
    KEEP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Per tile and channel, into `partial` [2, C, tiles]: sums of the gradient and of its product with the map."""
    b, c, n, inside = _map_tile(positions, channels, BLOCK_C, BLOCK_P)
    g, centred = _incoming(
        grad, carried, kept, gamma, beta, mean, rstd, b, c, n, inside, channels, g_strides, c_strides, k_strides, KEEP
    )
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    tl.store(partial + c * tiles + tile, tl.sum(g, 1), c < channels)
    tl.store(partial + (channels + c) * tiles + tile, tl.sum(g * centred, 1), c < channels)


@triton.jit
def deep_to_shallow_bwd_merge_kernel(partial, sums, grad_gamma, grad_beta, tiles, BLOCK: tl.constexpr):
    """Add the tiles' sums of one channel in fixed order: into `sums` [2, C], and as gradients of the norm."""
    c, channels = tl.program_id(0), tl.num_programs(0)
    beta = ordered_sum(partial + c * tiles, tiles, BLOCK)
    gamma = ordered_sum(partial + (channels + c) * tiles, tiles, BLOCK)
    tl.store(sums + c, beta)
    tl.store(sums + channels + c, gamma)
    if grad_beta is not None:
        tl.store(grad_beta + c, beta)
    if grad_gamma is not None:
        tl.store(grad_gamma + c, gamma)


@triton.jit
def deep_to_shallow_bwd_norm_kernel(
    grad, carried, kept, gamma, beta, mean, rstd, sums, grad_map, positions, channels, count,
    g_strides, c_strides, k_strides, KEEP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Gradient of the transposed convolution's output; `sums` only where the norm took batch statistics."""
    b, c, n, inside = _map_tile(positions, channels, BLOCK_C, BLOCK_P)
    g, centred = _incoming(
        grad, carried, kept, gamma, beta, mean, rstd, b, c, n, inside, channels, g_strides, c_strides, k_strides, KEEP
    )
    known = c < channels
    if sums is not None:
        average = tl.load(sums + c, known, 0.0) / count
        slope = tl.load(sums + channels + c, known, 0.0) / count
        g -= average[:, None] + centred * slope[:, None]
    scale = tl.load(rstd + c, known, 0.0) * tl.load(gamma + c, known, 0.0).to(tl.float32)
    tl.store(grad_map + _at(b, c, n, k_strides), g * scale[:, None], inside)
