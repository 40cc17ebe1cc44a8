"""Triton kernels of peer_kl_ce and peer_kl: one program per sample and head, all heads in one launch.

A source is what can teach: the rows, then, where some head learns from it, the ensemble (the mean of the rows MEMBERS,
computed on the fly). Who teaches whom is a bit field: BITS bits per source, which count how often the head names it,
PER_WORD sources to an integer, WORDS integers per head. Statistics of a source are m = max_k z_k / T and
sum_k exp(z_k / T - m).
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._device import pick, pick_pointer

# Classes that one program holds; more are taken tile by tile.
MAX_BLOCK = 2048
# 4 values per thread: 100 classes are one warp, 1,000 are eight.
CLASSES_PER_WARP = 128
# All that 16 warps can have. Without a bound the compiler spills a few registers to save a few.
MAX_REGISTERS = 128
# Samples that the second kernel adds at a time.
REDUCE_BLOCK = 256
# Bits of a parameter that the compiler takes for a 32-bit integer whatever its value.
WORD_BITS = 31


@triton.jit
def _row(rows, strides, row, sample, k, inside):
    """Tile of one row in float32, -inf outside."""
    first = pick_pointer(rows, row) + sample * pick(strides[0], row)
    return tl.load(first + k.to(tl.int64) * pick(strides[1], row), mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def _logits(rows, strides, MEMBERS: tl.constexpr, source, sample, k, inside):
    """Tile of one source's logits in float32, -inf outside."""
    if len(MEMBERS) == 0:
        tile = _row(rows, strides, source, sample, k, inside)
    else:
        if source < len(rows):
            tile = _row(rows, strides, source, sample, k, inside)
        else:
            tile = tl.zeros(k.shape, tl.float32)
            for m in tl.static_range(len(MEMBERS)):
                tile += _row(rows, strides, tl.cast(MEMBERS[m], tl.int32), sample, k, inside)
            tile = tile / len(MEMBERS)
    return tile


@triton.jit
def _statistics(rows, strides, MEMBERS: tl.constexpr, source, sample, classes, temperature, BLOCK: tl.constexpr):
    """m and sum_k exp(z_k / T - m) of one source, in one pass over the tiles."""
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = _logits(rows, strides, MEMBERS, source, sample, k, k < classes) / temperature
        higher = tl.maximum(highest, tl.max(z, 0))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - anchor) + tl.sum(tl.exp(z - anchor), 0)
        highest = higher
    return highest, total


