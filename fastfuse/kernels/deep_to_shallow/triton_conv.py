"""Matrix products of deep_to_shallow's stage: the transposed convolution and its two gradients.

A map's strides travel as a tuple (sample, channel, position), a weight's as (C_in, C_out, tap), tap = 3 a + b.
"""

import triton
import triton.language as tl

from fastfuse.kernels.deep_to_shallow.triton_norm import relu


@triton.jit
def _load(pointer, rows, columns, row_mask, column_mask, ROWS_FAST: tl.constexpr):
    """A [rows, columns] tile, 0 outside; lanes run along the rows where those are contiguous in memory."""
    if ROWS_FAST:
        mask = column_mask[:, None] & row_mask[None, :]
        tile = tl.trans(tl.load(pointer + (columns[:, None] + rows[None, :]), mask=mask, other=0.0))
    else:
        mask = row_mask[:, None] & column_mask[None, :]
        tile = tl.load(pointer + (rows[:, None] + columns[None, :]), mask=mask, other=0.0)
    return tile


@triton.jit
def _store(pointer, tile, rows, columns, row_mask, column_mask, ROWS_FAST: tl.constexpr):
    """The counterpart of _load."""
    if ROWS_FAST:
        mask = column_mask[:, None] & row_mask[None, :]
        tl.store(pointer + (columns[:, None] + rows[None, :]), tl.trans(tile), mask=mask)
    else:
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(pointer + (rows[:, None] + columns[None, :]), tile, mask=mask)


@triton.jit
def _positions(start, batch, height, width, BLOCK: tl.constexpr):
    """Sample, row and column of BLOCK positions of the deep map, counted through the batch, and which of them exist."""
    m = start + tl.arange(0, BLOCK)
    n = m % (height * width)
    return (m // (height * width)).to(tl.int64), n // width, n % width, m < batch * height * width


@triton.jit
def _phase(
    x, weight, b, i, j, inside, co, odd_row, odd_column, height, width, channels_in, channels_out, x_strides, w_strides,
    PRECISION: tl.constexpr, X_FAST: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Transposed convolution of a tile of deep positions at even or odd output rows and columns: 1, 2 or 4 taps."""
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    taps = (1 + odd_row) * (1 + odd_column)
    for step in range(taps * tl.cdiv(channels_in, BLOCK_K)):
        down, right = step % taps // (1 + odd_column), step % taps % (1 + odd_column)
        ci = (step // taps) * BLOCK_K + tl.arange(0, BLOCK_K)
        known = ci < channels_in
        there = inside & (i + down < height) & (j + right < width)
        rows = b * x_strides[0] + ((i + down) * width + j + right) * x_strides[2]
        left = _load(x, rows, ci * x_strides[1], there, known, X_FAST).to(DTYPE)
        tap = (1 + odd_row - 2 * down) * 3 + 1 + odd_column - 2 * right
        place = ci[:, None] * w_strides[0] + co[None, :] * w_strides[1] + tap * w_strides[2]
        kernel = tl.load(weight + place, known[:, None] & (co < channels_out)[None, :], 0.0).to(DTYPE)
        total = tl.dot(left, kernel, total, input_precision=PRECISION)
    return total


@triton.jit
def deep_to_shallow_fwd_phases_kernel(
    x, weight, normed, out, gamma, beta, running_mean, running_var, mean, rstd, partial,
    batch, height, width, out_height, out_width, channels_in, channels_out, eps, x_strides, w_strides, o_strides,
    PRECISION: tl.constexpr, X_FAST: tl.constexpr, O_FAST: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The transposed convolution; on running statistics (`out` given) norm and ReLU as well, else statistics per tile.

    `partial` is [2 C_out + 1, tiles]: means, sums of squared deviations, and the number of values in each.
    """
    b, i, j, inside = _positions(tl.program_id(0) * BLOCK_M, batch, height, width, BLOCK_M)
    co = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    phase = 3 - tl.program_id(2)  # the one with most taps starts first
    tile, tiles = phase * tl.num_programs(0) + tl.program_id(0), 4 * tl.num_programs(0)
    value = _phase(
        x, weight, b, i, j, inside, co, phase // 2, phase % 2, height, width, channels_in, channels_out,
        x_strides, w_strides, PRECISION, X_FAST, DTYPE, BLOCK_M, BLOCK_N, BLOCK_K,
    ).to(DTYPE).to(tl.float32)  # fmt: skip
    row, column, known = 2 * i + phase // 2, 2 * j + phase % 2, co < channels_out
    there = inside & (row < out_height) & (column < out_width)
    rows, columns = b * o_strides[0] + (row * out_width + column) * o_strides[2], co * o_strides[1]
    if normed is not None:
        _store(normed, value, rows, columns, there, known, O_FAST)
    if out is not None:
        centre = tl.load(running_mean + co, known, 0.0).to(tl.float32)
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.load(running_var + co, known, 1.0).to(tl.float32) + eps))
        scale = inverse * tl.load(gamma + co, known, 0.0).to(tl.float32)
        shift = tl.load(beta + co, known, 0.0).to(tl.float32)
        value = relu((value - centre[None, :]) * scale[None, :] + shift[None, :])
        _store(out, value, rows, columns, there, known, O_FAST)
        if tile == 0:
            tl.store(mean + co, centre, known)
            tl.store(rstd + co, inverse, known)
    else:
        count = tl.sum(there.to(tl.float32), 0)
        average = tl.sum(tl.where(there[:, None], value, 0.0), 0) / tl.maximum(count, 1.0)
        deviation = tl.where(there[:, None], value - average[None, :], 0.0)
        tl.store(partial + co * tiles + tile, average, known)
        tl.store(partial + (channels_out + co) * tiles + tile, tl.sum(deviation * deviation, 0), known)
        if tl.program_id(1) == 0:
            tl.store(partial + 2 * channels_out * tiles + tile, count)


