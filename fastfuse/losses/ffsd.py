"""The losses of FFSD (Li et al., arXiv 2103.14473), in the paper's order, as the published program computes them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastfuse import functional
from fastfuse.losses.ramps import sigmoid_rampup
from fastfuse.nn.fusion import fuse_and_mirror
from fastfuse.nn.transforms import transform_all

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


def terms(loss: "FusionLoss", batch: "Batch", weight: float | Tensor) -> tuple[dict[str, Tensor], list[Tensor], Tensor]:
    """All terms as they enter the sum, the logits of each fusion head and the detached fused map.

    Args:
        loss: holds the modules and hyper-parameters.
        batch: checked features, logits and labels.
        weight: the warm-up factor of the lambdas.
    """
    hyper = loss.hyperparameters
    students = batch.features
    count = len(students)
    own = [maps[-1].detach() for maps in students]
    last = loss.brought_together(own)
    leader: list[Tensor] = batch.leader_features or []
    if loss.trans_fusion is None or not leader:
        fused = loss.fusion(last)
    else:
        fused, widened = fuse_and_mirror(loss.fusion, last, loss.trans_fusion, [leader[-1]])
    fused_map, fused_attention = fused.fused.detach(), fused.attention.detach()

    # Temperature KL and cross-entropy of all heads: peers, fused head from the ensemble, leader from the fused head.
    heads = [*batch.logits, fused.logits]
    teachers = [[j for j in range(count) if j != i] for i in range(count)] + [[functional.ENSEMBLE]]
    if batch.leader_logits is not None:
        heads.append(batch.leader_logits)
        teachers.append([count])
    cross_entropy, divergence, _ = functional.peer_kl_ce(
        heads, batch.labels, temperature=hyper["temperature"], teachers=teachers, ensemble=range(count)
    )

    # Every target of a transform is made (running statistics) before any transform trains (batch statistics).
    found: dict[str, Tensor] = {}
    pairs = _AttentionPairs()
    diversity_weight = hyper["lambda_diversity"] * weight
    fusion_weight = hyper["lambda_fusion"] * weight
    compared = [maps[-1] for maps in students[1:]]
    references = [at_size(target, x) for target, x in zip(own[:-1], compared, strict=True)]
    distances, shifted = _diversity(loss, compared, references)
    distances = (diversity_weight * distances).unbind(0)
    targets = _targets(loss, batch, [*shifted, fused_map])
    for i in range(count):
        found[f"student{i}_ce"] = cross_entropy[i]
        found[f"student{i}_dml"] = divergence[i]
        if i == 0:
            continue
        found[f"student{i}_diversity"] = distances[i - 1]
        if loss.transforms:
            # Published: the weight is that of diversity, not one of its own.
            name = f"student{i}"
            pairs.add(f"{name}_self_distillation", diversity_weight, students[i][:-1], targets[name])
    found["fusion_ce"] = cross_entropy[count]
    found["fusion_kl"] = divergence[count]
    if batch.leader_logits is not None:
        found["leader_ce"] = cross_entropy[count + 1]
        found["leader_kl"] = divergence[count + 1]
        pairs.add("leader_fusion", fusion_weight, [leader[-1]], [fused_attention])
        joint = functional.attention_map([x.detach() for x in last])
        pairs.add("leader_trans_fusion", fusion_weight, [widened], [joint])
        if loss.transforms:
            pairs.add("leader_self_distillation", fusion_weight, leader[:-1], targets["leader"])
    found |= pairs.terms()
    if loss.transforms:
        found |= _transform_terms(loss, batch, hyper["lambda_self_distillation"] * weight)
    return found, [fused.logits], fused_map


def at_size(target: Tensor, like: Tensor) -> Tensor:
    """A detached map at another's height and width: itself, means over windows, or positions repeated."""
    if target.shape[2:] == like.shape[2:]:
        return target
    return nn.functional.adaptive_avg_pool2d(target, (like.shape[2], like.shape[3]))


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


def _diversity(loss: "FusionLoss", maps: list[Tensor], references: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Distances of students from the one before each, and that one's shifted maps where a transform wants them."""
    mode = loss.hyperparameters["diversity_mode"]
    if loss.transforms:
        found: Any = functional.diversity(maps, references, mode=mode)
        return found  # lists, as those given are
    return functional.diversity_loss(maps, references, mode=mode), []


def _sizes(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(m.shape[2], m.shape[3]) for m in maps[:-1]]


def _own_transforms(loss: "FusionLoss") -> Any:
    return list(loss.transforms.values())


def _targets(loss: "FusionLoss", batch: "Batch", deep: Sequence[Tensor]) -> dict[str, tuple[Tensor, ...]]:
    """Attention maps of what every transform makes of the deep map that is its own (the leader's comes last)."""
    if not loss.transforms:
        return {}
    networks = [*batch.features[1:], batch.leader_features or []][: len(loss.transforms)]
    transforms, sizes = _own_transforms(loss), [_sizes(maps) for maps in networks]
    made = transform_all(transforms, deep[: len(networks)], sizes=sizes, training=False, attention=True)
    return dict(zip(loss.transforms, made, strict=True))


def _transform_terms(loss: "FusionLoss", batch: "Batch", weight: float | Tensor) -> dict[str, Tensor]:
    """Training of the transforms: each learns its own network's deep-to-shallow mapping from detached maps."""
    sources = [loss.transform_sources[name] for name in loss.transforms]
    given = [batch.features[source] if isinstance(source, int) else batch.leader_features or [] for source in sources]
    networks = [[m.detach() for m in maps] for maps in given]
    made = transform_all(
        _own_transforms(loss), [maps[-1] for maps in networks], sizes=[_sizes(maps) for maps in networks]
    )
    inputs = [m for maps in made for m in maps]
    targets = [m for maps in networks for m in maps[:-1]]
    names = [
        "transform_leader" if name == "leader" else name.replace("student", "transform") for name in loss.transforms
    ]
    stages = len(inputs) // len(names)
    distances = functional.normalized_lp_joint(inputs, targets, p=2)
    feature, attention = (each.view(-1, stages).sum(1) for each in distances)
    found = {}
    for k, name in enumerate(names):
        found[f"{name}_feature"] = weight * feature[k]
        found[f"{name}_attention"] = weight * attention[k]
    return found
