"""concat_fuse in Triton: launchers. See triton_fuse.py for the kernels and README.md for what is read and written."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastfuse.kernels._triton import map_strides
from fastfuse.kernels.concat_fuse import triton_fuse as kernels
from fastfuse.kernels.concat_fuse import triton_kernels as products
from fastfuse.kernels.concat_fuse.layout import Norm, empty_map, gradient_of, gradient_of_weight

# Elementwise and stencil tiles of 64 positions by 32 channels: whole 128-byte lines of either memory format.
POSITIONS = 64
CHANNELS = 32
WARPS = 8
# The tiles' statistics are merged by few programs: narrow ones, so that there are some.
MERGE_ROWS = 32
MERGE_CHANNELS = 16
# Whole small maps in one program, so that their mean needs no second pass.
MOST_POSITIONS = 128
# The stencil's weight gradient sums over positions in at least this many at once, and in at most so many programs.
CHUNK = 256
PROGRAMS = 1056
# Its loop holds nine sums beside the tile: half a tile a step, or registers spill.
STEP = 32
STEP_WARPS = 4


class Grid(NamedTuple):
    """Extents that all kernels share: batch, channels of the concatenation and of the result, height, width."""

    batch: int
    channels: int
    outputs: int
    height: int
    width: int

    @property
    def spatial(self) -> int:
        """Positions of a sample."""
        return self.height * self.width

    @property
    def positions(self) -> int:
        """Positions of all samples."""
        return self.batch * self.spatial


def grid_of(features: Sequence[Tensor], pointwise: Tensor) -> Grid:
    """The extents of a call."""
    batch, _, height, width = features[0].shape
    return Grid(batch, pointwise.shape[1], pointwise.shape[0], height, width)


def launch_fwd(
    features: Sequence[Tensor], depthwise: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `fastfuse::concat_fuse_fwd`."""
    norm1, pointwise, norm2, (attention, pooled) = Norm(*rest[:8]), rest[8], Norm(*rest[9:17]), rest[17:]
    grid, first = grid_of(features, pointwise), features[0]
    statistics = norm1.statistics(first), norm2.statistics(first)
    hidden = empty_map(first, grid.channels)
    energy_dtype = torch.promote_types(first.dtype, torch.float32)
    energy_shape = (grid.batch, grid.height, grid.width) if attention else (0,)
    energy = torch.empty(energy_shape, dtype=energy_dtype, device=first.device)
    mean = torch.empty((grid.batch, grid.outputs) if pooled else (0,), dtype=first.dtype, device=first.device)
    if grid.positions == 0:
        pre, fused = empty_map(first, grid.outputs), empty_map(first, grid.outputs)
        return fused, energy, mean, hidden, pre, *statistics
    _filter(features, depthwise, norm1, statistics[0], hidden, grid)
    partial = None
    if norm2.training:
        parts = triton.cdiv(grid.positions, products.POSITIONS)
        partial = torch.empty((2, parts, grid.outputs), dtype=torch.float32, device=first.device)
    pre = products.convolved([hidden], pointwise, partial)
    if partial is not None:
        _merge(partial, norm2, statistics[1], products.POSITIONS, grid)
    fused = _finish(pre, norm2, statistics[1], energy if attention else None, mean if pooled else None, grid)
    return fused, energy, mean, hidden, pre, *statistics


def _maps(features: Sequence[Tensor]) -> tuple:
    """A list of maps as kernels take it: pointers, strides, channels, first channels in the concatenation."""
    return *products.columns(features), tuple(x.shape[1] for x in features), products.first_channels(features)


def _taps(depthwise: Tensor) -> tuple[Tensor, int, int, int]:
    """The 3x3 weights and their strides of channel, row and column."""
    return depthwise, depthwise.stride(0), depthwise.stride(2), depthwise.stride(3)


def _used(norm: Norm, statistics: Tensor) -> tuple:
    """Mean, variance, epsilon, weight and bias that a norm applies."""
    mean, var = statistics if norm.training else (norm.mean, norm.var)
    return mean, var, norm.eps, norm.weight, norm.bias


