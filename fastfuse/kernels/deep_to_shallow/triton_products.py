"""Backward matrix products of deep_to_shallow's stage: gradients of the weight and of the deep map.

Strides as in triton_conv.py; tuples of pointers hold one per transform.
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import pick_pointer
from fastfuse.kernels.deep_to_shallow.triton_tiles import deep_positions, load_tile, store_tile


@triton.jit
def deep_to_shallow_bwd_weight_kernel(
    xs, grad_maps, partial, batch, height, width, out_height, out_width, channels_in, channels_out, steps,
    x_strides, d_strides, PRECISION: tl.constexpr, X_FAST: tl.constexpr, D_FAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tap's [C_in, C_out] gradient, summed over one share of the positions: into `partial` [T, splits, 9, ...]."""
    tap, t, split = tl.program_id(1) % 9, tl.program_id(1) // 9, tl.program_id(2)
    x, grad_map = pick_pointer(xs, t), pick_pointer(grad_maps, t)
    columns = tl.cdiv(channels_out, BLOCK_N)
    ci = (tl.program_id(0) // columns) * BLOCK_M + tl.arange(0, BLOCK_M)
    co = (tl.program_id(0) % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_known, out_known = ci < channels_in, co < channels_out
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(steps):
        b, i, j, inside = deep_positions((split * steps + step) * BLOCK_K, batch, height, width, BLOCK_K)
        row, column = 2 * i + tap // 3 - 1, 2 * j + tap % 3 - 1
        there = inside & (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
        # Where a tap falls outside the map its gradient is loaded as 0: x needs no mask of its own for that.
        positions = b * x_strides[0] + (i * width + j) * x_strides[2]
        left = load_tile(x, ci * x_strides[1], positions, in_known, inside, not X_FAST)
        positions = b * d_strides[0] + (row * out_width + column) * d_strides[2]
        right = load_tile(grad_map, positions, co * d_strides[1], there, out_known, D_FAST)
        total = tl.dot(left.to(right.dtype), right, total, input_precision=PRECISION)
    share = (t * tl.num_programs(2) + split).to(tl.int64) * 9 + tap
    place = (share * channels_in + ci[:, None]) * channels_out + co[None, :]
    tl.store(partial + place, total, in_known[:, None] & out_known[None, :])


@triton.jit
def _merge_weight(partial, grad_weight, t, block, splits, channels_in, channels_out, w_strides, BLOCK: tl.constexpr):
    """Add the shares of a block of the weight's gradient in fixed order."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    size = 9 * channels_in * channels_out
    source = partial + t.to(tl.int64) * splits * size + place
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(source, place < size, 0.0)
        source += size
    co, row = place % channels_out, place // channels_out
    target = (row % channels_in) * w_strides[0] + co * w_strides[1] + (row // channels_in) * w_strides[2]
    tl.store(grad_weight + target, total, place < size)


@triton.jit
def _input_gradient(
    grad_map, weight, grad_x, tile, batch, height, width, out_height, out_width, channels_in, channels_out,
    d_strides, w_strides, x_strides, PRECISION: tl.constexpr, D_FAST: tl.constexpr, X_FAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of the deep map's gradient: a 3x3 convolution of stride 2 over `grad_map`."""
    columns = tl.cdiv(channels_in, BLOCK_N)
    b, i, j, inside = deep_positions((tile // columns) * BLOCK_M, batch, height, width, BLOCK_M)
    ci = (tile % columns) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_known = ci < channels_in
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(9 * tl.cdiv(channels_out, BLOCK_K)):
        tap, co = step % 9, (step // 9) * BLOCK_K + tl.arange(0, BLOCK_K)
        out_known = co < channels_out
        row, column = 2 * i + tap // 3 - 1, 2 * j + tap % 3 - 1
        there = inside & (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
        positions = b * d_strides[0] + (row * out_width + column) * d_strides[2]
        left = load_tile(grad_map, positions, co * d_strides[1], there, out_known, D_FAST)
        taps = weight + tap * w_strides[2] + (co[:, None] * w_strides[1] + ci[None, :] * w_strides[0])
        right = tl.load(taps, out_known[:, None] & in_known[None, :], 0.0).to(left.dtype)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    rows = b * x_strides[0] + (i * width + j) * x_strides[2]
    store_tile(grad_x, total, rows, ci * x_strides[1], inside, in_known, X_FAST)


@triton.jit
def deep_to_shallow_bwd_gradients_kernel(
    partial, grad_weights, grad_maps, weights, grad_xs, merges, splits,
    batch, height, width, out_height, out_width, channels_in, channels_out,
    d_strides, w_strides, v_strides, x_strides, PRECISION: tl.constexpr, D_FAST: tl.constexpr, X_FAST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Side by side: the first `merges` programs add shares of the weight's gradient, the others form the deep map's.

    `w_strides` are the weight's, `v_strides` those of its gradient.
    """
    program, t = tl.program_id(0), tl.program_id(1)
    if program < merges:
        if grad_weights is not None:
            _merge_weight(
                partial, pick_pointer(grad_weights, t), t, program, splits, channels_in, channels_out, v_strides, BLOCK
            )
    else:
        if grad_xs is not None:
            _input_gradient(
                pick_pointer(grad_maps, t), pick_pointer(weights, t), pick_pointer(grad_xs, t), program - merges,
                batch, height, width, out_height, out_width, channels_in, channels_out, d_strides, w_strides, x_strides,
                PRECISION, D_FAST, X_FAST, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
