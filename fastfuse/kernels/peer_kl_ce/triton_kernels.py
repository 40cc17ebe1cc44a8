"""Triton kernels of peer_kl_ce and peer_kl: one program per sample and head, all heads in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastfuse.kernels._device import divide, ordered_sum, pick, pick_pointer
from fastfuse.kernels._limits import check_count, grid
from fastfuse.kernels.peer_kl_ce.triton_rows import (
    against_label,
    excess,
    logits_tile,
    share,
    statistics,
    strides_of,
    structure,
    times_named,
)

# Classes that one program holds; more are taken tile by tile.
MAX_BLOCK = 2048
# 4 values per thread: 100 classes are one warp, 1,000 are eight.
CLASSES_PER_WARP = 128
# All that 16 warps can have. Without a bound the compiler spills a few registers to save a few.
MAX_REGISTERS = 128
# Samples that the second kernel adds at a time.
REDUCE_BLOCK = 256


@triton.jit
def peer_kl_ce_fwd_sample_kernel(
    rows, strides, links, labels, weights, weight_strides, ce, kl, correct, stats,
    batch, classes, temperature, epsilon, smoothing,
    MEMBERS: tl.constexpr, HEADS: tl.constexpr, SOURCES: tl.constexpr, HAS_EPSILON: tl.constexpr,
    SMOOTHED: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PER_WORD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    here, plane = head.to(tl.int64) * batch + sample, SOURCES * tl.cast(batch, tl.int64)
    if labels is not None:
        highest_1, total_1 = statistics(rows, strides, MEMBERS, head, sample, classes, 1.0, BLOCK)
        tl.store(stats + 2 * plane + here, highest_1)
        tl.store(stats + 3 * plane + here, total_1)
        if head < HEADS:
            label = tl.load(labels + sample)
            valid = (label >= 0) & (label < classes)
            place = sample * pick(strides[0], head) + tl.where(valid, label, 0) * pick(strides[1], head)
            logit = tl.load(pick_pointer(rows, head) + place).to(tl.float32)
            preferred, lowered = against_label(
                rows, strides, head, sample, logit, label, highest_1, classes, SMOOTHED, BLOCK
            )
            tl.store(correct + here, tl.where(valid & (preferred == 0), 1, 0))
            loss = tl.log(total_1) - (logit - highest_1)
            if SMOOTHED:
                loss = tl.log(total_1) - (1.0 - smoothing) * (logit - highest_1) - smoothing * divide(lowered, classes)
            # Not a class: no loss can be given, and none is made up.
            tl.store(ce + here, tl.where(valid, loss, float("nan")))
    highest, total = statistics(rows, strides, MEMBERS, head, sample, classes, temperature, BLOCK)
    tl.store(stats + here, highest)
    tl.store(stats + plane + here, total)
    if head < HEADS:
        log_total = tl.log(total)
        summed = tl.zeros((BLOCK,), tl.float32)
        count, mass_of_targets = 0, 0.0
        for source in range(SOURCES):
            times = times_named(links, head, source, BITS, WORDS, PER_WORD)
            if times > 0:
                count += times
                weight = share(weights, weight_strides, head, source, times)
                mass_of_targets += weight
                peak, mass = statistics(rows, strides, MEMBERS, source, sample, classes, temperature, BLOCK)
                # Of the quotient: the two logarithms' errors are larger, and common to all classes.
                masses = tl.log(tl.div_rn(mass, total))
                for start in range(0, classes, BLOCK):
                    k = start + tl.arange(0, BLOCK)
                    inside = k < classes
                    z = logits_tile(rows, strides, MEMBERS, head, sample, k, inside) / temperature - highest
                    t = logits_tile(rows, strides, MEMBERS, source, sample, k, inside) / temperature - peak
                    q, log_ratio = tl.exp(t) / mass, (t - z) - masses
                    if HAS_EPSILON:
                        q += epsilon
                        log_ratio = tl.log(q) - (z - log_total)
                    summed += weight * tl.where(inside, excess(q, tl.exp(z) / total, log_ratio), 0.0)
        # A target sums to 1 + K epsilon.
        divergence = tl.sum(summed, 0) + mass_of_targets * classes * epsilon
        if weights is None:
            divergence = divide(divergence, tl.maximum(count, 1))
        tl.store(kl + here, divergence * temperature * temperature)


@triton.jit
def peer_kl_ce_fwd_reduce_kernel(
    ce_samples, kl_samples, correct_samples, ce, kl, correct, links, batch, divisor,
    WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    first = head.to(tl.int64) * batch
    if ce is not None:
        tl.store(ce + head, divide(ordered_sum(ce_samples + first, batch, BLOCK), divisor))
        tl.store(correct + head, ordered_sum(correct_samples + first, batch, BLOCK, tl.int64))
    named = 0
    for w in tl.static_range(WORDS):
        named |= pick(links, head * WORDS + w)
    # 0 for a head without teachers, also where the mean of an empty batch is none.
    divergence = divide(ordered_sum(kl_samples + first, batch, BLOCK), divisor)
    tl.store(kl + head, tl.where(named == 0, 0.0, divergence))


@triton.jit
def peer_kl_ce_bwd_logits_kernel(
    grads, grad_strides, heads, rows, strides, links, labels, weights, weight_strides,
    grad_ce, grad_ce_strides, grad_kl, grad_kl_strides, stats, batch, classes, temperature, epsilon, smoothing, divisor,
    MEMBERS: tl.constexpr, SOURCES: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, PER_WORD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    sample, turn = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = tl.cast(pick(heads, turn), tl.int32)
    k = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = k < classes
    here, plane = head.to(tl.int64) * batch + sample, SOURCES * tl.cast(batch, tl.int64)
    z = logits_tile(rows, strides, MEMBERS, head, sample, k, inside)
    slope = tl.zeros((BLOCK,), tl.float32)
    if grad_ce is not None:
        label = tl.load(labels + sample)
        p = tl.exp(z - tl.load(stats + 2 * plane + here)) / tl.load(stats + 3 * plane + here)
        part = p - tl.where(k == label, 1.0 - smoothing, 0.0) - divide(smoothing, classes)
        part = tl.where((label >= 0) & (label < classes), part, float("nan"))
        slope += part * tl.load(grad_ce + head * grad_ce_strides[0] + sample * grad_ce_strides[1])
    if grad_kl is not None:
        p = tl.exp(z / temperature - tl.load(stats + here)) / tl.load(stats + plane + here)
        # A target sums to 1 + K epsilon.
        p *= 1.0 + classes * epsilon
        part = tl.zeros((BLOCK,), tl.float32)
        count = 0
        for source in range(SOURCES):
            times = times_named(links, head, source, BITS, WORDS, PER_WORD)
            if times > 0:
                count += times
                there = source * tl.cast(batch, tl.int64) + sample
                t = logits_tile(rows, strides, MEMBERS, source, sample, k, inside) / temperature
                q = tl.exp(t - tl.load(stats + there)) / tl.load(stats + plane + there) + epsilon
                part += share(weights, weight_strides, head, source, times) * (p - q)
        if count > 0:
            if weights is None:
                part = divide(part, count)
            slope += part * temperature * tl.load(grad_kl + head * grad_kl_strides[0] + sample * grad_kl_strides[1])
    first = pick_pointer(grads, turn) + sample * pick(grad_strides[0], turn)
    tl.store(first + k.to(tl.int64) * pick(grad_strides[1], turn), divide(slope, divisor), mask=inside)


def _block(classes: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(max(classes, 1)), MAX_BLOCK)
    return {"BLOCK": block, "num_warps": max(block // CLASSES_PER_WARP, 1), "maxnreg": MAX_REGISTERS}


def _edges(weights: Tensor | None) -> dict:
    return {"weights": weights, "weight_strides": None if weights is None else weights.stride()}


def launch_fwd(
    logits: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    temperature: float,
    teachers: Sequence[int],
    counts: Sequence[int],
    ensemble: Sequence[int],
    epsilon: float,
    smoothing: float,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cross-entropy, divergence and right answers of the heads, and the statistics for backward."""
    edges = structure(logits, teachers, counts, ensemble)
    batch, classes = logits[0].shape
    check_count("logits", logits[0], "classes", classes)
    heads, device = len(counts), logits[0].device

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    def results(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
        labelled = (0,) if labels is None else shape
        return empty(*labelled), empty(*shape), empty(*labelled, dtype=torch.int64)

    found = results(heads, batch) if reduction == "none" else results(heads)
    samples = found if reduction == "none" else results(heads, batch)
    stats = empty(2 if labels is None else 4, edges["SOURCES"], batch)
    if batch:
        peer_kl_ce_fwd_sample_kernel[grid("logits", logits[0], batch, edges["SOURCES"])](
            labels=labels, ce=samples[0], kl=samples[1], correct=samples[2], stats=stats, batch=batch, classes=classes,
            temperature=temperature, epsilon=epsilon, smoothing=smoothing, HEADS=heads, HAS_EPSILON=epsilon != 0,
            SMOOTHED=smoothing != 0, **_edges(weights), **edges, **_block(classes),
        )  # fmt: skip
    if reduction != "none":
        ce, kl, correct = found
        peer_kl_ce_fwd_reduce_kernel[(heads,)](
            *samples, None if labels is None else ce, kl, correct, edges["links"], batch,
            float(batch if reduction == "mean" else 1), WORDS=edges["WORDS"], BLOCK=REDUCE_BLOCK, num_warps=4,
        )  # fmt: skip
    return *found, stats


def launch_bwd(
    grad_ce: Tensor | None,
    grad_kl: Tensor | None,
    logits: Sequence[Tensor],
    labels: Tensor | None,
    weights: Tensor | None,
    stats: Tensor,
    heads: Sequence[int],
    temperature: float,
    teachers: Sequence[int],
    counts: Sequence[int],
    ensemble: Sequence[int],
    epsilon: float,
    smoothing: float,
    reduction: str,
) -> list[Tensor]:
    """Gradients of the logits of `heads`."""
    grads = [torch.empty_like(logits[i]) for i in heads]
    batch, classes = logits[0].shape
    if batch:
        block = _block(classes)
        both = [None if g is None else (g.stride(0), g.stride(1) if g.dim() == 2 else 0) for g in (grad_ce, grad_kl)]
        programs = grid("logits", logits[0], batch, len(heads), triton.cdiv(classes, block["BLOCK"]))
        peer_kl_ce_bwd_logits_kernel[programs](
            grads=tuple(grads), grad_strides=strides_of(grads), heads=tuple(heads), labels=labels,
            grad_ce=grad_ce, grad_ce_strides=both[0], grad_kl=grad_kl, grad_kl_strides=both[1],
            stats=stats, batch=batch, classes=classes, temperature=temperature, epsilon=epsilon, smoothing=smoothing,
            divisor=float(batch if reduction == "mean" else 1),
            **_edges(weights), **structure(logits, teachers, counts, ensemble), **block,
        )  # fmt: skip
    return grads
