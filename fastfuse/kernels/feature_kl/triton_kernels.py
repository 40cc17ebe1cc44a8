"""Triton kernels of feature_kl: one launch for all students, a second, small one adds the partial sums.

A distribution is a row: of the positions of a channel, or of the channels of a position. A block takes ROWS of them at
a time and walks over each twice: for the normaliser of its softmax, then for what is asked. The second walk finds its
numbers in the cache.

`maps` are the students' maps, then their targets; `strides` are those of the maps, then of their gradients, or one
entry for all: the compiler then computes addresses once.
"""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels import _students, _triton
from fastfuse.kernels._device import ordered_sum
from fastfuse.kernels._limits import check_count

# Of each map: one 16-byte load for each of 128 threads, half of that for more than FEW students: more would spill
# registers.
TILE_BYTES = 2048
FEW = 4
WARPS = 4
# A thread's registers in the backward of more than FEW: left alone, the assembler takes 40 and spills 16 bytes (of
# float32, sm_80, triton 3.6), or 128 and spills 24 (bfloat16, sm_100). Pieces of 64 positions need more than 128.
# In the forward of FEW whose rows are not contiguous it takes 64 and spills up to 40 (float16, sm_90, triton 3.8).
MOST_REGISTERS = 168
# The longest piece of a row in one tile: where rows are contiguous in memory, and where their neighbours are. With 512
# and 32, eight students spill 24 bytes of registers on sm_80, and 16 on sm_90 with triton 3.6.
LONGEST_PIECE = 128
LONGEST_STRIDED_PIECE = 16
PROGRAMS = 2048
FINISH_BLOCK = 1024


@triton.jit
def _turns(extent, ROWS: tl.constexpr):
    """How often a block takes rows, at most."""
    return tl.cdiv(extent[0] * tl.cdiv(extent[1], ROWS), tl.num_programs(0))


@triton.jit
def _place(turn, extent, ROWS: tl.constexpr):
    """Sample and rows that a block comes to in one of its turns, and which of the rows exist."""
    down = tl.cdiv(extent[1], ROWS)
    place = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
    sample = place // down
    row = place % down * ROWS + tl.arange(0, ROWS)
    return sample, row, row < tl.where(sample < extent[0], extent[1], 0)


@triton.jit
def _address(pointer, strides, MAP: tl.constexpr, tile, start, extent, BLOCK: tl.constexpr):
    """Where a piece of the tile's rows lies in map MAP, and which elements exist."""
    element = start + tl.arange(0, BLOCK)
    inside = tile[2][:, None] & (element < extent[2])[None, :]
    stride = strides[MAP % len(strides)]
    at = pointer + tile[0] * stride[0] + (tile[1][:, None] * stride[1] + element.to(tl.int64)[None, :] * stride[2])
    return at, inside


@triton.jit
def _over_temperature(x, inverse_temperature):
    """x / T without a division. The rounding of 1 / T alone would err in the same direction everywhere."""
    return x * inverse_temperature[0] + x * inverse_temperature[1]


