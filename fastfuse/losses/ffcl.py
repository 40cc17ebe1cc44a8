"""The losses of FFCL (Li et al., doi 10.1177/15501477211057037), inferred: see docs/methods/ffcl.md.

What is known from the abstract: a teacher and a student that learn together, concatenated features, transfer of
features and of responses, a regularisation that gives positive knowledge.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastfuse import functional
from fastfuse.losses.ramps import sigmoid_rampup
from fastfuse.losses.weighing import Weighed, Weights, summed
from fastfuse.nn.fusion import fuse_all

if TYPE_CHECKING:
    from fastfuse.losses._checks import Batch
    from fastfuse.losses.fusion_loss import FusionLoss

DEFAULTS = {
    "temperature": 3.0,
    "rampup_epochs": 80,
    "response_weight": 1.0,
    "peer_weight": 1.0,
    "fused_stages": 1,
    "feature_distance": "attention",
    "attention_weight": 10.0,
    "regularization": "virtual",
    "regularization_weight": 0.1,
    "regularization_temperature": 20.0,
    "detach_fusion": False,
}
REGULARIZATIONS = ("virtual", "published", "self", "off")

# Of Tf-KD (arXiv 1909.11723): how sure the virtual teacher is, and the multiplier of its program.
_CERTAINTY = 0.99
_MULTIPLIER = 100.0
# From here on exp is not left to itself: it is infinite in float32 above 88.
_LARGE = 60.0


def ramp(progress: float | Tensor, rampup_epochs: float) -> float | Tensor:
    """The weight of all transfer, as in FFL."""
    return sigmoid_rampup(progress, rampup_epochs)


def weights_of(loss: "FusionLoss") -> Weights:
    """None: terms are weighed one by one."""
    return Weights([], [])


def terms(loss: "FusionLoss", batch: "Batch", weight: float | Tensor) -> tuple[Weighed, list[Tensor], Tensor]:
    """The weighted sum of all losses, the logits of each fusion head and the detached fused map of the last stage.

    Args:
        loss: holds the fusion heads and the hyper-parameters.
        batch: checked; every peer is one of its students.
        weight: the ramp's factor.
    """
    hyper = loss.hyperparameters
    peers = range(len(batch.features))
    count = len(peers)
    maps = [[own[-depth] for own in batch.features] for depth in range(1, loss.fused_stages + 1)]
    heads = loss.fusions()
    given = [[m.detach() for m in own] for own in maps] if hyper["detach_fusion"] else maps
    fused, *shallower = fuse_all([*heads.values()], given)
    # Every peer is there twice, so that one call gives what it learns from the fused head and what from its peers.
    learns_from = [[count]] * count + [[functional.ENSEMBLE]] + [[j for j in peers if j != i] for i in peers]
    learns_from += [[functional.ENSEMBLE]] * len(shallower)
    cross_entropy, divergence, _ = functional.peer_kl_ce(
        [*batch.logits, fused.logits, *batch.logits, *(own.logits for own in shallower)],
        batch.labels,
        temperature=hyper["temperature"],
        teachers=learns_from,
        ensemble=peers,
    )
    cross_entropies, divergences = cross_entropy.unbind(0), divergence.unbind(0)
    regularized = hyper["regularization"] != "off"
    share = hyper["regularization_weight"] if regularized else 0.0
    distances = _distances(loss, maps, [own.fused.detach() for own in (fused, *shallower)])
    found = {}
    for i in peers:
        found[f"student{i}_ce"] = (1 - share) * cross_entropies[i]
        found[f"student{i}_response"] = hyper["response_weight"] * weight * divergences[i]
        found[f"student{i}_peers"] = hyper["peer_weight"] * weight * divergences[count + 1 + i]
        for depth in range(loss.fused_stages):
            name = f"student{i}_feature{depth + 1 if depth else ''}"
            found[name] = hyper["attention_weight"] * weight * distances[depth * count + i]
    if regularized:
        found |= {f"student{i}_regularization": share * own for i, own in enumerate(_regularization(hyper, batch))}
    for name, row in zip(heads, [count, *range(2 * count + 1, len(learns_from))], strict=True):
        found[f"{name}_ce"] = cross_entropies[row]
        found[f"{name}_kl"] = weight * divergences[row]
    return summed(found), [own.logits for own in (fused, *shallower)], fused.fused.detach()


def _distances(loss: "FusionLoss", maps: list[list[Tensor]], fused: list[Tensor]) -> Sequence[Tensor]:
    """How far every peer's map of a stage is from the fused one; of all peers of the first stage first."""
    kind = loss.hyperparameters["feature_distance"]
    pairs = [(m, target) for own, target in zip(maps, fused, strict=True) for m in own]
    if kind == "attention":
        return functional.attention_mse(*map(list, zip(*pairs, strict=True))).unbind(0)
    connected = [m for depth, own in enumerate(maps, start=1) for m in loss.connected(own, depth)]
    if kind == "mse":
        return [functional.feature_mse([m], target) for m, (_, target) in zip(connected, pairs, strict=True)]
    temperature = loss.feature_temperature
    return [
        functional.feature_kl([m], target, temperature=temperature)
        for m, (_, target) in zip(connected, pairs, strict=True)
    ]


