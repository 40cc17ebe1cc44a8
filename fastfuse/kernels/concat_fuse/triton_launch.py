"""concat_fuse in Triton: launchers. README.md lists what each launch reads and writes."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastfuse.kernels._limits import grid
from fastfuse.kernels._triton import empty_map, launch_constants, map_strides
from fastfuse.kernels.concat_fuse import layout
from fastfuse.kernels.concat_fuse import triton_backward as backward
from fastfuse.kernels.concat_fuse import triton_fuse as forward
from fastfuse.kernels.concat_fuse import triton_products as products
from fastfuse.kernels.concat_fuse.layout import Module
from fastfuse.kernels.concat_fuse.triton_tables import Maps, some_of, table_of, tiles

# Elementwise and stencil tiles of 32 positions by 32 channels: whole 64-byte pieces of either memory format. With 64
# positions, with fewer warps where moments are taken, or with more where they are merged as well, registers spill on
# some GPU.
POSITIONS = 32
CHANNELS = 32
WARPS = 8
MOMENTS_WARPS = 16
HIDDEN_WARPS = 4
# Sums over the positions are taken in at most so many shares: few enough for every program that needs their totals to
# add them up itself, many enough to fill the device.
SHARES = 32
# Of which the programs of the first norm's forward, that filter as well, add up half at once.
HIDDEN_ROWS = 16
# Whole small maps in one program, so that their mean needs no second pass.
MOST_POSITIONS = 128
# The stencil's weight gradient sums over positions in at least this many at once, and in at most so many programs.
CHUNK = 256
PROGRAMS = 1056
# Its loop holds nine sums beside the tile: half a tile, or registers spill.
STEP = 16
STEP_WARPS = 4
# Registers a thread: left alone, the assembler takes 80 in float16 on sm_80 and spills 8 bytes (triton 3.6).
STEP_REGISTERS = 88
# The same of the last forward kernel in float32: it takes 96 on sm_80 and spills 8 bytes (triton 3.8).
FINISH_REGISTERS = 168


class Taps(NamedTuple):
    """The 3x3 weights [C, 1, 3, 3] of each module, and their strides of channel, row and column."""

    pointers: tuple
    c: tuple
    i: tuple
    j: tuple


class Norms(NamedTuple):
    """One norm of each module; `statistics` [2, C] are written where the running `mean` and `var` are updated."""

    mean: tuple
    var: tuple
    weight: tuple
    bias: tuple
    eps: tuple
    momentum: tuple
    statistics: tuple | None


class Of(NamedTuple):
    """Fused maps, attention maps and spatial means of the modules: tables, or 0 and 1 for those that there are."""

    fused: tuple | Maps | None
    attention: tuple | Maps | None
    pooled: tuple | Maps | None


class Call(NamedTuple):
    """What the launches of a call share: tables of all maps and 3x3 weights, and the extents of the maps."""

    maps: Maps
    taps: Taps
    batch: int
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

    @property
    def chunk(self) -> int:
        """Positions of a share, a multiple of a tile."""
        return triton.cdiv(triton.cdiv(self.positions, POSITIONS), SHARES) * POSITIONS

    @property
    def shares(self) -> int:
        """How many shares there are."""
        return triton.cdiv(self.positions, self.chunk)


# Forward up to the first ReLU: fills the ReLUs' outputs and, in training mode, the statistics of the batch.
Forward = Callable[[Call, Sequence[Module], Sequence[Tensor], Sequence[Tensor]], None]
# Backward from there: fills the gradients that there are, but for parts that it returns for products.add_parts.
Backward = Callable[[Call, Sequence[Module], Sequence[Tensor], Sequence[Sequence[Tensor | None]]], list[tuple]]


def _call(modules: Sequence[Module]) -> Call:
    batch, _, height, width = modules[0].features[0].shape
    weights = tuple(module.depthwise for module in modules)
    taps = Taps(weights, *(tuple(w.stride(i) for w in weights) for i in (0, 2, 3)))
    return Call(table_of([module.features for module in modules]), taps, batch, height, width)


def _norms(modules: Sequence[Module], which: int, statistics: Sequence[Tensor] | None = None) -> Norms:
    """The norms of all modules (which: 1 or 2), with what they note of a batch."""
    norms = [module.norm1 if which == 1 else module.norm2 for module in modules]
    columns = ("mean", "var", "weight", "bias", "eps", "momentum")
    return Norms(*(tuple(getattr(norm, c) for norm in norms) for c in columns), statistics and tuple(statistics))


def launch_fwd(
    features: Sequence[Tensor], counts: Sequence[int], parameters: Sequence[Tensor], frozen: Sequence[Tensor],
    running: Sequence[Tensor], results: Sequence[Tensor], training: Sequence[bool], options: Sequence[float],
    asked: Sequence[bool], first: Forward | None = None,
) -> None:  # fmt: skip
    """See `fastfuse::concat_fuse_fwd`; `first` takes the place of the Triton kernels up to the first ReLU."""
    statistics = layout.in_order(frozen, running, training, len(counts))
    modules = layout.modules_of(features, counts, parameters, statistics, training, options, asked)
    call = _call(modules)
    if call.positions == 0:
        return
    fused, attention, pooled, hidden, pre, statistics1, statistics2 = zip(*layout.per_module(results), strict=True)
    (first or _filter)(call, modules, hidden, statistics1)
    partial = None
    if training[1]:
        parts = triton.cdiv(call.positions, products.POSITIONS)
        outputs = sum(x.shape[1] for x in pre)
        partial = products.moments_of(parts, outputs, pre[0])
    products.convolve([[x] for x in hidden], [module.pointwise for module in modules], pre, partial)
    norms, table = _norms(modules, 2, statistics2), table_of([[x] for x in pre])
    if training[1]:
        forward.concat_fuse_fwd_merge_kernel[(1, tiles(table, products.MERGE_CHANNELS))](
            table, norms, partial, parts, products.POSITIONS, call.positions, outputs,
            ROWS=products.MERGE_ROWS, CHANNELS=products.MERGE_CHANNELS,
        )  # fmt: skip
        mean, var = zip(*(x.unbind() for x in statistics2), strict=True)
        norms = norms._replace(mean=mean, var=var)
    _finish(call, table, norms, modules, Of(fused, attention, pooled), pre)


def _filter(call: Call, modules: Sequence[Module], hidden: Sequence[Tensor], statistics: Sequence[Tensor]) -> None:
    norms, training = _norms(modules, 1, statistics), modules[0].norm1.training
    programs, channels = (call.shares, tiles(call.maps, CHANNELS)), sum(call.maps.channels)
    extents = call.positions, call.height, call.width, channels, call.chunk
    own = launch_constants("concat_fuse_fwd", hidden[0], MOMENTS_WARPS=MOMENTS_WARPS, HIDDEN_WARPS=HIDDEN_WARPS)
    partial = None
    if training:
        partial = torch.empty((2, call.shares, channels), dtype=torch.float32, device=hidden[0].device)
        forward.concat_fuse_fwd_moments_kernel[programs](
            call.maps, call.taps, partial, *extents,
            POSITIONS=POSITIONS, CHANNELS=CHANNELS, num_warps=own.MOMENTS_WARPS,
        )  # fmt: skip
    forward.concat_fuse_fwd_hidden_kernel[programs](
        call.maps, call.taps, norms, partial, table_of([[x] for x in hidden]), *extents,
        ROWS=HIDDEN_ROWS, POSITIONS=POSITIONS, CHANNELS=CHANNELS, num_warps=own.HIDDEN_WARPS,
    )  # fmt: skip


def _finish(
    call: Call, pre_table: Maps, norms: Norms, modules: Sequence[Module], results: Of, pre: Sequence[Tensor]
) -> None:
    width = min(MOST_POSITIONS, max(16, triton.next_power_of_2(call.spatial)))
    blocks = triton.cdiv(call.spatial, width)
    gives = Of(*(tuple(int(flag) for flag in flags) for flags in zip(*(m.asked for m in modules), strict=True)))
    # What is not given still has a place in the table, of the right kind.
    fused = table_of([[x if given else p] for x, given, p in zip(results.fused, gives.fused, pre, strict=True)])
    parts = list(results.pooled)
    if blocks > 1:
        for m, given in enumerate(gives.pooled):
            shape = (blocks, call.batch, pre[m].shape[1]) if given else (0,)
            parts[m] = torch.empty(shape, dtype=torch.float32, device=pre[m].device)
    limit = {"maxnreg": FINISH_REGISTERS} if pre[0].dtype == torch.float32 else {}
    programs = grid("features[0]", modules[0].features[0], call.batch, blocks, len(modules))
    forward.concat_fuse_fwd_finish_kernel[programs](
        pre_table, norms, fused, results.attention, tuple(parts), gives, call.spatial,
        POSITIONS=width, CHANNELS=CHANNELS, **limit,
    )  # fmt: skip
    if blocks > 1 and any(gives.pooled):
        rows = [(parts[m], results.pooled[m]) for m, given in enumerate(gives.pooled) if given]
        products.add_parts([(partial, out, out.shape[1], 1) for partial, out in rows])


def launch_bwd(
    cotangents: Sequence[Tensor | None], features: Sequence[Tensor], counts: Sequence[int],
    parameters: Sequence[Tensor], statistics: Sequence[Tensor], kept: Sequence[Tensor], training: Sequence[bool],
    options: Sequence[float], needs: Sequence[bool], first: Backward | None = None,
) -> list[Tensor]:  # fmt: skip
    """See `fastfuse::concat_fuse_bwd`; `first` takes the place of the Triton kernels from the first ReLU back.

    What one module of several needs is computed for all, but for the gradients of maps.
    """
    modules = layout.modules_of(features, counts, parameters, statistics, training, options)
    found = layout.empty_gradients(modules, needs)
    wanted = [x for own in found for x in own if x is not None]
    call = _call(modules)
    if call.positions == 0:
        return [torch.zeros_like(x) for x in wanted]
    hidden, pre = kept[::2], kept[1::2]
    any_of = [any(own[i] is not None for own in found) for i in range(layout.PARAMETERS)]
    needs_first = any(any_of[:3]) or any(x is not None for own in found for x in own[layout.PARAMETERS :])
    of_pre = [empty_map(x) for x in pre] if needs_first or any_of[3] else None
    _second(call, modules, _cotangents(cotangents, pre), pre, of_pre, found, any(any_of[4:]))
    sums = []
    if any_of[3]:
        partials = products.bwd_weights(of_pre, [[x] for x in hidden])
        sums += [(p, *_matrix(own[3])) for p, own in zip(partials, found, strict=True) if own[3] is not None]
    if needs_first:
        of_hidden = [empty_map(x) for x in hidden]
        products.bwd_features(of_pre, [module.pointwise for module in modules], table_of([[x] for x in of_hidden]))
        sums += (first or _filter_backward)(call, modules, of_hidden, found)
    products.add_parts(sums)
    return wanted


def _filter_backward(
    call: Call, modules: Sequence[Module], of_hidden: Sequence[Tensor], found: Sequence[Sequence[Tensor | None]]
) -> list[tuple]:
    """Gradients of everything before the first ReLUs; those of the 3x3 weights as parts that are still to be added."""
    table = table_of([[x] for x in of_hidden])
    any_of = [any(own[i] is not None for own in found) for i in range(3)]
    of_maps = [x for own in found for x in own[layout.PARAMETERS :]]
    needs_maps = any(x is not None for x in of_maps)
    _first(call, modules, table, found, any(any_of[1:]), any_of[0] or needs_maps)
    sums = []
    if any_of[0]:
        partials = _depthwise_parts(call, table, modules)
        sums = [(p, own[0], 9, 1) for p, own in zip(partials, found, strict=True) if own[0] is not None]
    if needs_maps:
        gradients = some_of(call.maps, of_maps)
        programs = triton.cdiv(call.positions, POSITIONS), tiles(gradients, CHANNELS)
        backward.concat_fuse_bwd_features_kernel[programs](
            table, call.taps, gradients, call.positions, call.height, call.width,
            **_backward_options(gradients.pointers[0])
        )  # fmt: skip
    return sums


class Cotangents(NamedTuple):
    """Cotangents of one kind of result, one entry per module, and their strides of sample, channel and position."""

    pointers: tuple
    b: tuple
    c: tuple
    n: tuple


def _cotangents(given: Sequence[Tensor | None], pre: Sequence[Tensor]) -> tuple[Of, Of]:
    """The cotangents that there are, and for each kind and module whether there is one."""
    kinds = [given[i::3] for i in range(3)]
    gives = Of(*(tuple(int(x is not None) for x in kind) for kind in kinds))
    tables = []
    for kind in kinds:
        if all(x is None for x in kind):
            tables.append(None)
            continue
        dtype = next(x.dtype for x in kind if x is not None)
        rows = [_strided(torch.empty(1, dtype=dtype, device=pre[0].device) if x is None else x) for x in kind]
        tables.append(Cotangents(*zip(*rows, strict=True)))
    return Of(*tables), gives


def _strided(x: Tensor) -> tuple[Tensor, int, int, int]:
    """A map, an attention map [B, H, W], a mean [B, C] or a stand-in, as kernels address it."""
    if x.dim() >= 3:
        return map_strides(x)
    return x, *((*x.stride(), 0) if x.dim() == 2 else (0, 0, 0))


def _parameter_tables(
    modules: Sequence[Module], found: Sequence[Sequence[Tensor | None]], first: int
) -> tuple[tuple, tuple]:
    """Where the gradients of the norms' weights and biases go; what nobody needs has a place of its own."""
    return tuple(
        tuple(
            torch.empty_like(module.parameters[i]) if own[i] is None else own[i]
            for module, own in zip(modules, found, strict=True)
        )
        for i in (first, first + 1)
    )