@triton.jit
def _normaliser(
    maps, strides, MAP: tl.constexpr, tile, extent, inverse_temperature, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Of each row the largest logit x / T and the logarithm of the sum of exp(logit - largest)."""
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, extent[2], BLOCK):
        at, inside = _address(maps[MAP], strides, MAP, tile, start, extent, BLOCK)
        x = _over_temperature(tl.load(at, inside, other=0).to(tl.float32), inverse_temperature)
        # Rows that do not exist stay finite.
        x = tl.where((start + tl.arange(0, BLOCK) < extent[2])[None, :], x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher[:, None]), 1)
        top = higher
    return top, tl.log(total)


@triton.jit
def _normalisers(
    maps, strides, OWN: tl.constexpr, STUDENTS: tl.constexpr, tile, extent, inverse_temperature,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Those of the maps OWN .. OWN + STUDENTS - 1."""
    found = ()
    for s in tl.static_range(STUDENTS):
        one = _normaliser(maps, strides, OWN + s, tile, extent, inverse_temperature, ROWS, BLOCK)
        found += (one,)
    return found


@triton.jit
def _log_probability(
    maps, strides, MAP: tl.constexpr, normaliser, tile, start, extent, inverse_temperature, BLOCK: tl.constexpr
):
    at, inside = _address(maps[MAP], strides, MAP, tile, start, extent, BLOCK)
    x = _over_temperature(tl.load(at, inside, other=0).to(tl.float32), inverse_temperature)
    return x - normaliser[0][:, None] - normaliser[1][:, None]


@triton.jit
def _divergences(
    maps, strides, OWN: tl.constexpr, STUDENTS: tl.constexpr, GOAL: tl.constexpr, own, goal,
    tile, extent, inverse_temperature, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per row the divergences of STUDENTS maps from map GOAL, added up; 0 where there is no row."""
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, extent[2], BLOCK):
        log_q = _log_probability(maps, strides, GOAL, goal, tile, start, extent, inverse_temperature, BLOCK)
        ratio = tl.zeros((ROWS, BLOCK), tl.float32)
        for s in tl.static_range(STUDENTS):
            ratio += log_q - _log_probability(
                maps, strides, OWN + s, own[s], tile, start, extent, inverse_temperature, BLOCK
            )
        inside = tile[2][:, None] & (start + tl.arange(0, BLOCK) < extent[2])[None, :]
        total += tl.sum(tl.where(inside, tl.exp(log_q) * ratio, 0), 1)
    return total


@triton.jit
def _sum_divergences(
    maps, strides, OWN: tl.constexpr, STUDENTS: tl.constexpr, GOAL: tl.constexpr, extent, inverse_temperature,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum over a block's rows of the divergences of STUDENTS maps from map GOAL."""
    total = tl.zeros((ROWS,), tl.float32)
    for turn in range(0, _turns(extent, ROWS)):
        tile = _place(turn, extent, ROWS)
        goal = _normaliser(maps, strides, GOAL, tile, extent, inverse_temperature, ROWS, BLOCK)
        own = _normalisers(maps, strides, OWN, STUDENTS, tile, extent, inverse_temperature, ROWS, BLOCK)
        total += _divergences(
            maps, strides, OWN, STUDENTS, GOAL, own, goal, tile, extent, inverse_temperature, ROWS, BLOCK
        )
    return tl.sum(total)


@triton.jit
def feature_kl_fwd_sum_kernel(
    maps, strides, extents, scales, partial, inverse_temperature,
    STUDENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Partial sums of the loss: one for each block, and for each student with a target of its own."""
    if len(extents) == 1:
        total = _sum_divergences(maps, strides, 0, STUDENTS, STUDENTS, extents[0], inverse_temperature, ROWS, BLOCK)
        tl.store(partial + tl.program_id(0), total * scales[0])
    else:
        # A branch for each student, not tables read on the device: the compiler knows strides and alignment of each.
        for s in tl.static_range(STUDENTS):
            if tl.program_id(1) == s:
                total = _sum_divergences(
                    maps, strides, s, 1, STUDENTS + s, extents[s], inverse_temperature, ROWS, BLOCK
                )
                tl.store(partial + s * tl.num_programs(0) + tl.program_id(0), total * scales[s])


@triton.jit
def feature_kl_fwd_finish_kernel(partial, loss, count, BLOCK: tl.constexpr):
    """Add the partial sums in a fixed order."""
    tl.store(loss, ordered_sum(partial, count, BLOCK))


@triton.jit
def _slopes(
    scale, maps, gradients, strides, OWN: tl.constexpr, STUDENTS: tl.constexpr, GOAL: tl.constexpr,
    WANTED: tl.constexpr, extent, inverse_temperature, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write those gradients of STUDENTS maps and of map GOAL, their target, that are wanted."""
    for turn in range(0, _turns(extent, ROWS)):
        tile = _place(turn, extent, ROWS)
        goal = _normaliser(maps, strides, GOAL, tile, extent, inverse_temperature, ROWS, BLOCK)
        own = _normalisers(maps, strides, OWN, STUDENTS, tile, extent, inverse_temperature, ROWS, BLOCK)
        if (WANTED >> GOAL) & 1:
            divergence = _divergences(
                maps, strides, OWN, STUDENTS, GOAL, own, goal, tile, extent, inverse_temperature, ROWS, BLOCK
            )
        for start in range(0, extent[2], BLOCK):
            log_q = _log_probability(maps, strides, GOAL, goal, tile, start, extent, inverse_temperature, BLOCK)
            q, ratio = tl.exp(log_q), tl.zeros((ROWS, BLOCK), tl.float32)
            for s in tl.static_range(STUDENTS):
                log_p = _log_probability(
                    maps, strides, OWN + s, own[s], tile, start, extent, inverse_temperature, BLOCK
                )
                ratio += log_q - log_p
                if (WANTED >> (OWN + s)) & 1:
                    at, inside = _address(gradients[OWN + s], strides, len(maps) + OWN + s, tile, start, extent, BLOCK)
                    tl.store(at, scale * (tl.exp(log_p) - q), inside)
            if (WANTED >> GOAL) & 1:
                at, inside = _address(gradients[GOAL], strides, len(maps) + GOAL, tile, start, extent, BLOCK)
                tl.store(at, scale * q * (ratio - divergence[:, None]), inside)


@triton.jit
def feature_kl_bwd_kernel(
    gradient, maps, gradients, strides, extents, scales, inverse_temperature,
    WANTED: tl.constexpr, STUDENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the maps whose bit of WANTED is set."""
    slope = tl.load(gradient) * inverse_temperature[0]
    if len(extents) == 1:
        _slopes(
            slope * scales[0], maps, gradients, strides, 0, STUDENTS, STUDENTS,
            WANTED, extents[0], inverse_temperature, ROWS, BLOCK,
        )  # fmt: skip
    else:
        for s in tl.static_range(STUDENTS):
            if tl.program_id(1) == s:
                _slopes(
                    slope * scales[s], maps, gradients, strides, s, 1, STUDENTS + s,
                    WANTED, extents[s], inverse_temperature, ROWS, BLOCK,
                )  # fmt: skip


class _Launch:
    """Geometry of one launch over S pairs of maps: grid, tile, and how rows are addressed."""

    def __init__(self, features: Sequence[Tensor], targets: Sequence[Tensor], temperature: float, over: bool) -> None:
        self.over_channels = over
        pairs = len(targets)
        self.extents = tuple(self._extent(x) for x in features[:pairs])
        length = triton.next_power_of_2(max(extent[2] for extent in self.extents))
        contiguous = self.strides(features[:1])[0][2] == 1
        block = min(max(length, 1), LONGEST_PIECE if contiguous else LONGEST_STRIDED_PIECE)
        together = len(features) if pairs == 1 else 1
        elements = TILE_BYTES // features[0].element_size() // (1 if together <= FEW else 2)
        tile = {"ROWS": max(elements // block, 1), "BLOCK": block}
        turns = max(batch * triton.cdiv(rows, tile["ROWS"]) for batch, rows, _ in self.extents)
        _, rows, values = (max(sizes) for sizes in zip(*self.extents, strict=True))
        check_count("features", features[0], "distributions of a sample", rows)
        check_count("features", features[0], "values of a distribution", values)
        check_count("features", features[0], "tiles", turns)
        self.grid = (min(max(turns, 1), max(PROGRAMS // pairs, 1)), pairs)
        # The mean over nothing is not a number.
        counts = [batch * rows for batch, rows, _ in self.extents]
        self.scales = tuple(temperature**2 / count if count else float("nan") for count in counts)
        # 1 / T as float32 takes it, and what that leaves out.
        rounded = struct.unpack("f", struct.pack("f", 1 / temperature))[0]
        self.inverse_temperature = rounded, 1 / temperature - rounded
        self.options = {"STUDENTS": len(features), **tile, "num_warps": WARPS}
        strided = together == FEW and features[0].dtype == torch.float16 and not contiguous
        self.forward_limit = {"maxnreg": MOST_REGISTERS} if strided else {}
        self.backward_limit = {} if together <= FEW else {"maxnreg": MOST_REGISTERS}

    def _extent(self, x: Tensor) -> tuple[int, int, int]:
        """Samples, rows in a sample, elements in a row."""
        positions = x.shape[2] * x.shape[3]
        return (x.shape[0], positions, x.shape[1]) if self.over_channels else (x.shape[0], x.shape[1], positions)

    def strides(self, maps: Sequence[Tensor]) -> tuple[tuple[int, ...], ...]:
        """Strides of sample, row and element of each map, once if they are the same."""
        found = [_triton.map_strides(x, far=True)[1:] for x in maps]
        found = [(b, n, c) if self.over_channels else (b, c, n) for b, c, n in found]
        return tuple(found[:1] if len(set(found)) == 1 else found)


def forward(features: Sequence[Tensor], targets: Sequence[Tensor], temperature: float, over_channels: bool) -> Tensor:
    """Loss of S maps against one target or one each; every map has one stride for its positions."""
    launch, maps = _Launch(features, targets, temperature, over_channels), (*features, *targets)
    partial = features[0].new_empty(launch.grid, dtype=torch.float32)
    loss = features[0].new_empty((), dtype=torch.float32)
    feature_kl_fwd_sum_kernel[launch.grid](
        maps, launch.strides(maps), launch.extents, launch.scales, partial, launch.inverse_temperature,
        **launch.options, **launch.forward_limit,
    )  # fmt: skip
    feature_kl_fwd_finish_kernel[(1,)](partial, loss, partial.numel(), BLOCK=FINISH_BLOCK)
    return loss


def backward(
    gradient: Tensor,
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    temperature: float,
    over_channels: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of (*features, *targets) that are wanted; one launch."""
    launch, to = _Launch(features, targets, temperature, over_channels), _students.Places(features, targets, wanted)
    feature_kl_bwd_kernel[launch.grid](
        gradient, to.maps, to.gradients, launch.strides((*to.maps, *to.gradients)), launch.extents, launch.scales,
        launch.inverse_temperature, WANTED=to.wanted, **launch.options, **launch.backward_limit,
    )  # fmt: skip
    return to.found
