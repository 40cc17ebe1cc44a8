"""Triton kernels of feature_mse: one launch for all students, a second, small one adds the partial sums."""

from collections.abc import Sequence
from itertools import compress

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels import _triton
from fastfuse.kernels._device import ordered_sum

# 16 elements of each map for each of 256 threads: four 16-byte loads in fp32.
TILE = 4096
WARPS = 8
# Eight blocks on each of about 130 multiprocessors; each walks over tiles, so few partial sums are left to add.
PROGRAMS = 1024
FINISH_BLOCK = 1024


@triton.jit
def _turns(extent, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many tiles a block comes to, at most."""
    tiles = tl.cdiv(extent[1], BLOCK_C) * tl.cdiv(extent[2], BLOCK_N) * extent[0]
    return tl.cdiv(tiles, tl.num_programs(0))


@triton.jit
def _place(turn, extent, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sample, channels, positions and mask of the tile that a block comes to in one of its turns."""
    across, down = tl.cdiv(extent[2], BLOCK_N), tl.cdiv(extent[1], BLOCK_C)
    tile = tl.program_id(0).to(tl.int64) + turn * tl.num_programs(0)
    sample = tile // (across * down)
    channel = (tile // across % down * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    position = (tile % across * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (channel < tl.where(sample < extent[0], extent[1], 0)) & (position < extent[2])
    return sample, channel, position, inside


@triton.jit
def _address(pointer, stride, sample, channel, position):
    return pointer + (sample * stride[0] + channel * stride[1] + position * stride[2])


@triton.jit
def _sum_squares(
    features, feature_strides, target, target_stride, extent, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Sum over a block's tiles of the squared distances of maps from their common target."""
    total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for turn in range(0, _turns(extent, BLOCK_C, BLOCK_N)):
        sample, channel, position, inside = _place(turn, extent, BLOCK_C, BLOCK_N)
        goal = tl.load(_address(target, target_stride, sample, channel, position), inside, other=0).to(tl.float32)
        for s in tl.static_range(len(features)):
            at = _address(features[s], feature_strides[s], sample, channel, position)
            difference = tl.load(at, inside, other=0).to(tl.float32) - goal
            total += difference * difference
    return tl.sum(total)


@triton.jit
def feature_mse_fwd_sum_kernel(
    features, feature_strides, targets, target_strides, extents, scales, partial,
    SHARED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of the loss: one for each block, and for each student with a target of its own."""
    if SHARED:
        total = _sum_squares(features, feature_strides, targets[0], target_strides[0], extents[0], BLOCK_C, BLOCK_N)
        tl.store(partial + tl.program_id(0), total * scales[0])
    else:
        # A branch for each student, not tables read on the device: the compiler knows strides and alignment of each.
        for s in tl.static_range(len(features)):
            if tl.program_id(1) == s:
                total = _sum_squares(
                    (features[s],), (feature_strides[s],), targets[s], target_strides[s], extents[s], BLOCK_C, BLOCK_N
                )
                tl.store(partial + s * tl.num_programs(0) + tl.program_id(0), total * scales[s])


@triton.jit
def feature_mse_fwd_finish_kernel(partial, loss, count, BLOCK: tl.constexpr):
    """Add the partial sums in a fixed order."""
    tl.store(loss, ordered_sum(partial, count, BLOCK))


@triton.jit
def _slopes(
    scale, features, feature_strides, target, target_stride,
    feature_gradients, feature_gradient_strides, target_gradient, target_gradient_stride, extent,
    WANTED_FEATURES: tl.constexpr, WANTED_TARGET: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the gradients of maps and of their common target, as far as they are wanted."""
    for turn in range(0, _turns(extent, BLOCK_C, BLOCK_N)):
        sample, channel, position, inside = _place(turn, extent, BLOCK_C, BLOCK_N)
        goal = tl.load(_address(target, target_stride, sample, channel, position), inside, other=0).to(tl.float32)
        total = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
        for s in tl.static_range(len(features)):
            at = _address(features[s], feature_strides[s], sample, channel, position)
            slope = scale * (tl.load(at, inside, other=0).to(tl.float32) - goal)
            total += slope
            if (WANTED_FEATURES >> s) & 1:
                at = _address(feature_gradients[s], feature_gradient_strides[s], sample, channel, position)
                tl.store(at, slope, inside)
        if WANTED_TARGET:
            tl.store(_address(target_gradient, target_gradient_stride, sample, channel, position), -total, inside)


@triton.jit
def feature_mse_bwd_kernel(
    gradient, features, feature_strides, targets, target_strides,
    feature_gradients, feature_gradient_strides, target_gradients, target_gradient_strides, extents, scales,
    WANTED_FEATURES: tl.constexpr, WANTED_TARGETS: tl.constexpr,
    SHARED: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of all maps; bit i of WANTED_FEATURES and WANTED_TARGETS asks for that of map i."""
    slope = 2 * tl.load(gradient)
    if SHARED:
        _slopes(
            slope * scales[0], features, feature_strides, targets[0], target_strides[0],
            feature_gradients, feature_gradient_strides, target_gradients[0], target_gradient_strides[0], extents[0],
            WANTED_FEATURES, WANTED_TARGETS, BLOCK_C, BLOCK_N,
        )  # fmt: skip
    else:
        for s in tl.static_range(len(features)):
            if tl.program_id(1) == s:
                _slopes(
                    slope * scales[s], (features[s],), (feature_strides[s],), targets[s], target_strides[s],
                    (feature_gradients[s],), (feature_gradient_strides[s],), target_gradients[s],
                    target_gradient_strides[s], extents[s],
                    (WANTED_FEATURES >> s) & 1, (WANTED_TARGETS >> s) & 1, BLOCK_C, BLOCK_N,
                )  # fmt: skip


class _Launch:
    """Geometry of one launch over S pairs of maps: grid, tile and the tables that address the maps."""

    def __init__(self, features: Sequence[Tensor], targets: Sequence[Tensor], gradients: Sequence[Tensor] = ()) -> None:
        self.shared = len(targets) == 1
        maps = (*features, *targets, *gradients)
        # One linear walk where the maps of each pair lie alike in memory; otherwise tiles of channels and positions.
        kin = [maps] if self.shared else [maps[s :: len(features)] for s in range(len(features))]
        self.flat = all(_dense_alike(group) for group in kin)
        students = 1 if self.shared else len(features)
        shapes = [self._extent(x) for x in features[:students]]
        channels, positions = max(c for _, c, _ in shapes), max(n for _, _, n in shapes)
        if features[0].stride(1) == 1 and not self.flat:
            self.block_c = min(triton.next_power_of_2(channels), 256)
            self.block_n = TILE // self.block_c
        else:
            self.block_n = TILE if self.flat else min(triton.next_power_of_2(positions), 256)
            self.block_c = TILE // self.block_n
        tiles = max(b * triton.cdiv(c, self.block_c) * triton.cdiv(n, self.block_n) for b, c, n in shapes)
        self.grid = (min(max(tiles, 1), max(PROGRAMS // students, 1)), students)
        self.extents = tuple(shapes)
        # The mean over nothing is not a number.
        self.scales = tuple(1 / x.numel() if x.numel() else float("nan") for x in features)

    def _extent(self, x: Tensor) -> tuple[int, int, int]:
        return (1, 1, x.numel()) if self.flat else (x.shape[0], x.shape[1], x.shape[2] * x.shape[3])

    def strides(self, maps: Sequence[Tensor]) -> tuple[tuple[int, int, int], ...]:
        """Strides of sample, channel and position of each map."""
        return tuple((0, 0, 1) if self.flat else _triton.map_strides(x)[1:] for x in maps)

    def options(self) -> dict[str, int | bool]:
        """Constants of both kernels."""
        return {"SHARED": self.shared, "BLOCK_C": self.block_c, "BLOCK_N": self.block_n, "num_warps": WARPS}


def _dense_alike(maps: Sequence[Tensor]) -> bool:
    formats = (torch.contiguous_format, torch.channels_last)
    return any(all(x.is_contiguous(memory_format=f) for x in maps) for f in formats)


def forward(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Loss of S maps against one target or one each; every map has one stride for its positions."""
    launch = _Launch(features, targets)
    partial = features[0].new_empty(launch.grid, dtype=torch.float32)
    loss = features[0].new_empty((), dtype=torch.float32)
    feature_mse_fwd_sum_kernel[launch.grid](
        tuple(features), launch.strides(features), tuple(targets), launch.strides(targets),
        launch.extents, launch.scales, partial, **launch.options(),
    )  # fmt: skip
    feature_mse_fwd_finish_kernel[(1,)](partial, loss, partial.numel(), BLOCK=FINISH_BLOCK)
    return loss


def backward(
    gradient: Tensor, features: Sequence[Tensor], targets: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of those of (*features, *targets) that are wanted; one launch."""
    maps, students = (*features, *targets), len(features)
    # An unwanted gradient's place in the table is taken by its map, which is not written to.
    places = [torch.empty_like(x) if asked else x for x, asked in zip(maps, wanted, strict=True)]
    bits = [sum(asked << i for i, asked in enumerate(part)) for part in (wanted[:students], wanted[students:])]
    launch = _Launch(features, targets, places)
    feature_mse_bwd_kernel[launch.grid](
        gradient, tuple(features), launch.strides(features), tuple(targets), launch.strides(targets),
        tuple(places[:students]), launch.strides(places[:students]),
        tuple(places[students:]), launch.strides(places[students:]),
        launch.extents, launch.scales, *bits, **launch.options(),
    )  # fmt: skip
    return list(compress(places, wanted))
