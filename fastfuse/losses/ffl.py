"""The losses of FFL (Kim et al., arXiv 1904.09058), as the published program computes them."""

from typing import TYPE_CHECKING

from torch import Tensor

from fastfuse import functional
from fastfuse.losses.ramps import sigmoid_rampup
from fastfuse.losses.weighing import Weighed, Weights, weighed

if TYPE_CHECKING:
    from fastfuse.losses._checks import Batch
    from fastfuse.losses.fusion_loss import FusionLoss

DEFAULTS = {"temperature": 3.0, "rampup_epochs": 80, "kl_target_epsilon": 0.0}


def ramp(progress: float | Tensor, rampup_epochs: float) -> float | Tensor:
    """The consistency weight of all KL terms; the published program counts its epochs from 0."""
    return sigmoid_rampup(progress, rampup_epochs)


def weights_of(loss: "FusionLoss") -> Weights:
    """Of every value of `terms`, in its order."""
    heads = len(loss.feature_channels) + 1
    plain, none = [1.0] * heads, [0.0] * heads
    return Weights([*plain, *none], [*none, *plain])


def terms(loss: "FusionLoss", batch: "Batch", weight: float | Tensor) -> tuple[Weighed, list[Tensor], Tensor]:
    """The weighted sum of all losses, the logits of each fusion head and the detached fused map.

    The fused head's losses reach the sub-networks: the fusion input is not detached, unlike FFSD's.
    """
    count = len(batch.features)
    fused = loss.fusion([maps[-1] for maps in batch.features])
    cross_entropy, divergence, _ = functional.peer_kl_ce(
        [*batch.logits, fused.logits],
        batch.labels,
        temperature=loss.hyperparameters["temperature"],
        teachers=[[count]] * count + [[functional.ENSEMBLE]],
        ensemble=range(count),
        target_epsilon=loss.hyperparameters["kl_target_epsilon"],
    )
    heads = [*(f"student{i}" for i in range(count)), "fusion"]
    names = [f"{name}_{kind}" for kind in ("ce", "kl") for name in heads]
    found = weighed([cross_entropy, divergence], loss.weights.at(weight), names)
    return found, [fused.logits], fused.fused.detach()
