"""concat_conv1x1 in Triton: launchers. Several serve concat_fuse too, whose modules have a product each."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastfuse.kernels._limits import check_count
from fastfuse.kernels._triton import empty_map, launch_constants
from fastfuse.kernels.concat_fuse import layout
from fastfuse.kernels.concat_fuse import triton_kernels as kernels
from fastfuse.kernels.concat_fuse.triton_tables import Maps, entries_of, some_of, table_of, tiles, weights_of

# Tiles of 64 positions by 64 channels in steps of 32 for two warp groups: with one, or with wider steps, registers
# spill on some GPU where a map's odd size allows no wide loads. Exact float32 products run on ordinary cores, whose
# operands live in registers: half the step, and half the channels of a map's gradient.
POSITIONS = 64
OUTPUTS = 64
CHANNELS = 64
GRADIENT_CHANNELS = {torch.float32: 32, torch.float16: 64, torch.bfloat16: 64}
INNER = {torch.float32: 16, torch.float16: 32, torch.bfloat16: 32}
WARPS = 8
# Registers a thread of float32 products of contiguous maps: all that 8 warps can have. Left alone, the assembler takes
# 128 and spills 96 bytes (sm_90, triton 3.8); told to take 128, it spills elsewhere.
CONTIGUOUS_REGISTERS = 255
STAGES = 3
# Moments of tiles are merged so many at once, for few channels: many programs.
MERGE_ROWS = 32
MERGE_CHANNELS = 16
# Elementwise tiles: whole 64-byte pieces of either memory format.
STEP = 32
# The weight gradient sums over all positions: split until the device is filled twice, by shapes and launch constants
# alone so that results do not depend on how large a GPU is, and into no pieces smaller than this.
PROGRAMS = 264
LEAST_POSITIONS = 256
REDUCE_ELEMENTS = 128
REDUCE_ROWS = 16


class Sums(NamedTuple):
    """Partial sums [parts, rows, columns] in float32, the tensors that take their totals, and the strides of these."""

    partials: tuple
    parts: tuple
    elements: tuple
    columns: tuple
    outs: tuple
    row: tuple
    column: tuple


def precision(x: Tensor) -> str:
    """How products of a dtype are taken: float32 exactly, unless the user lets matrix products use TF32."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and x.dtype == torch.float32 else "ieee"


def _own(launch: str, like: Tensor, **written: int) -> SimpleNamespace:
    return launch_constants(
        f"concat_conv1x1_{launch}", like, INNER=INNER[like.dtype], WARPS=WARPS, STAGES=STAGES, **written
    )


def width_of(channels: int, most: int) -> int:
    """Width of a channel tile: a power of two between 16, the least of a matrix product, and `most`."""
    return min(most, max(16, triton.next_power_of_2(channels)))


def launch_fwd(features: Sequence[Tensor], weight: Tensor, affine: Sequence[Tensor], statistics: bool) -> list[Tensor]:
    """See `fastfuse::concat_conv1x1_fwd`."""
    out, *found = results = layout.product_results(features, weight, statistics)
    (batch, channels, height, width), partial = out.shape, None
    parts = triton.cdiv(batch * height * width, POSITIONS)
    if statistics:
        # Where there is no tile a place is read all the same, and the mean of nothing is NaN whatever stands there.
        partial = moments_of(max(parts, 1), channels, out)
    if out.numel():
        convolve([features], [weight], [out], partial, affine)
    if statistics and channels:
        kernels.concat_conv1x1_fwd_merge_kernel[(triton.cdiv(channels, MERGE_CHANNELS),)](
            *found, partial, parts, POSITIONS, batch * height * width, channels,
            ROWS=MERGE_ROWS, CHANNELS=MERGE_CHANNELS,
        )  # fmt: skip
    return results


def moments_of(parts: int, channels: int, x: Tensor) -> Tensor:
    """Room for the moments [2, parts, channels] of the tiles of a product like x."""
    check_count("the result", x, "moments of its tiles", 2 * parts * channels)
    return torch.empty((2, parts, channels), dtype=torch.float32, device=x.device)


