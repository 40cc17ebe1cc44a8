"""What a step changes besides weights and optimizers: running statistics, put back where it is left out."""

from collections import defaultdict

import torch
from torch import Tensor, nn


class Buffers:
    """All buffers of a module as they are now.

    Args:
        module: whose buffers stay at their addresses.
    """

    def __init__(self, module: nn.Module) -> None:
        groups: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in module.buffers():
            groups[buffer.dtype].append(buffer)
        # Joined, so that it is a handful of launches however many norms there are.
        self._kept = [(own, _joined(own)) for own in groups.values()]

    @torch.no_grad()
    def put_back(self, where: Tensor) -> None:
        """Make them again what they were, if `where`, 0-d on their device, is above 0; the host does not wait."""
        for buffers, before in self._kept:
            chosen = torch.where(where > 0, before, _joined(buffers)).split([x.numel() for x in buffers])
            torch._foreach_copy_(buffers, [x.view(buffer.shape) for x, buffer in zip(chosen, buffers, strict=True)])


def _joined(buffers: list[Tensor]) -> Tensor:
    return torch.cat([x.detach().flatten() for x in buffers])
