"""Triton kernels of diversity_loss and diversity_target: one program per sample, its attention map in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._triton import map_strides

# Channels times positions that one program holds of a feature map at a time: 32 values for each of 128 threads.
TILE = 4096
WARPS = 4
# Samples that the second kernel adds at a time.
REDUCE_BLOCK = 256


@triton.jit
def _tile(strides, sample, first, channels, positions, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets and mask of channels first.. of one sample, [BLOCK_C, BLOCK_N]."""
    c = (first + tl.arange(0, BLOCK_C))[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    offsets = sample * strides[0] + c.to(tl.int64) * strides[1] + n.to(tl.int64) * strides[2]
    return offsets, (c < channels) & (n < positions)


@triton.jit
def _attention(
    x, strides, sample, channels, positions, IS_MAP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Channel mean of squares, or the ready map; every position is summed in the same order, so ties stay ties."""
    if IS_MAP:
        n = tl.arange(0, BLOCK_N)
        place = x + sample * strides[0] + n.to(tl.int64) * strides[2]
        found = tl.load(place, mask=n < positions, other=0.0).to(tl.float32)
    else:
        squares = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        for first in range(0, channels, BLOCK_C):
            offsets, inside = _tile(strides, sample, first, channels, positions, BLOCK_C, BLOCK_N)
            tile = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
            squares += tile * tile
        found = tl.div_rn(tl.sum(squares, 0), tl.cast(channels, tl.float32))
    return found


@triton.jit
def _unit(attention):
    """The map over max(its norm, 1e-12), and its norm."""
    norm = tl.sqrt_rn(tl.sum(attention * attention, 0))
    return tl.div_rn(attention, tl.maximum(norm, 1e-12)), norm


@triton.jit
def _shifted(attention, positions, PUBLISHED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Target t, normalised attention and norm of an attention map."""
    unit, norm = _unit(attention)
    n = tl.arange(0, BLOCK_N)
    ordered = tl.sort(tl.where(n < positions, unit, float("inf")))
    threshold = tl.sum(tl.where(n == positions // 3 - 1, ordered, 0.0), 0)
    half = norm / 2 if PUBLISHED else 0.5
    sign = tl.where(unit > threshold, 1.0, 0.0) - tl.where(unit < threshold, 1.0, 0.0)
    return (half - unit) * sign + half, unit, norm


@triton.jit
def diversity_loss_fwd_sample_kernel(
    x, x_strides, y, y_strides, losses, slope, x_channels, y_channels, positions,
    X_IS_MAP: tl.constexpr, Y_IS_MAP: tl.constexpr, PUBLISHED: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    attention = _attention(y, y_strides, sample, y_channels, positions, Y_IS_MAP, BLOCK_C, BLOCK_N)
    target, _, _ = _shifted(attention, positions, PUBLISHED, BLOCK_N)
    attention = _attention(x, x_strides, sample, x_channels, positions, X_IS_MAP, BLOCK_C, BLOCK_N)
    unit, norm = _unit(attention)
    n = tl.arange(0, BLOCK_N)
    error = tl.where(n < positions, unit - target, 0.0)
    tl.store(losses + sample, tl.sum(error * error, 0) / positions)
    # (xh.t) xh - t, written so that it does not cancel where xh is close to t.
    along = error - unit * tl.sum(unit * error, 0)
    per_value = 2.0 / positions
    if not X_IS_MAP:
        per_value = per_value * 2.0 / x_channels
    found = tl.where(norm < 1e-12, 0.0, per_value * along / tl.maximum(norm, 1e-12))
    tl.store(slope + sample * positions + n, found, mask=n < positions)


@triton.jit
def diversity_loss_fwd_reduce_kernel(losses, loss, batch, divisor, BLOCK: tl.constexpr):
    summed = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)
        summed += tl.load(losses + b, mask=b < batch, other=0.0)
    tl.store(loss, tl.sum(summed, 0) / divisor)


@triton.jit
def diversity_target_fwd_shift_kernel(
    y, y_strides, shifted, shifted_strides, channels, positions,
    PUBLISHED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    attention = _attention(y, y_strides, sample, channels, positions, False, BLOCK_C, BLOCK_N)
    target, unit, norm = _shifted(attention, positions, PUBLISHED, BLOCK_N)
    shift = (target - unit) * norm / channels
    for first in range(0, channels, BLOCK_C):
        offsets, inside = _tile(y_strides, sample, first, channels, positions, BLOCK_C, BLOCK_N)
        tile = tl.load(y + offsets, mask=inside, other=0.0).to(tl.float32)
        offsets, inside = _tile(shifted_strides, sample, first, channels, positions, BLOCK_C, BLOCK_N)
        tl.store(shifted + offsets, tile + shift[None, :], mask=inside)


@triton.jit
def diversity_loss_bwd_map_kernel(
    grad, grad_stride, x, x_strides, slope, grad_x, grad_x_strides, channels, positions, divisor,
    IS_MAP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    scale = tl.load(grad + sample * grad_stride) / divisor
    slopes = scale * tl.load(slope + sample * positions + n, mask=n < positions, other=0.0)
    first = tl.program_id(1) * BLOCK_C
    if IS_MAP:
        tile = tl.full((BLOCK_C, BLOCK_N), 1.0, tl.float32)
    else:
        offsets, inside = _tile(x_strides, sample, first, channels, positions, BLOCK_C, BLOCK_N)
        tile = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    offsets, inside = _tile(grad_x_strides, sample, first, channels, positions, BLOCK_C, BLOCK_N)
    tl.store(grad_x + offsets, tile * slopes[None, :], mask=inside)


def _channels(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else 1


def _blocks(channels: int, positions: int) -> dict[str, int]:
    block_n = triton.next_power_of_2(positions)
    return {
        "BLOCK_C": min(triton.next_power_of_2(max(channels, 1)), max(TILE // block_n, 1)),
        "BLOCK_N": block_n,
        "num_warps": WARPS,
    }


def launch_loss_fwd(x: Tensor, y: Tensor, mode: str, reduction: str) -> tuple[Tensor, Tensor]:
    """Loss, and its derivative with respect to each position of x's map."""
    batch, positions = x.shape[0], x.shape[-1] * x.shape[-2]
    kept = {"dtype": torch.float32, "device": x.device}
    losses, slope = torch.empty(batch, **kept), torch.empty(batch, positions, **kept)
    x, *x_strides = map_strides(x)
    y, *y_strides = map_strides(y)
    if batch:
        diversity_loss_fwd_sample_kernel[(batch,)](
            x, tuple(x_strides), y, tuple(y_strides), losses, slope, _channels(x), _channels(y), positions,
            X_IS_MAP=x.dim() == 3, Y_IS_MAP=y.dim() == 3, PUBLISHED=mode == "published",
            **_blocks(max(_channels(x), _channels(y)), positions),
        )  # fmt: skip
    if reduction == "none":
        return losses, slope
    loss = torch.empty((), **kept)
    divisor = float(batch if reduction == "mean" else 1)
    diversity_loss_fwd_reduce_kernel[(1,)](losses, loss, batch, divisor, BLOCK=REDUCE_BLOCK, num_warps=WARPS)
    return loss, slope


def launch_loss_bwd(grad: Tensor, x: Tensor, slope: Tensor, reduction: str) -> Tensor:
    """Gradient of x."""
    x, *x_strides = map_strides(x)
    grad_x = torch.empty_like(x)
    _, *grad_x_strides = map_strides(grad_x)
    channels, (batch, positions) = _channels(x), slope.shape
    if batch and channels:
        blocks = _blocks(channels, positions)
        diversity_loss_bwd_map_kernel[batch, triton.cdiv(channels, blocks["BLOCK_C"])](
            grad, grad.stride(0) if grad.dim() else 0, x, tuple(x_strides), slope, grad_x, tuple(grad_x_strides),
            channels, positions, float(batch if reduction == "mean" else 1), IS_MAP=x.dim() == 3, **blocks,
        )  # fmt: skip
    return grad_x


def launch_target_fwd(y: Tensor, mode: str) -> Tensor:
    """The shifted feature map."""
    y, *y_strides = map_strides(y)
    shifted = torch.empty_like(y)
    _, *shifted_strides = map_strides(shifted)
    batch, channels, height, width = y.shape
    if batch and channels:
        diversity_target_fwd_shift_kernel[(batch,)](
            y, tuple(y_strides), shifted, tuple(shifted_strides), channels, height * width,
            PUBLISHED=mode == "published", **_blocks(channels, height * width),
        )  # fmt: skip
    return shifted
