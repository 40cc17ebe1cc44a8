"""ONE's gate."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Weighs the logits of branches by what their shared map shows: mean, linear, batch norm, ReLU, softmax.

    Source: Lan et al., arXiv 1806.04606, and its program; the linear layer starts as PyTorch does.

    Args:
        channels: C of the shared map.
        branches: number of branches.
    """

    def __init__(self, channels: int, branches: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, branches)
        self.norm = nn.BatchNorm1d(branches)

    def forward(self, shared: Tensor) -> Tensor:
        """[B, C, H, W] to weights [B, branches], each sample's with the sum 1."""
        return torch.softmax(torch.relu(self.norm(self.linear(shared.mean((2, 3))))), 1)


def gated(weights: Tensor, logits: Sequence[Tensor]) -> Tensor:
    """Weights [B, branches] and logits [B, K] of each branch to those of their ensemble, sum_i g_i z_i, [B, K]."""
    return (weights.unsqueeze(2) * torch.stack(list(logits), 1)).sum(1)