@triton.jit
def _excess(q, p, log_ratio):
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
def _times_named(links, head, source, BITS: tl.constexpr, WORDS: tl.constexpr, PER_WORD: tl.constexpr):
    """How often the head names the source as its teacher."""
    word = pick(links, head * WORDS + source // PER_WORD)
    return (word >> (source % PER_WORD * BITS)) & ((1 << BITS) - 1)


@triton.jit
def peer_kl_ce_fwd_sample_kernel(
    rows, strides, links, labels, ce, kl, stats, batch, classes, temperature, epsilon,
    MEMBERS: tl.constexpr, HEADS: tl.constexpr, SOURCES: tl.constexpr, HAS_EPSILON: tl.constexpr,
    BITS: tl.constexpr, WORDS: tl.constexpr, PER_WORD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    here, plane = head.to(tl.int64) * batch + sample, SOURCES * tl.cast(batch, tl.int64)
    if labels is not None:
        highest_1, total_1 = _statistics(rows, strides, MEMBERS, head, sample, classes, 1.0, BLOCK)
        tl.store(stats + 2 * plane + here, highest_1)
        tl.store(stats + 3 * plane + here, total_1)
        if head < HEADS:
            label = tl.load(labels + sample)
            valid = (label >= 0) & (label < classes)
            place = sample * pick(strides[0], head) + tl.where(valid, label, 0) * pick(strides[1], head)
            logit = tl.load(pick_pointer(rows, head) + place).to(tl.float32)
            # Not a class: no loss can be given, and none is made up.
            tl.store(ce + here, tl.where(valid, tl.log(total_1) - (logit - highest_1), float("nan")))
    highest, total = _statistics(rows, strides, MEMBERS, head, sample, classes, temperature, BLOCK)
    tl.store(stats + here, highest)
    tl.store(stats + plane + here, total)
    if head < HEADS:
        log_total = tl.log(total)
        summed = tl.zeros((BLOCK,), tl.float32)
        count = 0
        for source in range(SOURCES):
            times = _times_named(links, head, source, BITS, WORDS, PER_WORD)
            if times > 0:
                count += times
                peak, mass = _statistics(rows, strides, MEMBERS, source, sample, classes, temperature, BLOCK)
                log_mass = tl.log(mass)
                for start in range(0, classes, BLOCK):
                    k = start + tl.arange(0, BLOCK)
                    inside = k < classes
                    z = _logits(rows, strides, MEMBERS, head, sample, k, inside) / temperature - highest
                    t = _logits(rows, strides, MEMBERS, source, sample, k, inside) / temperature - peak
                    q, log_ratio = tl.exp(t) / mass, (t - z) - (log_mass - log_total)
                    if HAS_EPSILON:
                        q += epsilon
                        log_ratio = tl.log(q) - (z - log_total)
                    summed += times * tl.where(inside, _excess(q, tl.exp(z) / total, log_ratio), 0.0)
        mean = tl.sum(summed, 0) / tl.maximum(count, 1) + tl.where(count > 0, classes * epsilon, 0.0)
        tl.store(kl + here, mean * temperature * temperature)


@triton.jit
def _sum_of(values, batch, BLOCK: tl.constexpr):
    summed = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, batch, BLOCK):
        b = start + tl.arange(0, BLOCK)
        summed += tl.load(values + b, mask=b < batch, other=0.0)
    return tl.sum(summed, 0)


@triton.jit
def peer_kl_ce_fwd_reduce_kernel(
    ce_samples, kl_samples, ce, kl, links, batch, divisor, WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    head = tl.program_id(0)
    first = head.to(tl.int64) * batch
    if ce is not None:
        tl.store(ce + head, _sum_of(ce_samples + first, batch, BLOCK) / divisor)
    named = 0
    for w in tl.static_range(WORDS):
        named |= pick(links, head * WORDS + w)
    # 0 for a head without teachers, also where the mean of an empty batch is none.
    tl.store(kl + head, tl.where(named == 0, 0.0, _sum_of(kl_samples + first, batch, BLOCK) / divisor))


@triton.jit
def peer_kl_ce_bwd_logits_kernel(
    grads, grad_strides, heads, rows, strides, links, labels, grad_ce, grad_ce_strides, grad_kl, grad_kl_strides,
    stats, batch, classes, temperature, epsilon, divisor,
    MEMBERS: tl.constexpr, SOURCES: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PER_WORD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, turn = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.cast(pick(heads, turn), tl.int32)
    k = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = k < classes
    here, plane = head.to(tl.int64) * batch + sample, SOURCES * tl.cast(batch, tl.int64)
    z = _logits(rows, strides, MEMBERS, head, sample, k, inside)
    slope = tl.zeros((BLOCK,), tl.float32)
    if grad_ce is not None:
        label = tl.load(labels + sample)
        p = tl.exp(z - tl.load(stats + 2 * plane + here)) / tl.load(stats + 3 * plane + here)
        part = tl.where((label >= 0) & (label < classes), p - tl.where(k == label, 1.0, 0.0), float("nan"))
        slope += part * tl.load(grad_ce + head * grad_ce_strides[0] + sample * grad_ce_strides[1])
    if grad_kl is not None:
        target = tl.zeros((BLOCK,), tl.float32)
        count = 0
        for source in range(SOURCES):
            times = _times_named(links, head, source, BITS, WORDS, PER_WORD)
            if times > 0:
                count += times
                there = source * tl.cast(batch, tl.int64) + sample
                t = _logits(rows, strides, MEMBERS, source, sample, k, inside) / temperature
                target += times * (tl.exp(t - tl.load(stats + there)) / tl.load(stats + plane + there))
        if count > 0:
            p = tl.exp(z / temperature - tl.load(stats + here)) / tl.load(stats + plane + here)
            # A target sums to 1 + K epsilon.
            part = (1.0 + classes * epsilon) * p - (target / count + epsilon)
            slope += part * temperature * tl.load(grad_kl + head * grad_kl_strides[0] + sample * grad_kl_strides[1])
    first = pick_pointer(grads, turn) + sample * pick(grad_strides[0], turn)
    tl.store(first + k.to(tl.int64) * pick(grad_strides[1], turn), slope / divisor, mask=inside)


def _strides(rows: Sequence[Tensor]) -> tuple:
    """Strides of sample and class; one entry where all are equal, so that the compiler knows a stride of 1 as such."""
    tables = [[row.stride(axis) for row in rows] for axis in (0, 1)]
    return tuple(tuple(table[:1] if len(set(table)) == 1 else table) for table in tables)


def _structure(rows: Sequence[Tensor], teachers: Sequence[int], counts: Sequence[int], ensemble: Sequence[int]) -> dict:
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
        "strides": _strides(rows),
        "links": tuple(links),
        "MEMBERS": tuple(ensemble),
        "SOURCES": sources,
        "BITS": bits,
        "WORDS": words,
        "PER_WORD": per_word,
    }


def _block(classes: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(max(classes, 1)), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": max(block // CLASSES_PER_WARP, 1), "maxnreg": MAX_REGISTERS}


def launch_fwd(
    logits: Sequence[Tensor],
    labels: Tensor | None,
    temperature: float,
    teachers: Sequence[int],
    counts: Sequence[int],
    ensemble: Sequence[int],
    epsilon: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and divergence of the heads, and the statistics for backward."""
    structure = _structure(logits, teachers, counts, ensemble)
    batch, classes = logits[0].shape
    heads, kept = len(counts), {"dtype": torch.float32, "device": logits[0].device}
    shape = (heads, batch) if reduction == "none" else (heads,)
    ce, kl = torch.empty(shape if labels is not None else (0,), **kept), torch.empty(shape, **kept)
    stats = torch.empty(2 if labels is None else 4, structure["SOURCES"], batch, **kept)
    samples = (
        (ce, kl) if reduction == "none" else (torch.empty(heads, batch, **kept), torch.empty(heads, batch, **kept))
    )
    if batch:
        peer_kl_ce_fwd_sample_kernel[batch, structure["SOURCES"]](
            labels=labels, ce=samples[0], kl=samples[1], stats=stats, batch=batch, classes=classes,
            temperature=temperature, epsilon=epsilon, HEADS=heads, HAS_EPSILON=epsilon != 0,
            **structure, **_block(classes),
        )  # fmt: skip
    if reduction != "none":
        peer_kl_ce_fwd_reduce_kernel[(heads,)](
            *samples, None if labels is None else ce, kl, structure["links"], batch,
            float(batch if reduction == "mean" else 1), WORDS=structure["WORDS"], BLOCK=REDUCE_BLOCK, num_warps=4,
        )  # fmt: skip
    return ce, kl, stats


def launch_bwd(
    grad_ce: Tensor | None,
    grad_kl: Tensor | None,
    logits: Sequence[Tensor],
    labels: Tensor | None,
    stats: Tensor,
    heads: Sequence[int],
    temperature: float,
    teachers: Sequence[int],
    counts: Sequence[int],
    ensemble: Sequence[int],
    epsilon: float,
    reduction: str,
) -> list[Tensor]:
    """Gradients of the logits of `heads`."""
    grads = [torch.empty_like(logits[i]) for i in heads]
    batch, classes = logits[0].shape
    if batch:
        block = _block(classes)
        both = [None if g is None else (g.stride(0), g.stride(1) if g.dim() == 2 else 0) for g in (grad_ce, grad_kl)]
        peer_kl_ce_bwd_logits_kernel[batch, len(heads), triton.cdiv(classes, block["BLOCK"])](
            grads=tuple(grads), grad_strides=_strides(grads), heads=tuple(heads), labels=labels,
            grad_ce=grad_ce, grad_ce_strides=both[0], grad_kl=grad_kl, grad_kl_strides=both[1],
            stats=stats, batch=batch, classes=classes, temperature=temperature, epsilon=epsilon,
            divisor=float(batch if reduction == "mean" else 1),
            **_structure(logits, teachers, counts, ensemble), **block,
        )  # fmt: skip
    return grads