def _backward_options(like: Tensor) -> dict[str, int]:
    own = launch_constants("concat_fuse_bwd", like, WARPS=WARPS)
    return {"POSITIONS": POSITIONS, "CHANNELS": CHANNELS, "num_warps": own.WARPS}


def _second(
    call: Call, modules: Sequence[Module], cotangents: tuple[Of, Of], pre: Sequence[Tensor],
    of_pre: Sequence[Tensor] | None, found: Sequence[Sequence[Tensor | None]], parameters: bool,
) -> None:  # fmt: skip
    """Backward of the second norms."""
    table, norms, training = table_of([[x] for x in pre]), _norms(modules, 2), modules[0].norm2.training
    channels, options = sum(table.channels), _backward_options(pre[0])
    extents = call.positions, call.spatial, channels, call.chunk
    programs, partial = (call.shares, tiles(table, CHANNELS)), None
    if parameters or (training and of_pre is not None):
        partial = torch.empty((2, call.shares, channels), dtype=torch.float32, device=pre[0].device)
        backward.concat_fuse_bwd_norm2_sums_kernel[programs](table, norms, *cotangents, partial, *extents, **options)
    if of_pre is None:
        programs = 1, programs[1]
    if partial is not None or of_pre is not None:
        backward.concat_fuse_bwd_norm2_kernel[programs](
            table, norms, *cotangents, partial, call.shares, *_parameter_tables(modules, found, 4),
            None if of_pre is None else table_of([[x] for x in of_pre]), *extents,
            BATCH=training, ROWS=SHARES, **options,
        )  # fmt: skip


