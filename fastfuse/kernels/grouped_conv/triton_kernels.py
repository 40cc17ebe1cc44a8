"""The Triton kernels of grouped_conv: implicit matrix products, a group at a time, the groups of a tile side by side.

A map's strides travel as a tuple (sample, channel, position), a weight's as (G C_out, C_in, tap), tap = K a + b. The
grid has one axis; the group runs fastest, since the groups of a position lie beside each other in memory.
"""

import triton
import triton.language as tl


@triton.jit
def _places(tile, batch, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sample, row and column of a tile of positions, counted through the batch, and which of them exist."""
    m = tile * BLOCK + tl.arange(0, BLOCK)
    n = m % (HEIGHT * WIDTH)
    return (m // (HEIGHT * WIDTH)).to(tl.int64), n // WIDTH, n % WIDTH, m < batch * (HEIGHT * WIDTH)


@triton.jit
def _gathered(
    source, weight, sample, row, column, inside, n, taps_down, taps_right, first_tap, s_strides, w_strides,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, DIRECTION: tl.constexpr, TAP: tl.constexpr, KERNEL: tl.constexpr,
    INNER: tl.constexpr, OUTER: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sum over taps and INNER channels of a map around (row, column), of which each tap lies DIRECTION further.

    Taps are those from `first_tap` on, every TAP-th in both directions; `w_strides` are those of the summed channel, of
    the OUTER one and of the tap.
    """
    # Places that do not exist lie above the map, whatever the tap.
    row = tl.where(inside, row, -KERNEL)
    base = source + (sample * s_strides[0] + (row * WIDTH + column) * s_strides[2])
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(taps_down * taps_right * tl.cdiv(INNER, BLOCK_K)):
        place = step % (taps_down * taps_right)
        down, right = place // taps_right, place % taps_right
        k = step // (taps_down * taps_right) * BLOCK_K + tl.arange(0, BLOCK_K)
        # As unsigned numbers those below 0 are the largest.
        there = ((row + DIRECTION * down).to(tl.uint32) < HEIGHT) & ((column + DIRECTION * right).to(tl.uint32) < WIDTH)
        inner = k * s_strides[1] + DIRECTION * (down * WIDTH + right) * s_strides[2]
        left = tl.load(base[:, None] + inner[None, :], there[:, None] & (k < INNER)[None, :], 0.0)
        tap = first_tap + TAP * (down * KERNEL + right)
        taps = weight + (k[:, None] * w_strides[0] + n[None, :] * w_strides[1] + tap * w_strides[2])
        known = (k < INNER)[:, None] & (n < OUTER)[None, :]
        total = tl.dot(left, tl.load(taps, known, 0.0).to(DTYPE), total, input_precision=PRECISION)
    return total


@triton.jit
def _store(target, total, sample, position, inside, n, strides, OUTER: tl.constexpr):
    rows = target + (sample * strides[0] + position * strides[2])
    tl.store(rows[:, None] + (n * strides[1])[None, :], total, inside[:, None] & (n < OUTER)[None, :])


@triton.jit
def grouped_conv_fwd_kernel(
    x, weight, out, groups, taps, batch, x_strides, w_strides, o_strides,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CHANNELS_IN: tl.constexpr, CHANNELS_OUT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_M positions by BLOCK_N channels of one group's result.

    `taps` is KERNEL, as a number that the compiler does not know: all taps unrolled need more registers than there are.
    """
    columns: tl.constexpr = (CHANNELS_OUT + BLOCK_N - 1) // BLOCK_N
    group, rest = tl.program_id(0) % groups, tl.program_id(0) // groups
    sample, i, j, inside = _places(rest // columns, batch, OUT_HEIGHT, OUT_WIDTH, BLOCK_M)
    n = rest % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    total = _gathered(
        x + group * CHANNELS_IN * x_strides[1], weight + group * CHANNELS_OUT * w_strides[0], sample,
        STRIDE * i - KERNEL // 2, STRIDE * j - KERNEL // 2, inside, n, taps, taps, 0, x_strides,
        (w_strides[1], w_strides[0], w_strides[2]), HEIGHT, WIDTH, 1, 1, KERNEL, CHANNELS_IN, CHANNELS_OUT, DTYPE,
        PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    out += group * CHANNELS_OUT * o_strides[1]
    _store(out, total, sample, i * OUT_WIDTH + j, inside, n, o_strides, CHANNELS_OUT)


@triton.jit
def grouped_conv_bwd_weight_kernel(
    x, grad, partial, groups, splits, steps, batch, x_strides, g_strides,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CHANNELS_IN: tl.constexpr, CHANNELS_OUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M taps and input channels by BLOCK_N output channels of a group's gradient, over a share of positions.

    `partial` is [splits, G, K K C_in, C_out].
    """
    ROWS: tl.constexpr = KERNEL * KERNEL * CHANNELS_IN
    columns: tl.constexpr = (CHANNELS_OUT + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = columns * ((ROWS + BLOCK_M - 1) // BLOCK_M)
    group, rest = tl.program_id(0) % groups, tl.program_id(0) // groups
    block, split = rest % blocks, rest // blocks
    m = block // columns * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    tap, ci = m // CHANNELS_IN, m % CHANNELS_IN
    down, right = (tap // KERNEL - KERNEL // 2)[:, None], (tap % KERNEL - KERNEL // 2)[:, None]
    x += group * CHANNELS_IN * x_strides[1]
    grad += group * CHANNELS_OUT * g_strides[1]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        sample, i, j, inside = _places(split * steps + step, batch, OUT_HEIGHT, OUT_WIDTH, BLOCK_K)
        row, column = (STRIDE * i)[None, :] + down, (STRIDE * j)[None, :] + right
        there = inside[None, :] & (m < ROWS)[:, None] & (row >= 0) & (row < HEIGHT) & (column >= 0) & (column < WIDTH)
        place = (row * WIDTH + column) * x_strides[2] + (ci * x_strides[1])[:, None]
        left = tl.load(x + sample[None, :] * x_strides[0] + place, there, 0.0)
        rows = grad + (sample * g_strides[0] + (i * OUT_WIDTH + j) * g_strides[2])
        known = inside[:, None] & (n < CHANNELS_OUT)[None, :]
        g = tl.load(rows[:, None] + (n * g_strides[1])[None, :], known, 0.0)
        total = tl.dot(left, g.to(left.dtype), total, input_precision=PRECISION)
    target = partial + (split * groups + group).to(tl.int64) * (ROWS * CHANNELS_OUT)
    tl.store(target + m[:, None] * CHANNELS_OUT + n[None, :], total, (m < ROWS)[:, None] & (n < CHANNELS_OUT)[None, :])


@triton.jit
def _merge(
    partial, grad_weight, block, groups, splits, v_strides, KERNEL: tl.constexpr, CHANNELS_IN: tl.constexpr,
    CHANNELS_OUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the shares of a block of the weight's gradient in fixed order."""
    ROWS: tl.constexpr = KERNEL * KERNEL * CHANNELS_IN
    place = block * BLOCK + tl.arange(0, BLOCK)
    size = groups * (ROWS * CHANNELS_OUT)
    source, total = partial + place, tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(source, place < size, 0.0)
        source += size
    row, group = place // CHANNELS_OUT % ROWS, place // (ROWS * CHANNELS_OUT)
    co = group * CHANNELS_OUT + place % CHANNELS_OUT
    target = co * v_strides[0] + row % CHANNELS_IN * v_strides[1] + row // CHANNELS_IN * v_strides[2]
    tl.store(grad_weight + target, total, place < size)


@triton.jit
def _input(
    grad, weight, grad_x, tile, groups, tiles, batch, g_strides, w_strides, x_strides,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CHANNELS_IN: tl.constexpr, CHANNELS_OUT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of one group's gradient of the map, at positions of one phase of the stride.

    Only taps a with (row + K // 2 - a) % STRIDE == 0 have met a row: every STRIDE-th from (phase + K // 2) % STRIDE on.
    """
    HALF: tl.constexpr = KERNEL // 2
    columns: tl.constexpr = (CHANNELS_IN + BLOCK_N - 1) // BLOCK_N
    group, rest = tile % groups, tile // groups
    n = rest % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    rest = rest // columns
    phase = rest // tiles
    odd_row, odd_column = phase // STRIDE, phase % STRIDE
    ACROSS: tl.constexpr = (HEIGHT + STRIDE - 1) // STRIDE
    ALONG: tl.constexpr = (WIDTH + STRIDE - 1) // STRIDE
    sample, i, j, inside = _places(rest % tiles, batch, ACROSS, ALONG, BLOCK_M)
    i, j = STRIDE * i + odd_row, STRIDE * j + odd_column
    inside = inside & (i < HEIGHT) & (j < WIDTH)
    down, right = (odd_row + HALF) % STRIDE, (odd_column + HALF) % STRIDE
    # Both divisions are exact: that is what the phase's first tap is chosen for.
    total = _gathered(
        grad + group * CHANNELS_OUT * g_strides[1], weight + group * CHANNELS_OUT * w_strides[0], sample,
        (i + HALF - down) // STRIDE, (j + HALF - right) // STRIDE, inside, n,
        tl.maximum(tl.cdiv(KERNEL - down, STRIDE), 0), tl.maximum(tl.cdiv(KERNEL - right, STRIDE), 0),
        down * KERNEL + right, g_strides, w_strides, OUT_HEIGHT, OUT_WIDTH, -1, STRIDE, KERNEL,
        CHANNELS_OUT, CHANNELS_IN, DTYPE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    grad_x += group * CHANNELS_IN * x_strides[1]
    _store(grad_x, total, sample, i * WIDTH + j, inside, n, x_strides, CHANNELS_IN)


@triton.jit
def grouped_conv_bwd_gradients_kernel(
    partial, grad_weight, grad, weight, grad_x, merges, splits, tiles, groups, batch, g_strides, w_strides, v_strides,
    x_strides, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, OUT_HEIGHT: tl.constexpr, OUT_WIDTH: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, CHANNELS_IN: tl.constexpr, CHANNELS_OUT: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Side by side: the first `merges` programs add shares of the weight's gradient, the others form the map's.

    `w_strides` are the weight's, `v_strides` those of its gradient; `tiles` those of a phase.
    """
    if tl.program_id(0) < merges:
        if grad_weight is not None:
            _merge(
                partial, grad_weight, tl.program_id(0), groups, splits, v_strides, KERNEL, CHANNELS_IN, CHANNELS_OUT,
                BLOCK,
            )  # fmt: skip
    else:
        if grad_x is not None:
            _input(
                grad, weight, grad_x, tl.program_id(0) - merges, groups, tiles, batch, g_strides, w_strides,
                x_strides, HEIGHT, WIDTH, OUT_HEIGHT, OUT_WIDTH, KERNEL, STRIDE, CHANNELS_IN, CHANNELS_OUT, DTYPE,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
