"""The public drop-in losses."""

from fastfuse.losses.distances import AttentionLoss, NormalizedLpLoss, PeerDistillationLoss
from fastfuse.losses.fusion_loss import FusionLoss, FusionLossOutput, ParameterGroups

__all__ = [
    "AttentionLoss",
    "FusionLoss",
    "FusionLossOutput",
    "NormalizedLpLoss",
    "ParameterGroups",
    "PeerDistillationLoss",
]