def _filter(
    features: Sequence[Tensor], depthwise: Tensor, norm: Norm, statistics: Tensor, hidden: Tensor, grid: Grid
) -> None:
    programs = triton.cdiv(grid.positions, POSITIONS), products.tiles(features, CHANNELS)
    partial = None
    if norm.training:
        partial = torch.empty((2, programs[0], grid.channels), dtype=torch.float32, device=hidden.device)
    for moments in [partial, None] if norm.training else [None]:
        kernels.concat_fuse_fwd_depthwise_kernel[programs](
            *_maps(features), *_taps(depthwise), *_used(norm, statistics), *map_strides(hidden), moments,
            grid.positions, grid.height, grid.width, grid.channels,
            POSITIONS=POSITIONS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
        if moments is not None:
            _merge(moments, norm, statistics, POSITIONS, grid)


def _merge(partial: Tensor, norm: Norm, statistics: Tensor, tile_positions: int, grid: Grid) -> None:
    _, parts, channels = partial.shape
    kernels.concat_fuse_fwd_merge_kernel[(triton.cdiv(channels, MERGE_CHANNELS),)](
        partial, statistics, norm.running_mean, norm.running_var, norm.momentum, parts, tile_positions,
        grid.positions, channels, ROWS=MERGE_ROWS, CHANNELS=MERGE_CHANNELS,
    )  # fmt: skip


def _finish(
    pre: Tensor, norm: Norm, statistics: Tensor, attention: Tensor | None, pooled: Tensor | None, grid: Grid
) -> Tensor:
    fused = empty_map(pre, grid.outputs)
    width = min(MOST_POSITIONS, max(16, triton.next_power_of_2(grid.spatial)))
    blocks = triton.cdiv(grid.spatial, width)
    parts = pooled
    if pooled is not None and blocks > 1:
        parts = torch.empty((blocks, grid.batch, grid.outputs), dtype=torch.float32, device=pre.device)
    kernels.concat_fuse_fwd_finish_kernel[(grid.batch, blocks)](
        *map_strides(pre), *_used(norm, statistics), *map_strides(fused), attention, parts,
        grid.spatial, grid.outputs, POSITIONS=width, CHANNELS=CHANNELS,
    )  # fmt: skip
    if parts is not pooled:
        products.add_parts(parts, pooled, grid.outputs, 1)
    return fused


def launch_bwd(
    of_fused: Tensor | None, of_attention: Tensor | None, of_pooled: Tensor | None,
    features: Sequence[Tensor], depthwise: Tensor, weight1: Tensor, bias1: Tensor, mean1: Tensor, var1: Tensor,
    eps1: float, training1: bool, pointwise: Tensor, weight2: Tensor, bias2: Tensor, mean2: Tensor, var2: Tensor,
    eps2: float, training2: bool, hidden: Tensor, pre: Tensor, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """See `fastfuse::concat_fuse_bwd`."""
    grid = grid_of(features, pointwise)
    if grid.positions == 0:
        inputs = (depthwise, weight1, bias1, pointwise, weight2, bias2, *features)
        return [torch.zeros_like(x) for x, needed in zip(inputs, needs, strict=True) if needed]
    needs_filter, needs_first = needs[0] or any(needs[6:]), any(needs[:3]) or any(needs[6:])
    of_pre = empty_map(pre, grid.outputs) if needs_first or needs[3] else None
    of_hidden = empty_map(hidden, grid.channels) if needs_first else None

    def second(partial: Tensor | None, sums: Tensor | None) -> None:
        kernels.concat_fuse_bwd_norm2_kernel[(tiles_of_positions, triton.cdiv(grid.outputs, CHANNELS))](
            *map_strides(pre), mean2, var2, eps2, weight2, bias2,
            *_strided(of_fused), *_strided(of_attention, (0, 2)), *_pooled(of_pooled), partial, sums, *_strided(of_pre),
            grid.positions, grid.spatial, grid.outputs,
            BATCH=training2, POSITIONS=POSITIONS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip

    def first(partial: Tensor | None, sums: Tensor | None) -> None:
        kernels.concat_fuse_bwd_norm1_kernel[(tiles_of_positions, products.tiles(features, CHANNELS))](
            *_maps(features), *_taps(depthwise), mean1, var1, eps1, weight1, bias1, *map_strides(of_hidden), partial,
            sums, grid.positions, grid.height, grid.width, grid.channels,
            BATCH=training1, POSITIONS=POSITIONS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip

    tiles_of_positions = triton.cdiv(grid.positions, POSITIONS)
    found: list[Tensor | None] = [None] * len(needs)
    found[4:6] = _norm(second, tiles_of_positions, weight2, bias2, any(needs[4:6]), of_pre is not None, training2)
    if needs[3]:
        found[3] = products.bwd_weight(of_pre, [hidden], pointwise)
    if needs_first:
        products.bwd_features(of_pre, pointwise, [of_hidden], (0,))
        found[1:3] = _norm(first, tiles_of_positions, weight1, bias1, any(needs[1:3]), needs_filter, training1)
    if needs[0]:
        found[0] = _of_depthwise(of_hidden, features, depthwise, grid)
    found[6:] = _of_features(of_hidden, features, depthwise, needs[6:], grid)
    return [x for x, needed in zip(found, needs, strict=True) if needed]


def _strided(x: Tensor | None, kept: tuple[int, ...] = (0, 1, 2)) -> tuple:
    """A map and its strides of sample, channel and position, or those of them that a kernel takes; None for no map."""
    if x is None:
        return None, *(0 for _ in kept)
    x, *strides = map_strides(x)
    return x, *(strides[i] for i in kept)


def _pooled(x: Tensor | None) -> tuple:
    return (None, 0, 0) if x is None else (x, *x.stride())


def _norm(
    launch: Callable[[Tensor | None, Tensor | None], None], parts: int, weight: Tensor, bias: Tensor,
    needs_parameters: bool, needs_input: bool, training: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Both passes of a norm's backward, or the one that is needed; the gradients of its weight and bias."""
    sums = of_weight = of_bias = None
    if needs_parameters or (training and needs_input):
        channels = weight.shape[0]
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
        partial = torch.empty((2, parts, channels), dtype=torch.float32, device=weight.device)
        sums = torch.empty((2, channels), dtype=torch.float32, device=weight.device)
        launch(partial, None)
        kernels.concat_fuse_bwd_merge_kernel[(triton.cdiv(channels, MERGE_CHANNELS),)](
            partial, sums, of_weight, of_bias, parts, channels, ROWS=MERGE_ROWS, CHANNELS=MERGE_CHANNELS
        )
    if needs_input:
        launch(None, sums)
    return of_weight, of_bias


def _of_features(
    grad: Tensor | None, features: Sequence[Tensor], depthwise: Tensor, needs: Sequence[bool], grid: Grid
) -> list[Tensor | None]:
    gradients = [gradient_of(x) if needed else None for x, needed in zip(features, needs, strict=True)]
    wanted = [x for x in gradients if x is not None]
    if wanted:
        firsts = tuple(f for f, needed in zip(products.first_channels(features), needs, strict=True) if needed)
        programs = triton.cdiv(grid.positions, POSITIONS), products.tiles(wanted, CHANNELS)
        kernels.concat_fuse_bwd_features_kernel[programs](
            *map_strides(grad), *_taps(depthwise), *products.columns(wanted), tuple(x.shape[1] for x in wanted), firsts,
            grid.positions, grid.height, grid.width, POSITIONS=POSITIONS, CHANNELS=CHANNELS, num_warps=WARPS,
        )  # fmt: skip
    return gradients


def _of_depthwise(grad: Tensor, features: Sequence[Tensor], depthwise: Tensor, grid: Grid) -> Tensor:
    out, channel_tiles = gradient_of_weight(depthwise), products.tiles(features, CHANNELS)
    chunk = max(CHUNK, triton.cdiv(grid.positions, triton.cdiv(PROGRAMS, channel_tiles)))
    chunk = triton.cdiv(chunk, STEP) * STEP
    parts = triton.cdiv(grid.positions, chunk)
    partial = torch.empty((parts, grid.channels, 9), dtype=torch.float32, device=grad.device)
    kernels.concat_fuse_bwd_depthwise_kernel[(parts, channel_tiles)](
        *map_strides(grad), *_maps(features), partial, grid.positions, grid.height, grid.width, grid.channels, chunk,
        POSITIONS=STEP, CHANNELS=CHANNELS, num_warps=STEP_WARPS,
    )  # fmt: skip
    products.add_parts(partial, out, 9, 1)
    return out
