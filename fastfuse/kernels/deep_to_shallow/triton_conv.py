"""Forward matrix products of deep_to_shallow's stage: the transposed convolution and what follows it at once.

A map's strides travel as a tuple (sample, channel, position), a weight's as (C_in, C_out, tap), tap = 3 a + b. Tuples
of pointers hold one per transform; the grid's third axis counts phases and transforms.
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import divide, pick_pointer
from fastfuse.kernels.deep_to_shallow.triton_tiles import deep_positions, load_tile, relu, store_tile


@triton.jit
def _phase(
    x, shift, weight, b, i, j, inside, co, odd_row, odd_column, height, width, channels_in, channels_out,
    x_strides, s_strides, w_strides, PRECISION: tl.constexpr, X_FAST: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Transposed convolution of a tile of deep positions at even or odd output rows and columns: 1, 2 or 4 taps.

    Rounded to the map's dtype, as what eager's norm takes in.
    """
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    taps = (1 + odd_row) * (1 + odd_column)
    for step in range(taps * tl.cdiv(channels_in, BLOCK_K)):
        down, right = step % taps // (1 + odd_column), step % taps % (1 + odd_column)
        ci = (step // taps) * BLOCK_K + tl.arange(0, BLOCK_K)
        known = ci < channels_in
        there = inside & (i + down < height) & (j + right < width)
        position = (i + down) * width + j + right
        left = load_tile(x, b * x_strides[0] + position * x_strides[2], ci * x_strides[1], there, known, X_FAST)
        if shift is not None:
            # Channels that do not exist meet a weight of 0.
            moved = tl.load(shift + (b * s_strides[0] + position * s_strides[2]), there, 0.0).to(tl.float32)
            left = left.to(tl.float32) + moved[:, None]
        tap = (1 + odd_row - 2 * down) * 3 + 1 + odd_column - 2 * right
        place = ci[:, None] * w_strides[0] + co[None, :] * w_strides[1] + tap * w_strides[2]
        kernel = tl.load(weight + place, known[:, None] & (co < channels_out)[None, :], 0.0).to(DTYPE)
        total = tl.dot(left.to(DTYPE), kernel, total, input_precision=PRECISION)
    return total.to(DTYPE).to(tl.float32)


@triton.jit
def _running_norm(gamma, beta, running_mean, running_var, co, known, eps):
    """Mean, reciprocal deviation, scale and shift of a norm on running statistics."""
    centre = tl.load(running_mean + co, known, 0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.load(running_var + co, known, 1.0).to(tl.float32) + eps))
    scale = inverse * tl.load(gamma + co, known, 0.0).to(tl.float32)
    return centre, inverse, scale, tl.load(beta + co, known, 0.0).to(tl.float32)


@triton.jit
def deep_to_shallow_fwd_phases_kernel(
    xs, weights, normed, out, gammas, betas, running_means, running_vars, means, rstds, partial,
    batch, height, width, out_height, out_width, channels_in, channels_out, eps, x_strides, w_strides, o_strides,
    PRECISION: tl.constexpr, X_FAST: tl.constexpr, O_FAST: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The transposed convolution; on running statistics (`out` given) norm and ReLU as well, else statistics per tile.

    `partial` is [T, 2 C_out + 1, tiles]: means, sums of squared deviations, and the number of values in each.
    """
    t, phase = tl.program_id(2) % len(xs), 3 - tl.program_id(2) // len(xs)  # the phase with most taps starts first
    b, i, j, inside = deep_positions(tl.program_id(0) * BLOCK_M, batch, height, width, BLOCK_M)
    co = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile, tiles = phase * tl.num_programs(0) + tl.program_id(0), 4 * tl.num_programs(0)
    value = _phase(
        pick_pointer(xs, t), None, pick_pointer(weights, t), b, i, j, inside, co, phase // 2, phase % 2, height, width,
        channels_in, channels_out, x_strides, x_strides, w_strides, PRECISION, X_FAST, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    row, column, known = 2 * i + phase // 2, 2 * j + phase % 2, co < channels_out
    there = inside & (row < out_height) & (column < out_width)
    rows, columns = b * o_strides[0] + (row * out_width + column) * o_strides[2], co * o_strides[1]
    if normed is not None:
        store_tile(pick_pointer(normed, t), value, rows, columns, there, known, O_FAST)
    if out is not None:
        centre, inverse, scale, shift = _running_norm(
            pick_pointer(gammas, t), pick_pointer(betas, t), pick_pointer(running_means, t),
            pick_pointer(running_vars, t), co, known, eps,
        )  # fmt: skip
        value = relu((value - centre[None, :]) * scale[None, :] + shift[None, :])
        store_tile(pick_pointer(out, t), value, rows, columns, there, known, O_FAST)
        if tile == 0:
            tl.store(pick_pointer(means, t) + co, centre, known)
            tl.store(pick_pointer(rstds, t) + co, inverse, known)
    else:
        partial += t.to(tl.int64) * (2 * channels_out + 1) * tiles
        count = tl.sum(there.to(tl.float32), 0)
        average = divide(tl.sum(tl.where(there[:, None], value, 0.0), 0), tl.maximum(count, 1.0))
        deviation = tl.where(there[:, None], value - average[None, :], 0.0)
        tl.store(partial + co * tiles + tile, average, known)
        tl.store(partial + (channels_out + co) * tiles + tile, tl.sum(deviation * deviation, 0), known)
        if tl.program_id(1) == 0:
            tl.store(partial + 2 * channels_out * tiles + tile, count)


@triton.jit
def deep_to_shallow_fwd_attention_kernel(
    xs, shifts, weights, out, attentions, gammas, betas, running_means, running_vars,
    batch, height, width, out_height, out_width, channels_in, channels_out, eps,
    x_strides, s_strides, w_strides, o_strides,
    PRECISION: tl.constexpr, X_FAST: tl.constexpr, O_FAST: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The stage on running statistics, of which the attention map leaves, and the map where a next stage reads it.

    A program walks over all output channels, so that a position's sum of squares never leaves it.
    """
    t, phase = tl.program_id(1) % len(xs), 3 - tl.program_id(1) // len(xs)
    b, i, j, inside = deep_positions(tl.program_id(0) * BLOCK_M, batch, height, width, BLOCK_M)
    row, column = 2 * i + phase // 2, 2 * j + phase % 2
    there, position = inside & (row < out_height) & (column < out_width), row * out_width + column
    gamma, beta = pick_pointer(gammas, t), pick_pointer(betas, t)
    running_mean, running_var = pick_pointer(running_means, t), pick_pointer(running_vars, t)
    x, weight = pick_pointer(xs, t), pick_pointer(weights, t)
    added = None
    if shifts is not None:
        added = pick_pointer(shifts, t)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, channels_out, BLOCK_N):
        co = first + tl.arange(0, BLOCK_N)
        known = co < channels_out
        value = _phase(
            x, added, weight, b, i, j, inside, co, phase // 2, phase % 2, height, width, channels_in, channels_out,
            x_strides, s_strides, w_strides, PRECISION, X_FAST, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        centre, _, scale, shift = _running_norm(gamma, beta, running_mean, running_var, co, known, eps)
        value = relu((value - centre[None, :]) * scale[None, :] + shift[None, :])
        if out is not None:
            rows = b * o_strides[0] + position * o_strides[2]
            store_tile(pick_pointer(out, t), value, rows, co * o_strides[1], there, known, O_FAST)
        squares += tl.sum(tl.where(known[None, :], value * value, 0.0), 1)
    place = b * (out_height * out_width) + position
    tl.store(pick_pointer(attentions, t) + place, divide(squares, channels_out), there)
