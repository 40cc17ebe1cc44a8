"""Public form of peer_kl_ce."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _numerics, _triton
from fastfuse.kernels.peer_kl_ce import reference
from fastfuse.kernels.peer_kl_ce.autograd import Options, PeerKlCeFunction, PeerKlFunction

_dispatch.register("peer_kl_ce", {"triton": _triton.why_not, "reference": None})

ENSEMBLE = -1


class PeerKlCe(NamedTuple):
    """Per head the batch means `cross_entropy` [R] and `divergence` [R] (0 for a head without teachers), and `correct`.

    `correct` [R], int64, counts the samples whose highest logit is the label's (of equal ones the first is taken, and a
    NaN is the highest, as in torch.argmax).
    """

    cross_entropy: Tensor
    divergence: Tensor
    correct: Tensor


def peer_kl_ce(
    logits: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    temperature: float,
    teachers: Sequence[Sequence[int]] | None = None,
    ensemble: Sequence[int] | None = None,
    target_epsilon: float = 0.0,
    label_smoothing: float = 0.0,
    weights: Tensor | None = None,
    backend: str = "auto",
) -> PeerKlCe:
    """Cross-entropy and right answers of every head and its temperature KL from its teachers, all heads at once.

    divergence_i = T^2 / |teachers_i| * sum_j KL(sg softmax(z_j / T) || softmax(z_i / T)), KL summed over classes and
    averaged over the batch; targets carry no gradient. Sources: deep mutual learning (arXiv 1706.00384), FFSD
    (arXiv 2103.14473), FFL (arXiv 1904.09058).

    Args:
        logits: R heads, [R, B, K] or R tensors [B, K]; floating point.
        labels: [B] int64, each in 0..K-1.
        temperature: T > 0.
        teachers: for each head the heads it learns from, by index; ENSEMBLE (-1) is the mean of the logits of
            `ensemble`. None: every head learns from all others.
        ensemble: indices of the heads whose logits are averaged; None: all.
        target_epsilon: added to every target probability, not renormalised (FFL's program adds 1e-7).
        label_smoothing: a in 0..1; the cross-entropy of every head is (1 - a) times the usual one plus a times its mean
            over all classes as labels, as in torch.nn.functional.cross_entropy.
        weights: floating point, broadcastable to [R, R + 1], a 0-d tensor too: weights[i, j] is that of teacher j for
            head i, the last column is that of ENSEMBLE. divergence_i is then T^2 sum_j w_ij KL_ij. They may change
            between replays of a captured graph; they get no gradient. None: the mean over a head's teachers.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        PeerKlCe(cross_entropy [R], divergence [R], correct [R]); losses in float32 for half-precision logits.

    Raises:
        InputError, TypeError: heads of different shape or device, wrong labels' shape or dtype, T <= 0, a teacher that
            does not exist or is the head itself, a label_smoothing outside 0..1, weights of another shape or device or
            dtype or that require a gradient.
    """
    rows = list(logits.unbind(0)) if isinstance(logits, Tensor) else list(logits)
    _check(rows, labels, temperature)
    heads = range(len(rows))
    teachers = [[j for j in heads if j != i] for i in heads] if teachers is None else teachers
    ensemble = list(heads) if ensemble is None else list(ensemble)
    resolved = [[_teacher(i, j, len(rows)) for j in row] for i, row in enumerate(teachers)]
    if len(resolved) != len(rows):
        raise InputError(f"teachers must name the teachers of each of {len(rows)} heads, {len(resolved)} given")
    if not ensemble or any(i not in heads for i in ensemble):
        raise InputError(f"ensemble must hold heads 0..{len(rows) - 1}, not {ensemble}")
    if not 0 <= label_smoothing <= 1:
        raise InputError(f"label_smoothing must be between 0 and 1, not {label_smoothing}")
    weights = None if weights is None else _edge_weights(weights, rows)
    rows = _of_one_dtype(rows)
    if _dispatch.resolve("peer_kl_ce", backend, rows[0]) == "reference":
        found = reference.peer_kl_ce(
            rows, labels, temperature, resolved, ensemble, target_epsilon, label_smoothing, weights
        )
        return PeerKlCe(*found)
    flat = tuple(j for own in resolved for j in own)
    taught_by_ensemble = len(rows) in flat
    options = Options(
        float(temperature),
        flat,
        tuple(len(own) for own in resolved),
        tuple(ensemble) if taught_by_ensemble else (),
        float(target_epsilon),
        float(label_smoothing),
        "mean",
    )
    return PeerKlCe(*PeerKlCeFunction.apply(options, labels, weights, *rows))


def peer_kl(
    prediction: Tensor,
    peers: Tensor | Sequence[Tensor],
    *,
    temperature: float,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """The divergence of `peer_kl_ce` for one head, without cross-entropy.

    Args:
        prediction: [B, K] floating point.
        peers: at least one, [P, B, K] or P tensors [B, K]; detached.
        temperature: T > 0.
        reduction: over samples: "mean", "sum" or "none".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        0-d, or [B] for "none"; float32 for half-precision logits.

    Raises:
        InputError, TypeError: no peer, logits of different shape or device or of wrong dtype, T <= 0.
    """
    peers = list(peers)
    if not peers:
        raise InputError("peers must hold at least one peer's logits")
    _check_rows({"prediction": prediction, **{f"peers[{j}]": peer for j, peer in enumerate(peers)}}, temperature)
    _numerics.check_reduction(reduction)
    prediction, *peers = _of_one_dtype([prediction, *peers])
    if _dispatch.resolve("peer_kl_ce", backend, prediction) == "reference":
        return _numerics.reduce(reference.peer_kl(prediction, peers, temperature), reduction)
    options = Options(float(temperature), tuple(range(1, len(peers) + 1)), (len(peers),), (), 0.0, 0.0, reduction)
    return PeerKlFunction.apply(options, prediction, *[peer.detach() for peer in peers])


def _of_one_dtype(rows: list[Tensor]) -> list[Tensor]:
    """Rows of mixed dtype in the one that holds them all: the pointers of a kernel's table have one type."""
    common = functools.reduce(torch.promote_types, [row.dtype for row in rows])
    return [row.to(common) for row in rows]


def _teacher(head: int, teacher: int, heads: int) -> int:
    if teacher == ENSEMBLE:
        return heads
    if teacher == head or not 0 <= teacher < heads:
        raise InputError(
            f"head {head} cannot learn from head {teacher}: teachers are other heads 0..{heads - 1} or ENSEMBLE"
        )
    return teacher


def _edge_weights(weights: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Weights of all edges, [R, R + 1], as a view."""
    _numerics.check_floating("weights", weights, (0, 1, 2))
    _numerics.check_same_device("logits[0]", rows[0], weights=weights)
    shape = (len(rows), len(rows) + 1)
    if weights.requires_grad:
        raise InputError("weights get no gradient; give weights.detach()")
    if any(given not in (1, wanted) for given, wanted in zip(weights.shape[::-1], shape[::-1], strict=False)):
        raise InputError(
            f"weights must broadcast to {list(shape)}, heads by teachers and ENSEMBLE last, not {list(weights.shape)}"
        )
    return weights.expand(shape)


def _check(rows: list[Tensor], labels: Tensor, temperature: float) -> None:
    if not rows:
        raise InputError("logits must hold at least one head")
    _check_rows({f"logits[{i}]": row for i, row in enumerate(rows)}, temperature)
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        given = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of int64 class indices, not {given}; use labels.long()")
    _numerics.check_same_device("logits[0]", rows[0], labels=labels)
    if labels.shape != rows[0].shape[:1]:
        raise InputError(
            f"labels must have shape [{rows[0].shape[0]}] like the batch of the logits, not {list(labels.shape)}"
        )


def _check_rows(rows: Mapping[str, Tensor], temperature: float) -> None:
    first_name, first = next(iter(rows.items()))
    for name, row in rows.items():
        _numerics.check_floating(name, row, (2,))
        _numerics.check_same_device(first_name, first, **{name: row})
        if row.shape != first.shape:
            raise InputError(f"{name} {list(row.shape)} must have the shape of {first_name} {list(first.shape)}")
    if not temperature > 0:
        raise InputError(f"temperature must be positive, not {temperature}")
