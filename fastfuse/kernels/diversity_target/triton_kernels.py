"""Triton kernels of the diversity operators: one program per sample and pair, its attention map in registers."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels import _triton
from fastfuse.kernels._device import divide, pick, pick_pointer, sum_of_samples, table
from fastfuse.kernels._limits import grid
from fastfuse.kernels._triton import map_like
from fastfuse.kernels.diversity_target.layout import sizes

# Channels times positions that one program holds of a feature map at a time: 32 values for each of 128 threads.
TILE = 4096
WARPS = 4
# Samples that the second kernel adds at a time.
REDUCE_BLOCK = 256


@triton.jit
def _tile(layout, pair, sample, first, positions, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets and mask of channels first.. of one sample of one pair's map, [BLOCK_C, BLOCK_N]."""
    c = (first + tl.arange(0, BLOCK_C))[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    channel = c.to(tl.int64) * pick(layout[2], pair)
    offsets = sample * pick(layout[1], pair) + channel + n.to(tl.int64) * pick(layout[3], pair)
    return offsets, (c < pick(layout[0], pair)) & (n < positions)


@triton.jit
def _attention(
    maps, layout, pair, sample, positions, READY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Channel mean of squares, or the ready map; every position is summed in the same order, so ties stay ties."""
    start = pick_pointer(maps, pair)
    if READY:
        offsets, inside = _tile(layout, pair, sample, 0, positions, 1, BLOCK_N)
        found = tl.sum(tl.load(start + offsets, mask=inside, other=0.0).to(tl.float32), 0)
    else:
        channels = pick(layout[0], pair)
        squares = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        for first in range(0, channels, BLOCK_C):
            offsets, inside = _tile(layout, pair, sample, first, positions, BLOCK_C, BLOCK_N)
            tile = tl.load(start + offsets, mask=inside, other=0.0).to(tl.float32)
            squares += tile * tile
        found = divide(tl.sum(squares, 0), channels)
    return found


@triton.jit
def _unit(attention):
    """The map over max(its norm, 1e-12), and its norm."""
    norm = tl.sqrt_rn(tl.sum(attention * attention, 0))
    return tl.div_rn(attention, tl.maximum(norm, 1e-12)), norm


@triton.jit
def _target(attention, positions, PUBLISHED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Target t, normalised attention and norm of an attention map."""
    unit, norm = _unit(attention)
    n = tl.arange(0, BLOCK_N)
    ordered = tl.sort(tl.where(n < positions, unit, float("inf")))
    threshold = tl.sum(tl.where(n == positions // 3 - 1, ordered, 0.0), 0)
    half = norm / 2 if PUBLISHED else 0.5
    sign = tl.where(unit > threshold, 1.0, 0.0) - tl.where(unit < threshold, 1.0, 0.0)
    return (half - unit) * sign + half, unit, norm


@triton.jit
def diversity_target_fwd_sample_kernel(
    x, x_layout, y, y_layout, shifted, shifted_layout, extents, losses, slope, row, width,
    LOSS: tl.constexpr, SHIFT: tl.constexpr, READY_X: tl.constexpr, READY_Y: tl.constexpr,
    PUBLISHED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The loss of a sample and its slope (LOSS), and y with its attention shifted (SHIFT)."""
    sample, pair = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if sample < pick(extents[0], pair):
        positions = pick(extents[1], pair)
        attention = _attention(y, y_layout, pair, sample, positions, READY_Y, BLOCK_C, BLOCK_N)
        target, unit, norm = _target(attention, positions, PUBLISHED, BLOCK_N)
        shift = divide((target - unit) * norm, pick(y_layout[0], pair))
        if LOSS:
            attention = _attention(x, x_layout, pair, sample, positions, READY_X, BLOCK_C, BLOCK_N)
            unit, norm = _unit(attention)
            n = tl.arange(0, BLOCK_N)
            error = tl.where(n < positions, unit - target, 0.0)
            place = pair * row + sample
            tl.store(losses + place, divide(tl.sum(error * error, 0), positions))
            # (xh.t) xh - t, written so that it does not cancel where xh is close to t.
            along = error - unit * tl.sum(unit * error, 0)
            per_value = divide(2.0, positions)
            if not READY_X:
                per_value = divide(per_value * 2.0, pick(x_layout[0], pair))
            found = tl.where(norm < 1e-12, 0.0, divide(per_value * along, tl.maximum(norm, 1e-12)))
            tl.store(slope + place * width + n, found, mask=n < positions)
        if SHIFT:
            start, to = pick_pointer(y, pair), pick_pointer(shifted, pair)
            for first in range(0, pick(y_layout[0], pair), BLOCK_C):
                offsets, inside = _tile(y_layout, pair, sample, first, positions, BLOCK_C, BLOCK_N)
                tile = tl.load(start + offsets, mask=inside, other=0.0).to(tl.float32)
                offsets, inside = _tile(shifted_layout, pair, sample, first, positions, BLOCK_C, BLOCK_N)
                tl.store(to + offsets, tile + shift[None, :], mask=inside)


@triton.jit
def diversity_target_fwd_reduce_kernel(per_sample, row, batches, losses, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program per pair adds its samples in a fixed order."""
    pair = tl.program_id(0)
    tl.store(losses + pair, sum_of_samples(per_sample + pair * row, pick(batches, pair), MEAN, BLOCK))


@triton.jit
def diversity_target_bwd_map_kernel(
    cotangent, cotangent_strides, slope, row, width, x, x_layout, gradients, gradient_layout, extents,
    MEAN: tl.constexpr, READY: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program per sample, BLOCK_C channels and map that needs a gradient: slope times x, or the slope itself."""
    sample, item = tl.program_id(0).to(tl.int64), tl.program_id(2)
    batch, positions, pair = pick(extents[0], item), pick(extents[1], item), pick(extents[2], item)
    first = tl.program_id(1) * BLOCK_C
    if (sample < batch) & (first < pick(x_layout[0], item)):
        scale = tl.load(cotangent + pair * cotangent_strides[0] + sample * cotangent_strides[1])
        if MEAN:
            scale = divide(scale, batch)
        n = tl.arange(0, BLOCK_N)
        slopes = scale * tl.load(slope + (pair * row + sample) * width + n, mask=n < positions, other=0.0)
        if READY:
            tile = tl.full((BLOCK_C, BLOCK_N), 1.0, tl.float32)
        else:
            offsets, inside = _tile(x_layout, item, sample, first, positions, BLOCK_C, BLOCK_N)
            tile = tl.load(pick_pointer(x, item) + offsets, mask=inside, other=0.0).to(tl.float32)
        offsets, inside = _tile(gradient_layout, item, sample, first, positions, BLOCK_C, BLOCK_N)
        tl.store(pick_pointer(gradients, item) + offsets, tile * slopes[None, :], mask=inside)


def _addresses(maps: Sequence[Tensor]) -> tuple[tuple, tuple]:
    """The maps, and tables of their channels (1 for a ready map) and of the strides of sample, channel, position."""
    rows = [(x.shape[1] if x.dim() == 4 else 1, *_triton.map_strides(x, far=True)[1:]) for x in maps]
    return tuple(maps), tuple(table(values) for values in zip(*rows, strict=True))


def _extents(maps: Sequence[Tensor]) -> tuple[tuple, tuple]:
    """Tables of batches and positions."""
    return table([x.shape[0] for x in maps]), table([x.shape[-1] * x.shape[-2] for x in maps])


def _blocks(maps: Sequence[Tensor], width: int) -> dict[str, int]:
    features = [x for x in maps if x.dim() == 4]
    channels = max((x.shape[1] for x in features), default=1)
    # Where rows of the contiguous axis start at odd places, every element has an address of its own: fewer fit the
    # registers (520 bytes spilled on sm_90 at 18 channels in channels-last with the full tile).
    odd = any((x.shape[1] if x.stride(1) == 1 else x.shape[-2] * x.shape[-1]) % 16 for x in features)
    block_n = triton.next_power_of_2(width)
    return {
        "BLOCK_C": min(triton.next_power_of_2(max(channels, 1)), max(TILE // (2 if odd else 1) // block_n, 1)),
        "BLOCK_N": block_n,
        "num_warps": WARPS,
    }


def forward(
    x: Sequence[Tensor], y: Sequence[Tensor], mode: str, reduction: str, shift: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """As `closed_form.forward`, for maps of one dtype and kind on each side. At most two launches for all pairs."""
    pairs, (row, width) = len(x), sizes(y)
    per_sample = y[0].new_empty((pairs, row), dtype=torch.float32)
    slope = y[0].new_empty((pairs, row, width), dtype=torch.float32)
    shifted = [map_like(one) for one in y if shift]
    extents = _extents(y)
    if row:
        # In place of maps that there are not stand the y; nothing is read from them or written to them.
        diversity_target_fwd_sample_kernel[(row, len(y))](
            *_addresses(x or y), *_addresses(y), *_addresses(shifted or y), extents, per_sample, slope, row, width,
            LOSS=pairs > 0, SHIFT=shift, READY_X=(x or y)[0].dim() == 3, READY_Y=y[0].dim() == 3,
            PUBLISHED=mode == "published", **_blocks((*x, *y), width),
        )  # fmt: skip
    if reduction == "none" or not pairs:
        return per_sample if reduction == "none" else per_sample.new_empty(0), slope, shifted
    losses = y[0].new_empty(pairs, dtype=torch.float32)
    diversity_target_fwd_reduce_kernel[(pairs,)](
        per_sample, row, extents[0], losses, MEAN=reduction == "mean", BLOCK=REDUCE_BLOCK, num_warps=WARPS
    )
    return losses, slope, shifted


def backward(
    cotangent: Tensor, slope: Tensor, x: Sequence[Tensor], pairs: Sequence[int], reduction: str
) -> list[Tensor]:
    """Gradients of some x, those of the given pairs of the forward. One launch."""
    gradients = [map_like(one) for one in x]
    _, row, width = slope.shape
    blocks = _blocks(x, sizes(x)[1])
    channels = max(one.shape[1] if one.dim() == 4 else 1 for one in x)
    programs = sizes(x)[0], triton.cdiv(channels, blocks["BLOCK_C"]), len(x)
    if programs[0] and programs[1]:
        diversity_target_bwd_map_kernel[grid("x", x[0], *programs)](
            cotangent, (cotangent.stride(0), cotangent.stride(1) if reduction == "none" else 0), slope, row, width,
            *_addresses(x), *_addresses(gradients), (*_extents(x), table(pairs)),
            MEAN=reduction == "mean", READY=x[0].dim() == 3, **blocks,
        )  # fmt: skip
    return gradients
