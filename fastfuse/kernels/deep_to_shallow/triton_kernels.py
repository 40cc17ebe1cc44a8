"""Forward launchers of deep_to_shallow's Triton kernels, one stage at a time; triton_backward.py has the others."""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from fastfuse.kernels._limits import check_count
from fastfuse.kernels.deep_to_shallow import outputs
from fastfuse.kernels.deep_to_shallow import triton_conv as conv
from fastfuse.kernels.deep_to_shallow import triton_norm as norm
from fastfuse.kernels.deep_to_shallow.triton_tiles import (
    DTYPES,
    MERGE_BLOCK,
    PRECISION,
    SMALLEST,
    chosen,
    map_grid,
    product_tile,
    rows_fast,
    strided,
)

# Of half precision: with 4, Triton 3.6 spills 224 bytes on sm_100.
ATTENTION_WARPS = 8
# A thread's registers in these: all that 8 warps can have. Left alone, the assembler takes 80 and spills 24 bytes
# (bfloat16, sm_80, triton 3.8).
ATTENTION_REGISTERS = 255
# Of a float32 tile, which also adds up squares: with 32, sm_80 and sm_100 spill with 4 warps and with 8.
ATTENTION_COLUMNS = 16
# Registers a thread of a float32 tile that is shifted on load, its channels contiguous: as many as three blocks of a
# multiprocessor can have. Left alone, the assembler takes 96 and spills 8 bytes (sm_80, triton 3.8).
SHIFTED_REGISTERS = 168
# Of a half-precision tile of few columns from a map whose positions are contiguous, loaded one by one. Left alone, the
# assembler takes 72 and spills 12 bytes (bfloat16, sm_100, triton 3.6).
NARROW_REGISTERS = 80


def launch_fwd(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    out: Sequence[Tensor],
    normed: Sequence[Tensor],
    means: Sequence[Tensor],
    rstds: Sequence[Tensor],
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    """One launch on running statistics, three on batch statistics, for all transforms that lie alike in memory."""
    batch, channels, height, width = out[0].shape
    deep, channels_in, dtype = xs[0].shape[2:], xs[0].shape[1], out[0].dtype
    if out[0].numel() == 0:
        return
    tile, options = product_tile("deep_to_shallow_fwd", xs[0], dtype, channels, channels_in)
    grid = triton.cdiv(batch * deep[0] * deep[1], tile[0]), triton.cdiv(channels, tile[1])
    tiles = 4 * grid[0]
    check_count("x", xs[0], "partial sums", (2 * channels + 1) * tiles)
    for members, (x, weight, y), (x_strides, w_strides, strides) in strided(xs, weights, out):
        count = len(members)
        values, gamma, beta, running_mean, running_var, mean, rstd = (
            chosen(own, members) for own in (normed, gammas, betas, running_means, running_vars, means, rstds)
        )
        partial = mean[0].new_empty(count * (2 * channels + 1) * tiles) if training else None
        narrow = dtype != torch.float32 and tile[1] == SMALLEST and rows_fast(x_strides)
        limit = {"maxnreg": NARROW_REGISTERS} if narrow else {}
        conv.deep_to_shallow_fwd_phases_kernel[(*grid, 4 * count)](
            x, weight, values, None if training else y, gamma, beta, running_mean, running_var, mean, rstd, partial,
            batch, *deep, height, width, channels_in, channels, eps, x_strides, w_strides, strides,
            PRECISION, rows_fast(x_strides), rows_fast(strides), DTYPES[dtype], *tile, **options, **limit,
        )  # fmt: skip
        if training:
            norm.deep_to_shallow_fwd_statistics_kernel[(channels, count)](
                partial, mean, rstd, running_mean, running_var, tiles, batch * height * width, momentum, eps,
                MERGE_BLOCK,
            )  # fmt: skip
            map_tiles, blocks = map_grid(y[0], strides)
            norm.deep_to_shallow_fwd_normalise_kernel[(*map_tiles, count)](
                values, y, gamma, beta, mean, rstd, height * width, channels, strides, *blocks
            )


def launch_attention(
    xs: Sequence[Tensor],
    shifts: Sequence[Tensor],
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    padding: Sequence[int],
    last: bool,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """One launch for all transforms that lie alike in memory."""
    attentions, maps = outputs.attention_outputs(xs, weights, padding, last, dtype)
    batch, height, width = attentions[0].shape
    deep, channels_in, channels = xs[0].shape[2:], *weights[0].shape[:2]
    if attentions[0].numel() == 0:
        return [*attentions, *maps]
    tile, options = product_tile("deep_to_shallow_attention", xs[0], dtype, channels, channels_in)
    if dtype == torch.float32:
        tile = tile[0], min(tile[1], ATTENTION_COLUMNS), tile[2]
    else:
        options |= {"num_warps": ATTENTION_WARPS, "maxnreg": ATTENTION_REGISTERS}
    tiles = triton.cdiv(batch * deep[0] * deep[1], tile[0])
    for members, (x, shift, weight, out), (x_strides, s_strides, w_strides, strides) in strided(
        xs, shifts, weights, maps
    ):
        shifted = dtype == torch.float32 and shifts and not rows_fast(x_strides)
        limit = {"maxnreg": SHIFTED_REGISTERS} if shifted else {}
        given = (chosen(own, members) for own in (attentions, gammas, betas, running_means, running_vars))
        conv.deep_to_shallow_fwd_attention_kernel[(tiles, 4 * len(members))](
            x, shift, weight, out, *given, batch, *deep, height, width, channels_in, channels, eps,
            x_strides, s_strides, w_strides, strides,
            PRECISION, rows_fast(x_strides), rows_fast(strides), DTYPES[dtype], *tile, **options, **limit,
        )  # fmt: skip
    return [*attentions, *maps]
