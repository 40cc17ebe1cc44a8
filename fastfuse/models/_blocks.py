"""What the networks share: their output type, initialisation and pooling."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class NetworkOutput(NamedTuple):
    """What every network returns.

    Attributes:
        logits: [B, K] class scores before the softmax.
        features: one map [B, C_l, H_l, W_l] per tapped stage, shallow to deep.
    """

    logits: Tensor
    features: tuple[Tensor, ...]


def initialise(module: nn.Module) -> None:
    """Convolutions N(0, sqrt(2 / (kh kw C_out))), batch norm weight 1 and bias 0, linear layers as PyTorch does.

    Source: the published FFSD and FFL networks.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def pooled(feature: Tensor) -> Tensor:
    """Mean over the whole map: [B, C, H, W] to [B, C]."""
    return torch.flatten(nn.functional.adaptive_avg_pool2d(feature, 1), 1)
