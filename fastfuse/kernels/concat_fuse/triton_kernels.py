"""concat_conv1x1 in Triton: one matrix product per output tile that walks through the maps, no concatenation.

Each launch serves the products of all modules given; concat_conv1x1 has one. Sums run in float32 and in a fixed order.
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import divide, pick, pick_pointer
from fastfuse.kernels.concat_fuse.triton_moments import merged_moments, store_moments
from fastfuse.kernels.concat_fuse.triton_tables import at, locate


@triton.jit
def scale_shift_relu(x, scale, shift):
    """relu(scale x + shift) per channel; NaN stays NaN, as in torch."""
    y = x * scale[None, :] + shift[None, :]
    return tl.where(y < 0, 0.0, y)


@triton.jit
def vectors(scale, shift, c, present):
    """Scale and shift of some channels, in float32."""
    a = tl.load(scale + c, mask=present, other=0.0).to(tl.float32)
    return a, tl.load(shift + c, mask=present, other=0.0).to(tl.float32)


@triton.jit
def concat_conv1x1_fwd_kernel(
    features, scale, shift, weights, outs, partial, positions, spatial, total_outputs,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One [positions, outputs] tile: the sum over maps and channels; its moments too where `partial` is given.

    Given a scale and a shift, of the channels of the only module, it takes relu(scale x + shift) in place of a map x.
    """
    which, begin = locate(outs.channels, tl.program_id(1), OUTPUTS)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    o = begin + tl.arange(0, OUTPUTS)
    inside, wanted = (p < positions)[:, None], (o < pick(outs.channels, which))[None, :]
    columns = pick_pointer(weights.pointers, which) + o[None, :] * pick(weights.o, which)
    weight_c = pick(weights.c, which)
    total = tl.zeros((POSITIONS, OUTPUTS), tl.float32)
    for s in tl.static_range(len(features.pointers)):
        rows = features.pointers[s] + at(p, spatial, features.b[s], features.n[s])[:, None]
        # A map of another product gives no step.
        for start in range(0, tl.where(which == features.owners[s], features.channels[s], 0), INNER):
            c = start + tl.arange(0, INNER)
            present = c < features.channels[s]
            x = tl.load(rows + c[None, :] * features.c[s], mask=inside & present[None, :], other=0.0)
            if scale is not None:
                a, b = vectors(scale, shift, features.inner[s] + c, present)
                x = scale_shift_relu(x.to(tl.float32), a, b).to(x.dtype)
            w = tl.load(
                columns + (features.inner[s] + c)[:, None] * weight_c, mask=wanted & present[:, None], other=0.0
            )
            total = tl.dot(x, w.to(x.dtype), total, input_precision=PRECISION)
    offsets = at(p, spatial, pick(outs.b, which), pick(outs.n, which))[:, None] + o[None, :] * pick(outs.c, which)
    tl.store(pick_pointer(outs.pointers, which) + offsets, total, mask=inside & wanted)
    if partial is not None:
        there = o < pick(outs.channels, which)
        store_moments(partial, total, pick(outs.first, which) + o, p < positions, there, total_outputs)


