"""The losses of FFCL (Li et al., doi 10.1177/15501477211057037), inferred: see docs/methods/ffcl.md.

What is known from the abstract: a teacher and a student that learn together, concatenated features, transfer of
features and of responses, a regularisation that gives positive knowledge.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastfuse import functional
from fastfuse.losses.ramps import sigmoid_rampup

if TYPE_CHECKING:
    from fastfuse.losses._checks import Batch
    from fastfuse.losses.fusion_loss import FusionLoss

DEFAULTS = {
    "temperature": 3.0,
    "rampup_epochs": 80,
    "response_weight": 1.0,
    "peer_weight": 1.0,
    "attention_weight": 10.0,
    "regularization": "virtual",
    "regularization_weight": 0.1,
    "regularization_temperature": 20.0,
    "detach_fusion": False,
}
REGULARIZATIONS = ("virtual", "published", "off")

# Of Tf-KD (arXiv 1909.11723): how sure the virtual teacher is, and the multiplier of its program.
_CERTAINTY = 0.99
_MULTIPLIER = 100.0


def ramp(progress: float | Tensor, rampup_epochs: float) -> float | Tensor:
    """The weight of all transfer, as in FFL."""
    return sigmoid_rampup(progress, rampup_epochs)


def terms(loss: "FusionLoss", batch: "Batch", weight: float | Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """All terms as they enter the sum, the fused logits and the detached fused map.

    Args:
        loss: holds the fusion head and the hyper-parameters.
        batch: checked; every peer is one of its students.
        weight: the ramp's factor.
    """
    hyper = loss.hyperparameters
    peers = range(len(batch.features))
    count = len(peers)
    maps = [stages[-1] for stages in batch.features]
    fused = loss.fusion([m.detach() for m in maps] if hyper["detach_fusion"] else maps)
    # Every peer is there twice, so that one call gives what it learns from the fused head and what from its peers.
    learns_from = [[count]] * count + [[functional.ENSEMBLE]] + [[j for j in peers if j != i] for i in peers]
    cross_entropy, divergence, _ = functional.peer_kl_ce(
        [*batch.logits, fused.logits, *batch.logits],
        batch.labels,
        temperature=hyper["temperature"],
        teachers=learns_from,
        ensemble=peers,
    )
    regularized = hyper["regularization"] != "off"
    share = hyper["regularization_weight"] if regularized else 0.0
    distances = functional.attention_mse(maps, [fused.fused.detach()] * count)
    found = {}
    for i in peers:
        found[f"student{i}_ce"] = (1 - share) * cross_entropy[i]
        found[f"student{i}_response"] = hyper["response_weight"] * weight * divergence[i]
        found[f"student{i}_peers"] = hyper["peer_weight"] * weight * divergence[count + 1 + i]
        found[f"student{i}_feature"] = hyper["attention_weight"] * weight * distances[i]
    if regularized:
        temperature = hyper["regularization_temperature"]
        positive = positive_knowledge(batch.logits, batch.labels, temperature, hyper["regularization"])
        found |= {f"student{i}_regularization": share * positive[i] for i in peers}
    found["fusion_ce"] = cross_entropy[count]
    found["fusion_kl"] = weight * divergence[count]
    return found, fused.logits, fused.fused.detach()


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
        normaliser = torch.log1p(torch.expm1(centred).mean(-1))
    return scale * ((entropy + math.log(classes)) - (above * centred).sum(-1) + normaliser).mean(-1)