def _regularization(hyper: Mapping[str, Any], batch: "Batch") -> Tensor:
    """Of every peer; [peers]."""
    temperature = hyper["regularization_temperature"]
    if batch.copy_logits is not None:
        return own_knowledge(batch.logits, batch.copy_logits, temperature)
    return positive_knowledge(batch.logits, batch.labels, temperature, hyper["regularization"])


def own_knowledge(logits: list[Tensor], copies: list[Tensor], temperature: float) -> Tensor:
    """T^2 KL(softmax(c / T) || softmax(z / T)), c the logits of the head's own trained copy, for each head; [heads].

    The idea of Tf-KD's self-training, and the self-distillation of CTSL-MKT (arXiv 2101.08471) but for the factor T^2,
    which is that of `positive_knowledge`: gradients keep their size whatever T is.

    Args:
        logits: z of each head, [B, K].
        copies: c of each; carry no gradient.
        temperature: T.
    """
    given, own = torch.stack(list(copies)).detach(), torch.stack(list(logits))
    exact = torch.promote_types(own.dtype, torch.float32)
    targets = given.to(exact) / temperature
    # T^2 multiplies the rounding of log-probabilities: of their differences, which are small, there is less.
    lead = targets - own.to(exact) / temperature
    probabilities = torch.softmax(targets, -1)
    behind = (probabilities * lead).sum(-1, keepdim=True) - lead
    near = torch.log1p((probabilities * torch.expm1(behind.clamp_max(_LARGE))).sum(-1))
    far = torch.logsumexp(torch.log_softmax(targets, -1) + behind, -1)
    return temperature**2 * torch.where(behind.amax(-1) <= _LARGE, near, far).mean(-1)


def positive_knowledge(logits: list[Tensor], labels: Tensor, temperature: float, form: str) -> Tensor:
    """KL from a virtual teacher that is right with probability 0.99, for each head; [heads].

    "virtual": T^2 KL(softmax(log u / T) || softmax(z / T)), u the teacher's probabilities: equation 9 of Tf-KD.
    "published": 100 / K KL(softmax(u / T) || softmax(z)), what the program of Tf-KD computes.
    """
    classes = logits[0].shape[1]
    right, wrong = _CERTAINTY, (1 - _CERTAINTY) / max(classes - 1, 1)
    if form == "published":
        scores, temperature, scale = (right / temperature, wrong / temperature), 1.0, _MULTIPLIER / classes
    else:
        scores = (math.log(right) / temperature, math.log(wrong) / temperature)
        scale = temperature**2
    partition = math.exp(scores[0]) + (classes - 1) * math.exp(scores[1])
    high, low = (math.exp(score) / partition for score in scores)
    entropy = high * (scores[0] - math.log(partition)) + (classes - 1) * low * (scores[1] - math.log(partition))
    stacked = torch.stack(list(logits))
    rows = stacked.to(torch.promote_types(stacked.dtype, torch.float32)) / temperature
    # T^2 = 400 multiplies the rounding of log-probabilities, which are all near -log K: only what differs from that is
    # computed, the rest in Python's numbers. float64 instead is wrong under torch.compile on a CPU in PyTorch 2.11.
    centred = rows - rows.mean(-1, keepdim=True)
    above = torch.full_like(centred[0], low - 1 / classes).scatter(1, labels[:, None], high - 1 / classes)
    if form == "published":
        normaliser = torch.logsumexp(centred, -1) - math.log(classes)
    else:
        beyond = (centred.detach().amax(-1, keepdim=True) - _LARGE).clamp_min(0)
        normaliser = beyond.squeeze(-1) + torch.log1p(torch.expm1(centred - beyond).mean(-1))
    return scale * ((entropy + math.log(classes)) - (above * centred).sum(-1) + normaliser).mean(-1)