def _first(
    call: Call, modules: Sequence[Module], of_hidden: Maps, found: Sequence[Sequence[Tensor | None]],
    parameters: bool, needs_input: bool,
) -> None:  # fmt: skip
    """Backward of the first norms; the gradients of their inputs replace those of their ReLUs' outputs."""
    norms, training, channels = _norms(modules, 1), modules[0].norm1.training, sum(call.maps.channels)
    options = _backward_options(call.maps.pointers[0])
    extents = call.positions, call.height, call.width, channels, call.chunk
    programs, partial = (call.shares, tiles(call.maps, CHANNELS)), None
    given = call.maps, call.taps, norms, of_hidden
    if parameters or training:
        partial = torch.empty((2, call.shares, channels), dtype=torch.float32, device=modules[0].depthwise.device)
        backward.concat_fuse_bwd_norm1_sums_kernel[programs](*given, partial, *extents, **options)
    if not needs_input:
        programs = 1, programs[1]
    backward.concat_fuse_bwd_norm1_kernel[programs](
        *given, partial, call.shares, *_parameter_tables(modules, found, 1), *extents,
        BATCH=training, INPUT=needs_input, ROWS=SHARES, **options,
    )  # fmt: skip


def _matrix(weight: Tensor) -> tuple[Tensor, int, int]:
    return weight, *weight.stride()[:2]


def _depthwise_parts(call: Call, grads: Maps, modules: Sequence[Module]) -> list[Tensor]:
    """Parts [parts, C, 9] of the gradient of each module's 3x3 weights."""
    channel_tiles = tiles(call.maps, CHANNELS)
    chunk = max(CHUNK, triton.cdiv(call.positions, triton.cdiv(PROGRAMS, channel_tiles)))
    chunk = triton.cdiv(chunk, STEP) * STEP
    parts = triton.cdiv(call.positions, chunk)
    device = modules[0].depthwise.device
    partials = [torch.empty((parts, c, 9), dtype=torch.float32, device=device) for c in grads.channels]
    backward.concat_fuse_bwd_depthwise_kernel[(parts, channel_tiles)](
        grads, call.maps, tuple(partials), call.positions, call.height, call.width, chunk,
        POSITIONS=STEP, CHANNELS=CHANNELS, num_warps=STEP_WARPS, maxnreg=STEP_REGISTERS,
    )  # fmt: skip
    return partials
