"""The losses of FFSD (Li et al., arXiv 2103.14473), in the paper's order, as the published program computes them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastfuse import functional
from fastfuse.losses.ramps import sigmoid_rampup
from fastfuse.losses.weighing import Weighed, Weights, weighed
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
    return sigmoid_rampup(progress, rampup_epochs, first=1)


def weights_of(loss: "FusionLoss") -> Weights:
    """Of every value of `terms`, in its order."""
    hyper = loss.hyperparameters
    students, leader = len(loss.feature_channels), loss.leader_channels is not None
    stages = len(loss.feature_channels[0]) - 1 if loss.transforms else 0  # that transforms imitate
    plain = [1.0] * (2 * (students + 1 + leader))
    # Published: the weight of students' self-distillation is that of diversity, not one of its own.
    diversity = [hyper["lambda_diversity"]] * (students - 1)
    fusion = [hyper["lambda_fusion"]] * leader
    learning = [hyper["lambda_self_distillation"]] * (2 * len(loss.transforms) * stages)
    ramped = [*diversity, *fusion * 2, *diversity * stages, *fusion * stages, *learning]
    return Weights([*plain, *[0.0] * len(ramped)], [*[0.0] * len(plain), *ramped])


def terms(loss: "FusionLoss", batch: "Batch", weight: float | Tensor) -> tuple[Weighed, list[Tensor], Tensor]:
    """The weighted sum of all losses, the logits of each fusion head and the detached fused map.

    Args:
        loss: holds the modules and hyper-parameters.
        batch: checked features, logits and labels.
        weight: the warm-up factor of the lambdas.
    """
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
        heads,
        batch.labels,
        temperature=loss.hyperparameters["temperature"],
        teachers=teachers,
        ensemble=range(count),
    )

    # Every target of a transform is made (running statistics) before any transform trains (batch statistics).
    compared = [maps[-1] for maps in students[1:]]
    references = [at_size(target, x) for target, x in zip(own[:-1], compared, strict=True)]
    distances, shifted = _diversity(loss, compared, references)
    targets = _targets(loss, batch, [*shifted, fused_map])
    names = [f"student{i}" for i in range(count)]
    singles = [f"{name}_{kind}" for kind in ("ce", "dml") for name in names]
    singles[count:count] = ["fusion_ce", *(["leader_ce"] if leader else [])]
    singles += ["fusion_kl", *(["leader_kl"] if leader else []), *(f"{name}_diversity" for name in names[1:])]
    inputs, attention_targets = [], []
    if leader:
        singles += ["leader_fusion", "leader_trans_fusion"]
        joint = functional.attention_map([x.detach() for x in last])
        inputs, attention_targets = [leader[-1], widened], [fused_attention, joint]
    learners = dict(zip(loss.transforms, [*students[1:], leader], strict=False))
    inputs += [x for maps in learners.values() for x in maps[:-1]]
    attention_targets += [x for name in learners for x in targets[name]]
    values = [cross_entropy, divergence, distances]
    if inputs:
        values.append(functional.attention_mse(inputs, attention_targets))
    several = [f"{name}_self_distillation" for name in learners]
    if loss.transforms:
        values = [*values, *_transform_losses(loss, batch)]
        trained = [
            f"transform_{name}" if name == "leader" else name.replace("student", "transform") for name in learners
        ]
        several += [f"{name}_{kind}" for kind in ("feature", "attention") for name in trained]
    return weighed(values, loss.weights.at(weight), singles, several=several), [fused.logits], fused_map


def at_size(target: Tensor, like: Tensor) -> Tensor:
    """A detached map at another's height and width: itself, means over windows, or positions repeated."""
    if target.shape[2:] == like.shape[2:]:
        return target
    return nn.functional.adaptive_avg_pool2d(target, (like.shape[2], like.shape[3]))


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


def _transform_losses(loss: "FusionLoss", batch: "Batch") -> Sequence[Tensor]:
    """Training of the transforms: each learns its own network's deep-to-shallow mapping from detached maps.

    Returns:
        Feature and attention distances, those of all stages of a transform after each other.
    """
    sources = [loss.transform_sources[name] for name in loss.transforms]
    given = [batch.features[source] if isinstance(source, int) else batch.leader_features or [] for source in sources]
    networks = [[m.detach() for m in maps] for maps in given]
    made = transform_all(
        _own_transforms(loss), [maps[-1] for maps in networks], sizes=[_sizes(maps) for maps in networks]
    )
    inputs = [m for maps in made for m in maps]
    targets = [m for maps in networks for m in maps[:-1]]
    return functional.normalized_lp_joint(inputs, targets, p=2)
