"""What the kernels of peer_kl_ce read: rows of logits, sources, and who teaches whom.

A source is what can teach: the rows, then, where some head learns from it, the ensemble (the mean of the rows MEMBERS,
computed on the fly). Who teaches whom is a bit field: BITS bits per source, which count how often the head names it,
PER_WORD sources to an integer, WORDS integers per head. Statistics of a source are m = max_k z_k / T and
sum_k exp(z_k / T - m).
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._device import pick, pick_pointer, table

# Bits of a parameter that the compiler takes for a 32-bit integer whatever its value.
WORD_BITS = 31


@triton.jit
def row_tile(rows, strides, row, sample, k, inside):
    """Tile of one row in float32, -inf outside."""
    first = pick_pointer(rows, row) + sample * pick(strides[0], row)
    return tl.load(first + k.to(tl.int64) * pick(strides[1], row), mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def logits_tile(rows, strides, MEMBERS: tl.constexpr, source, sample, k, inside):
    """Tile of one source's logits in float32, -inf outside."""
    if len(MEMBERS) == 0:
        tile = row_tile(rows, strides, source, sample, k, inside)
    else:
        if source < len(rows):
            tile = row_tile(rows, strides, source, sample, k, inside)
        else:
            tile = tl.zeros(k.shape, tl.float32)
            for m in tl.static_range(len(MEMBERS)):
                tile += row_tile(rows, strides, tl.cast(MEMBERS[m], tl.int32), sample, k, inside)
            tile = tile / len(MEMBERS)
    return tile


@triton.jit
def statistics(rows, strides, MEMBERS: tl.constexpr, source, sample, classes, temperature, BLOCK: tl.constexpr):
    """m and sum_k exp(z_k / T - m) of one source, in one pass over the tiles."""
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = logits_tile(rows, strides, MEMBERS, source, sample, k, k < classes) / temperature
        higher = tl.maximum(highest, tl.max(z, 0))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - anchor) + tl.sum(tl.exp(z - anchor), 0)
        highest = higher
    return highest, total


@triton.jit
def excess(q, p, log_ratio):
    """q log(q / p) - q + p, at least 0: rounding errors of the logarithms do not add up where q and p are close.

    Summed over classes it is the divergence, since sum q = sum p = 1.
    """
    # q (exp(-r) - 1 + r) for a small r = log(q / p), by its series.
    series = 1 / 5040 - log_ratio / 40320
    series = 1 / 120 - log_ratio * (1 / 720 - log_ratio * series)
    series = 1 / 2 - log_ratio * (1 / 6 - log_ratio * (1 / 24 - log_ratio * series))
    close = q * log_ratio * log_ratio * series
    found = tl.where(tl.abs(log_ratio) < 0.5, close, q * log_ratio - q + p)
    return tl.where(q == 0, p, found)


@triton.jit
def times_named(links, head, source, BITS: tl.constexpr, WORDS: tl.constexpr, PER_WORD: tl.constexpr):
    """How often the head names the source as its teacher."""
    word = pick(links, head * WORDS + source // PER_WORD)
    return (word >> (source % PER_WORD * BITS)) & ((1 << BITS) - 1)


@triton.jit
def share(weights, weight_strides, head, source, times):
    """What a teacher counts that the head names so often."""
    found = times * 1.0
    if weights is not None:
        found *= tl.load(weights + head * weight_strides[0] + source * weight_strides[1]).to(tl.float32)
    return found


@triton.jit
def against_label(
    rows, strides, head, sample, logit, label, highest, classes, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr
):
    """How many classes torch.argmax prefers to the label, and with SMOOTHED the sum of z - highest."""
    own = tl.broadcast_to(logit, (BLOCK,))
    preferred, lowered = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = k < classes
        z = row_tile(rows, strides, head, sample, k, inside)
        # Not a number is higher than any; of equal ones the first is taken.
        higher = (z > own) | ((z != z) & (own == own))
        equal = (z == own) | ((z != z) & (own != own))
        preferred += tl.where(inside & (higher | (equal & (k < label))), 1, 0)
        if SMOOTHED:
            lowered += tl.where(inside, z - highest, 0.0)
    return tl.sum(preferred, 0), tl.sum(lowered, 0)


def strides_of(rows: Sequence[Tensor]) -> tuple:
    """Strides of sample and class; one entry where all are equal, so that the compiler knows a stride of 1 as such."""
    return tuple(table([row.stride(axis) for row in rows]) for axis in (0, 1))


def structure(rows: Sequence[Tensor], teachers: Sequence[int], counts: Sequence[int], ensemble: Sequence[int]) -> dict:
    """Who teaches whom, as the kernels take it; see the top of this file."""
    sources = len(rows) + bool(ensemble)
    lists, remaining = [], iter(teachers)
    for count in counts:
        lists.append([next(remaining) for _ in range(count)])
    bits = max(own.count(j) for own in lists for j in [-1, *own]).bit_length() or 1
    per_word = WORD_BITS // bits
    words = -(-sources // per_word)
    links = [0] * (len(rows) + 1) * words
    for i, own in enumerate(lists):
        for j in own:
            links[i * words + j // per_word] += 1 << (j % per_word * bits)
    return {
        "rows": tuple(rows),
        "strides": strides_of(rows),
        "links": tuple(links),
        "MEMBERS": tuple(ensemble),
        "SOURCES": sources,
        "BITS": bits,
        "WORDS": words,
        "PER_WORD": per_word,
    }