@triton.jit
def concat_conv1x1_fwd_merge_kernel(
    means, variances, partial, tiles, tile_positions, positions, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Mean and biased variance of the result from the moments of its tiles."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    present = c < channels
    mean, var = merged_moments(partial, tiles, tile_positions, positions, channels, c, present, ROWS)
    tl.store(means + c, mean, mask=present)
    tl.store(variances + c, var, mask=present)


@triton.jit
def concat_conv1x1_bwd_statistics_kernel(
    grad, of_mean, of_var, out, mean, total, positions, spatial, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr
):
    """The result's whole gradient: its own, and those of its mean and variance through all its values.

    Each map is the only one of its table; a statistic's gradient comes with its stride.
    """
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = c < out.channels[0]
    mask = (p < positions)[:, None] & present[None, :]
    found = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    if grad is not None:
        offsets = at(p, spatial, grad.b[0], grad.n[0])[:, None] + c[None, :] * grad.c[0]
        found += tl.load(grad.pointers[0] + offsets, mask=mask, other=0.0).to(tl.float32)
    if of_mean is not None:
        found += divide(tl.load(of_mean[0] + c * of_mean[1], mask=present, other=0.0), positions)[None, :]
    if of_var is not None:
        offsets = at(p, spatial, out.b[0], out.n[0])[:, None] + c[None, :] * out.c[0]
        apart = tl.load(out.pointers[0] + offsets, mask=mask, other=0.0).to(tl.float32)
        apart -= tl.load(mean + c, mask=present, other=0.0)[None, :]
        slope = divide(tl.load(of_var[0] + c * of_var[1], mask=present, other=0.0) * 2, positions)
        found += apart * slope[None, :]
    offsets = at(p, spatial, total.b[0], total.n[0])[:, None] + c[None, :] * total.c[0]
    tl.store(total.pointers[0] + offsets, found, mask=mask)


@triton.jit
def concat_conv1x1_bwd_features_kernel(
    grads, weights, gradients, loaded, positions, spatial,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """One [positions, channels] tile of one map's gradient: the sum over outputs.

    Where maps were `loaded` through a scale, a shift and a ReLU, the gradient goes back through these, and those of
    scale and shift are summed over the tile.
    """
    which, begin = locate(gradients.channels, tl.program_id(1), CHANNELS)
    owner = pick(gradients.owners, which)
    p = tl.program_id(0) * POSITIONS + tl.arange(0, POSITIONS)
    c = begin + tl.arange(0, CHANNELS)
    inside, present = (p < positions)[:, None], (c < pick(gradients.channels, which))[None, :]
    outputs, grad_o, weight_o = pick(grads.channels, owner), pick(grads.c, owner), pick(weights.o, owner)
    rows = pick_pointer(grads.pointers, owner) + at(p, spatial, pick(grads.b, owner), pick(grads.n, owner))[:, None]
    columns = pick_pointer(weights.pointers, owner)
    columns += (pick(gradients.inner, which) + c)[None, :] * pick(weights.c, owner)
    total = tl.zeros((POSITIONS, CHANNELS), tl.float32)
    for start in range(0, outputs, INNER):
        o = start + tl.arange(0, INNER)
        g = tl.load(rows + o[None, :] * grad_o, mask=inside & (o < outputs)[None, :], other=0.0)
        w = tl.load(columns + o[:, None] * weight_o, mask=present & (o < outputs)[:, None], other=0.0)
        total = tl.dot(g, w.to(g.dtype), total, input_precision=PRECISION)
    if loaded is not None:
        maps = loaded.maps
        there, whole = c < pick(gradients.channels, which), pick(gradients.inner, which) + c
        offsets = at(p, spatial, pick(maps.b, which), pick(maps.n, which))[:, None] + c[None, :] * pick(maps.c, which)
        x = tl.load(pick_pointer(maps.pointers, which) + offsets, mask=inside & present, other=0.0).to(tl.float32)
        a, b = vectors(loaded.scale, loaded.shift, whole, there)
        total = tl.where(x * a[None, :] + b[None, :] <= 0, 0.0, total)
        part = tl.program_id(0) * loaded.channels + whole
        if loaded.of_scale is not None:
            tl.store(loaded.of_scale + part, tl.sum(total * x, 0), mask=there)
        if loaded.of_shift is not None:
            tl.store(loaded.of_shift + part, tl.sum(total, 0), mask=there)
        total *= a[None, :]
        present = (c < pick(gradients.channels, which) * pick(loaded.gives, which))[None, :]
    offsets = at(p, spatial, pick(gradients.b, which), pick(gradients.n, which))[:, None]
    offsets += c[None, :] * pick(gradients.c, which)
    tl.store(pick_pointer(gradients.pointers, which) + offsets, total, mask=inside & present)


@triton.jit
def concat_conv1x1_bwd_weight_kernel(
    grads, features, scale, shift, partials, inputs, positions, spatial, chunk,
    PRECISION: tl.constexpr, POSITIONS: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """One [outputs, channels] tile of a weight's gradient, summed over one chunk of positions."""
    which, begin = locate(features.channels, tl.program_id(0), CHANNELS)
    owner, split = pick(features.owners, which), tl.program_id(2)
    o = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    c = begin + tl.arange(0, CHANNELS)
    outputs = pick(grads.channels, owner)
    wanted, present = (o < outputs)[:, None], (c < pick(features.channels, which))[None, :]
    rows = pick_pointer(grads.pointers, owner) + o[:, None] * pick(grads.c, owner)
    columns = pick_pointer(features.pointers, which) + c[None, :] * pick(features.c, which)
    grad_b, grad_n = pick(grads.b, owner), pick(grads.n, owner)
    stride_b, stride_n = pick(features.b, which), pick(features.n, which)
    if scale is not None:
        a, b = vectors(scale, shift, pick(features.inner, which) + c, c < pick(features.channels, which))
    # The grid is as wide as the widest product: beyond its own outputs a product has nothing to add.
    end = tl.where(tl.program_id(1) * OUTPUTS < outputs, tl.minimum((split + 1) * chunk, positions), 0)
    total = tl.zeros((OUTPUTS, CHANNELS), tl.float32)
    for start in range(split * chunk, end, POSITIONS):
        p = start + tl.arange(0, POSITIONS)
        inside = p < positions
        g = tl.load(rows + at(p, spatial, grad_b, grad_n)[None, :], mask=inside[None, :] & wanted, other=0.0)
        x = tl.load(columns + at(p, spatial, stride_b, stride_n)[:, None], mask=inside[:, None] & present, other=0.0)
        if scale is not None:
            x = scale_shift_relu(x.to(tl.float32), a, b).to(x.dtype)
        total = tl.dot(g, x, total, input_precision=PRECISION)
    offsets = (split.to(tl.int64) * outputs + o)[:, None] * pick(inputs, owner) + pick(features.inner, which)
    tl.store(pick_pointer(partials, owner) + offsets + c[None, :], total, mask=wanted & present)


@triton.jit
def concat_conv1x1_bwd_reduce_kernel(sums, ELEMENTS: tl.constexpr, ROWS: tl.constexpr):
    """The sum of each [parts, rows, columns] over its parts, in a fixed order."""
    which, begin = locate(sums.elements, tl.program_id(0), ELEMENTS)
    i = begin + tl.arange(0, ELEMENTS)
    parts, elements, inner = pick(sums.parts, which), pick(sums.elements, which), pick(sums.columns, which)
    partial = pick_pointer(sums.partials, which)
    total = tl.zeros((ELEMENTS,), tl.float32)
    for start in range(0, parts, ROWS):
        part = start + tl.arange(0, ROWS)
        mask = (part < parts)[:, None] & (i < elements)[None, :]
        total += tl.sum(tl.load(partial + part.to(tl.int64)[:, None] * elements + i[None, :], mask=mask, other=0.0), 0)
    offsets = (i // inner) * pick(sums.row, which) + (i % inner) * pick(sums.column, which)
    tl.store(pick_pointer(sums.outs, which) + offsets, total, mask=i < elements)
