"""The losses of FFSD (Li et al., arXiv 2103.14473), in the paper's order, as the published program computes them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastfuse import functional
from fastfuse.losses.ramps import sigmoid_rampup

if TYPE_CHECKING:
    from fastfuse.losses._checks import Batch
    from fastfuse.losses.fusion_loss import FusionLoss

DEFAULTS = {
    "temperature": 2.0,
    "rampup_epochs": 5,
    "lambda_diversity": 1e-5,
    "lambda_fusion": 10.0,
    "lambda_self_distillation": 1000.0,
    "diversity_mode": "published",
}
DIVERSITY_MODES = ("published", "normalized")


def ramp(progress: float | Tensor, rampup_epochs: float) -> float | Tensor:
    """Warm-up of all three lambdas; the published program counts its epochs from 1."""
    return sigmoid_rampup(progress + 1, rampup_epochs)


def terms(loss: "FusionLoss", batch: "Batch", weight: float | Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """All terms as they enter the sum, the fused logits and the detached fused map.

    Args:
        loss: holds the modules and hyper-parameters.
        batch: checked features, logits and labels.
        weight: the warm-up factor of the lambdas.
    """
    hyper = loss.hyperparameters
    students = batch.features
    count = len(students)
    last = [maps[-1].detach() for maps in students]
    fused = loss.fusion(last)
    fused_map, fused_attention = fused.fused.detach(), fused.attention.detach()

    # Temperature KL and cross-entropy of all heads: peers, fused head from the ensemble, leader from the fused head.
    heads = [*batch.logits, fused.logits]
    teachers = [[j for j in range(count) if j != i] for i in range(count)] + [[functional.ENSEMBLE]]
    if batch.leader_logits is not None:
        heads.append(batch.leader_logits)
        teachers.append([count])
    cross_entropy, divergence = functional.peer_kl_ce(
        heads, batch.labels, temperature=hyper["temperature"], teachers=teachers, ensemble=range(count)
    )

    # Every target of a transform is made (running statistics) before any transform trains (batch statistics).
    found: dict[str, Tensor] = {}
    pairs = _AttentionPairs()
    diversity_weight = hyper["lambda_diversity"] * weight
    fusion_weight = hyper["lambda_fusion"] * weight
    for i in range(count):
        found[f"student{i}_ce"] = cross_entropy[i]
        found[f"student{i}_dml"] = divergence[i]
        if i == 0:
            continue
        distance = functional.diversity_loss(students[i][-1], last[i - 1], mode=hyper["diversity_mode"])
        found[f"student{i}_diversity"] = diversity_weight * distance
        if loss.transforms:
            shifted = functional.diversity_target(last[i - 1], mode=hyper["diversity_mode"])
            # Published: the weight is that of diversity, not one of its own.
            targets = _targets(loss, f"student{i}", shifted, students[i])
            pairs.add(f"student{i}_self_distillation", diversity_weight, students[i][:-1], targets)
    found["fusion_ce"] = cross_entropy[count]
    found["fusion_kl"] = divergence[count]
    if batch.leader_logits is not None:
        leader = batch.leader_features
        found["leader_ce"] = cross_entropy[count + 1]
        found["leader_kl"] = divergence[count + 1]
        pairs.add("leader_fusion", fusion_weight, [leader[-1]], [fused_attention])
        widened = loss.trans_fusion([leader[-1]])
        pairs.add("leader_trans_fusion", fusion_weight, [widened], [functional.attention_map(last)])
        if loss.transforms:
            targets = _targets(loss, "leader", fused_map, leader)
            pairs.add("leader_self_distillation", fusion_weight, leader[:-1], targets)
    found |= pairs.terms()
    if loss.transforms:
        found |= _transform_terms(loss, batch, hyper["lambda_self_distillation"] * weight)
    return found, fused.logits, fused_map


class _AttentionPairs:
    """Collects the attention distances of a step, so that one operator call computes them all."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.spans: list[tuple[str, float | Tensor, int]] = []

    def add(self, name: str, weight: float | Tensor, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        self.spans.append((name, weight, len(inputs)))
        self.inputs += inputs
        self.targets += targets

    def terms(self) -> dict[str, Tensor]:
        if not self.inputs:
            return {}
        parts = functional.attention_mse(self.inputs, self.targets).split([length for _, _, length in self.spans])
        return {name: weight * part.sum() for (name, weight, _), part in zip(self.spans, parts, strict=True)}


def _sizes(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(m.shape[2], m.shape[3]) for m in maps[:-1]]


def _targets(loss: "FusionLoss", name: str, deep: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        made = loss.transforms[name](deep, sizes=_sizes(maps), training=False)
        return [functional.attention_map(m) for m in made]


def _transform_terms(loss: "FusionLoss", batch: "Batch", weight: float | Tensor) -> dict[str, Tensor]:
    """Training of the transforms: each learns its own network's deep-to-shallow mapping from detached maps."""
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    names: list[str] = []
    for name, transform in loss.transforms.items():
        source = loss.transform_sources[name]
        maps = batch.leader_features if source == "leader" else batch.features[source]
        maps = [m.detach() for m in maps]
        names.append("transform_leader" if name == "leader" else name.replace("student", "transform"))
        inputs += transform(maps[-1], sizes=_sizes(maps))
        targets += maps[:-1]
    stages = len(inputs) // len(names)
    feature = functional.normalized_lp(inputs, targets, p=2).view(-1, stages).sum(1)
    attention = functional.attention_mse(inputs, targets).view(-1, stages).sum(1)
    found = {}
    for k, name in enumerate(names):
        found[f"{name}_feature"] = weight * feature[k]
        found[f"{name}_attention"] = weight * attention[k]
    return found