def convolve(
    features: Sequence[Sequence[Tensor]], weights: Sequence[Tensor], outs: Sequence[Tensor], partial: Tensor | None,
    affine: Sequence[Tensor] = (),
) -> None:  # fmt: skip
    """The products of all modules; moments of each tile of POSITIONS positions go to `partial` [2, tiles, C_out].

    `affine`: scale and shift of the channels of the only module, or nothing.
    """
    batch, _, height, width = outs[0].shape
    positions, table = batch * height * width, table_of([[x] for x in outs])
    own = _own("fwd", outs[0], OUTPUTS=OUTPUTS)
    columns = width_of(max(table.channels), own.OUTPUTS)
    contiguous = outs[0].dtype == torch.float32 and features[0][0].stride(1) != 1
    limit = {"maxnreg": CONTIGUOUS_REGISTERS} if contiguous else {}
    kernels.concat_conv1x1_fwd_kernel[(triton.cdiv(positions, POSITIONS), tiles(table, columns))](
        table_of(features), *(affine or (None, None)), weights_of(weights), table, partial,
        positions, height * width, sum(table.channels),
        PRECISION=precision(outs[0]), POSITIONS=POSITIONS, OUTPUTS=columns, INNER=own.INNER,
        num_warps=own.WARPS, num_stages=own.STAGES, **limit,
    )  # fmt: skip


