"""What the kernels of normalized_lp and of its joint form share: sums over one tile, and their combination per sample.

Within a tile the distance is held as that of x from its best multiple r y, with what is left over orthogonal to y, so
that samples that nearly agree lose nothing to cancellation when the tiles are combined. `partial` holds five numbers of
every tile: |x|^2, |y|^2, and for p = 2 r, |x - r y|^2 and (x - r y).y; for p = 1 the sums of |e|, sign(e) xh and
-sign(e) yh.
"""

import triton
import triton.language as tl

from fastfuse.kernels._device import divide, ordered_sum, pick, pick_pointer, sum_of_samples


@triton.jit
def store_squares(place, plane, a, b, x_square, y_square, product, P: tl.constexpr):
    """The sums of a tile that need no norms: |x|^2, |y|^2 and x.y are given, added alike so that x = y gives r = 1."""
    tl.store(place, x_square)
    tl.store(place + plane, y_square)
    if P == 2:
        ratio = product / tl.maximum(y_square, 1e-37)
        rest = a - ratio * b
        tl.store(place + 2 * plane, ratio)
        tl.store(place + 3 * plane, tl.sum(rest * rest))
        tl.store(place + 4 * plane, tl.sum(rest * b))


@triton.jit
def store_distance(place, plane, a, b, x_norm, y_norm):
    """The sums of a tile for p = 1, which need the norms (in fp64)."""
    ratio, rest = norm_ratio(x_norm, y_norm)
    x_scale = divide(1.0, tl.maximum(x_norm.to(tl.float32), 1e-12))
    y_scale = divide(1.0, tl.maximum(y_norm.to(tl.float32), 1e-12))
    difference = unit_difference(a, b, x_scale, ratio, rest)
    direction = sign(difference)
    tl.store(place + 2 * plane, tl.sum(tl.abs(difference)))
    tl.store(place + 3 * plane, tl.sum(direction * a * x_scale))
    tl.store(place + 4 * plane, -tl.sum(direction * b * y_scale))


@triton.jit
def norms(first, plane, tiles, BLOCK: tl.constexpr):
    """|x| and |y| of a sample in fp64."""
    return (
        tl.sqrt(ordered_sum(first, tiles, BLOCK, tl.float64)),
        tl.sqrt(ordered_sum(first + plane, tiles, BLOCK, tl.float64)),
    )


@triton.jit
def norm_ratio(x_norm, y_norm):
    """|x| / |y| from fp64 norms, as two fp32 numbers: rounded to one it would turn small angles between x and y."""
    ratio = tl.maximum(x_norm, 1e-12) / tl.maximum(y_norm, 1e-12)
    high = ratio.to(tl.float32)
    return high, (ratio - high).to(tl.float32)


@triton.jit
def unit_difference(a, b, x_scale, ratio, rest):
    """xh - yh, as (x - |x| / |y| y) / |x|."""
    return (a - ratio * b - rest * b) * x_scale


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def _square_distance(first, plane, tiles, x_scale, y_scale, BLOCK: tl.constexpr):
    """|xh - yh|^2 from the tiles' own: of each the part orthogonal to y, and what its r is off the sample's."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        there = tile < tiles
        y_square = tl.load(first + plane + tile, mask=there, other=0).to(tl.float64)
        ratio = tl.load(first + 2 * plane + tile, mask=there, other=0).to(tl.float64)
        rest = tl.load(first + 3 * plane + tile, mask=there, other=0).to(tl.float64)
        mixed = tl.load(first + 4 * plane + tile, mask=there, other=0).to(tl.float64)
        off = x_scale * ratio - y_scale
        total += x_scale * x_scale * rest + 2 * x_scale * off * mixed + off * off * y_square
    return tl.sum(total)


@triton.jit
def combine(first, plane, tiles, elements, loss, stats, step, P: tl.constexpr, BLOCK: tl.constexpr):
    """One sample's loss and, `step` apart in stats, its norms, xh.g and -yh.g with g = e or sign(e), and |x| / |y|."""
    x_norm, y_norm = norms(first, plane, tiles, BLOCK)
    x_scale, y_scale = 1 / tl.maximum(x_norm, 1e-12), 1 / tl.maximum(y_norm, 1e-12)
    if P == 2:
        distance = _square_distance(first, plane, tiles, x_scale, y_scale, BLOCK)
        # |xh|^2 and |yh|^2 are 1 but for zero maps.
        longer = (x_norm * x_scale) * (x_norm * x_scale) - (y_norm * y_scale) * (y_norm * y_scale)
        x_dot, y_dot = (distance + longer) / 2, (distance - longer) / 2
    else:
        distance = ordered_sum(first + 2 * plane, tiles, BLOCK, tl.float64)
        x_dot, y_dot = (
            ordered_sum(first + 3 * plane, tiles, BLOCK, tl.float64),
            ordered_sum(first + 4 * plane, tiles, BLOCK, tl.float64),
        )
    ratio, rest = norm_ratio(x_norm, y_norm)
    tl.store(loss, (distance / elements).to(tl.float32))
    tl.store(stats, x_norm.to(tl.float32))
    tl.store(stats + step, y_norm.to(tl.float32))
    tl.store(stats + 2 * step, x_dot.to(tl.float32))
    tl.store(stats + 3 * step, y_dot.to(tl.float32))
    tl.store(stats + 4 * step, ratio)
    tl.store(stats + 5 * step, rest)


@triton.jit
def distance_slope(stats, plane, a, b, P: tl.constexpr):
    """g = e or sign(e) of a tile, from the statistics of its sample."""
    x_scale = divide(1.0, tl.maximum(tl.load(stats), 1e-12))
    g = unit_difference(a, b, x_scale, tl.load(stats + 4 * plane), tl.load(stats + 5 * plane))
    return g if P == 2 else sign(g)


@triton.jit
def map_slope(stats, plane, own, g, upstream, P: tl.constexpr, SIDE: tl.constexpr):
    """Gradient of a tile of one map: (g - (xh.g) xh) / |x| for x (side 0), the same of y with -g (side 1)."""
    norm, dot = tl.load(stats + SIDE * plane), tl.load(stats + (2 + SIDE) * plane)
    scale = divide(1.0, tl.maximum(norm, 1e-12))
    # A map without a direction has no gradient; eager multiplies by 1e12 there.
    slope = tl.where(norm < 1e-12, 0.0, P * upstream * scale)
    return slope * ((g if SIDE == 0 else -g) - dot * scale * own)


@triton.jit
def normalized_lp_fwd_reduce_kernel(per_sample, row, batches, losses, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program per pair and kind of loss adds its samples in a fixed order."""
    pair, kind = tl.program_id(0), tl.program_id(1)
    losses_of = pick_pointer(per_sample, kind) + pair * row
    tl.store(pick_pointer(losses, kind) + pair, sum_of_samples(losses_of, pick(batches, pair), MEAN, BLOCK))