@triton.jit
def deep_to_shallow_bwd_weight_kernel(
    x, grad_map, partial, batch, height, width, out_height, out_width, channels_in, channels_out, steps,
    x_strides, d_strides, PRECISION: tl.constexpr, X_FAST: tl.constexpr, D_FAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tap's [C_in, C_out] gradient, summed over one share of the positions, into `partial` [splits, 9, ...]."""
    tap, split = tl.program_id(1), tl.program_id(2)
    columns = tl.cdiv(channels_out, BLOCK_N)
    ci = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    co = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_known, out_known = ci < channels_in, co < channels_out
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        b, i, j, inside = _positions((split * steps + step) * BLOCK_K, batch, height, width, BLOCK_K)
        row, column = 2 * i + tap // 3 - 1, 2 * j + tap % 3 - 1
        there = inside & (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
        # Where a tap falls outside the map its gradient is loaded as 0: x needs no mask of its own for that.
        positions = b * x_strides[0] + (i * width + j) * x_strides[2]
        left = _load(x, ci * x_strides[1], positions, in_known, inside, not X_FAST)
        positions = b * d_strides[0] + (row * out_width + column) * d_strides[2]
        right = _load(grad_map, positions, co * d_strides[1], there, out_known, D_FAST)
        total = tl.dot(left.to(right.dtype), right, total, input_precision=PRECISION)
    place = ((split * 9 + tap).to(tl.int64) * channels_in + ci[:, None]) * channels_out + co[None, :]
    tl.store(partial + place, total, in_known[:, None] & out_known[None, :])


@triton.jit
def deep_to_shallow_bwd_weight_merge_kernel(
    partial, grad_weight, splits, channels_in, channels_out, w_strides, BLOCK: tl.constexpr
):
    """Add the shares of the weight's gradient in fixed order."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    size = 9 * channels_in * channels_out
    source = partial + place
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(source, place < size, 0.0)
        source += size
    co, row = place % channels_out, place // channels_out
    target = (row % channels_in) * w_strides[0] + co * w_strides[1] + (row // channels_in) * w_strides[2]
    tl.store(grad_weight + target, total, place < size)


@triton.jit
def deep_to_shallow_bwd_input_kernel(
    grad_map, weight, grad_x, batch, height, width, out_height, out_width, channels_in, channels_out,
    d_strides, w_strides, x_strides, PRECISION: tl.constexpr, D_FAST: tl.constexpr, X_FAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the deep map: a 3x3 convolution of stride 2 over `grad_map`."""
    b, i, j, inside = _positions(tl.program_id(0) * BLOCK_M, batch, height, width, BLOCK_M)
    ci = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_known = ci < channels_in
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(9 * tl.cdiv(channels_out, BLOCK_K)):
        tap, co = step % 9, (step // 9) * BLOCK_K + tl.arange(0, BLOCK_K)
        out_known = co < channels_out
        row, column = 2 * i + tap // 3 - 1, 2 * j + tap % 3 - 1
        there = inside & (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
        positions = b * d_strides[0] + (row * out_width + column) * d_strides[2]
        left = _load(grad_map, positions, co * d_strides[1], there, out_known, D_FAST)
        taps = weight + tap * w_strides[2] + (co[:, None] * w_strides[1] + ci[None, :] * w_strides[0])
        right = tl.load(taps, out_known[:, None] & in_known[None, :], 0.0).to(left.dtype)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    rows = b * x_strides[0] + (i * width + j) * x_strides[2]
    _store(grad_x, total, rows, ci * x_strides[1], inside, in_known, X_FAST)