def launch_bwd(
    cotangents: Sequence[Tensor | None], kept: Sequence[Tensor], features: Sequence[Tensor], weight: Tensor,
    affine: Sequence[Tensor], needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """See `fastfuse::concat_conv1x1_bwd`."""
    found = layout.empty_product_gradients(features, weight, affine, needs)
    of_maps, of_weight, of_affine = found[: len(features)], found[len(features)], found[len(features) + 1 :]
    grad, sums = _of_result(cotangents, kept), []
    positions = grad.shape[0] * grad.shape[2] * grad.shape[3]
    shape = triton.cdiv(positions, POSITIONS), weight.shape[1]
    if affine:
        check_count("features[0]", features[0], "partial sums", shape[0] * shape[1])
    parts = [x if x is None else torch.empty(shape, dtype=torch.float32, device=grad.device) for x in of_affine]
    if any(x is not None for x in (*of_maps, *parts)) and positions and weight.shape[1]:
        _through_load(grad, weight, features, of_maps, affine, parts)
    if of_weight is not None and weight.numel():
        sums.append((bwd_weights([grad], [features], affine)[0], of_weight, *of_weight.stride()[:2]))
    sums += [(x.unsqueeze(1), y, 0, 1) for x, y in zip(parts, of_affine, strict=True) if y is not None and y.numel()]
    add_parts(sums)
    return [x for x in found if x is not None]


def _of_result(cotangents: Sequence[Tensor | None], kept: Sequence[Tensor]) -> Tensor:
    """The gradient of the result, to which those of its statistics are added."""
    grad, *statistics = cotangents
    if all(x is None for x in statistics):
        return grad
    out, mean = kept
    total = empty_map(out)
    (batch, channels, height, width), strided = out.shape, [x if x is None else (x, x.stride(0)) for x in statistics]
    positions = batch * height * width
    if total.numel():
        programs = triton.cdiv(positions, STEP), triton.cdiv(channels, STEP)
        kernels.concat_conv1x1_bwd_statistics_kernel[programs](
            None if grad is None else table_of([[grad]]), *strided, table_of([[out]]), mean, table_of([[total]]),
            positions, height * width, POSITIONS=STEP, CHANNELS=STEP,
        )  # fmt: skip
    return total


class Loaded(NamedTuple):
    """How the maps of the only module were loaded, for the way back.

    Attributes:
        maps: the maps, each in the place of its gradient.
        gives: 1 for the gradients that are wanted; others are needed for their sums alone.
        scale, shift: of the channels of all maps.
        channels: of all maps.
        of_scale, of_shift: parts [tiles, channels] of their gradients, None where they are not wanted.
    """

    maps: Maps
    gives: tuple
    scale: Tensor
    shift: Tensor
    channels: int
    of_scale: Tensor | None
    of_shift: Tensor | None


def _through_load(
    grad: Tensor, weight: Tensor, features: Sequence[Tensor], gradients: Sequence[Tensor | None],
    affine: Sequence[Tensor], parts: Sequence[Tensor | None],
) -> None:  # fmt: skip
    """Gradients of the maps, and the parts of those of scale and shift."""
    table = table_of([features])
    if not affine:
        bwd_features([grad], [weight], some_of(table, gradients))
        return
    sums = any(x is not None for x in parts)
    # A gradient that nobody needs still has a place in the table where its sums are wanted.
    stand_ins = [x if g is None and sums else g for x, g in zip(features, gradients, strict=True)]
    places = [s for s, x in enumerate(stand_ins) if x is not None]
    gives = tuple(int(gradients[s] is not None) for s in places)
    loaded = Loaded(entries_of(table, places), gives, *affine, weight.shape[1], *parts)
    bwd_features([grad], [weight], some_of(table, stand_ins), loaded)


def bwd_features(
    grads: Sequence[Tensor], weights: Sequence[Tensor], gradients: Maps, loaded: Loaded | None = None
) -> None:
    """Fill the gradients of maps, given the gradient of each module's product."""
    (batch, _, height, width), dtype = grads[0].shape, grads[0].dtype
    own = _own("bwd_features", grads[0], CHANNELS=GRADIENT_CHANNELS[dtype])
    positions, columns = batch * height * width, width_of(max(gradients.channels), own.CHANNELS)
    kernels.concat_conv1x1_bwd_features_kernel[(triton.cdiv(positions, POSITIONS), tiles(gradients, columns))](
        table_of([[x] for x in grads]), weights_of(weights), gradients, loaded, positions, height * width,
        PRECISION=precision(grads[0]), POSITIONS=POSITIONS, CHANNELS=columns, INNER=own.INNER,
        num_warps=own.WARPS, num_stages=own.STAGES,
    )  # fmt: skip


def bwd_weights(
    grads: Sequence[Tensor], features: Sequence[Sequence[Tensor]], affine: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Parts [parts, C_out, C] of the gradient of each module's weight."""
    batch, _, height, width = grads[0].shape
    own = _own("bwd_weight", grads[0], OUTPUTS=OUTPUTS, CHANNELS=CHANNELS)
    positions, table, outs = batch * height * width, table_of(features), table_of([[x] for x in grads])
    rows, columns = width_of(max(outs.channels), own.OUTPUTS), width_of(max(table.channels), own.CHANNELS)
    grid = tiles(table, columns), triton.cdiv(max(outs.channels), rows)
    chunk = max(LEAST_POSITIONS, triton.cdiv(positions, triton.cdiv(PROGRAMS, grid[0] * grid[1])))
    chunk = triton.cdiv(chunk, own.INNER) * own.INNER
    parts = max(1, triton.cdiv(positions, chunk))
    inputs = tuple(sum(x.shape[1] for x in maps) for maps in features)
    sizes = zip(outs.channels, inputs, strict=True)
    partials = [torch.empty((parts, *size), dtype=torch.float32, device=grads[0].device) for size in sizes]
    kernels.concat_conv1x1_bwd_weight_kernel[(*grid, parts)](
        outs, table, *(affine or (None, None)), tuple(partials), inputs, positions, height * width, chunk,
        PRECISION=precision(grads[0]), POSITIONS=own.INNER, OUTPUTS=rows, CHANNELS=columns, num_warps=own.WARPS,
        num_stages=own.STAGES,
    )  # fmt: skip
    return partials


def add_parts(sums: Sequence[tuple[Tensor, Tensor, int, int]]) -> None:
    """Totals of partial sums [parts, rows, columns] into tensors with the strides given; one launch per dtype."""
    for dtype in dict.fromkeys(out.dtype for _, out, _, _ in sums):
        partials, outs, row, column = zip(*(entry for entry in sums if entry[1].dtype == dtype), strict=True)
        parts, columns = tuple(x.shape[0] for x in partials), tuple(x.shape[2] for x in partials)
        elements = tuple(x.shape[1] * x.shape[2] for x in partials)
        programs = sum(triton.cdiv(n, REDUCE_ELEMENTS) for n in elements)
        table = Sums(partials, parts, elements, columns, outs, row, column)
        kernels.concat_conv1x1_bwd_reduce_kernel[(programs,)](table, ELEMENTS=REDUCE_ELEMENTS, ROWS=REDUCE_ROWS)
