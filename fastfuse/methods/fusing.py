"""What FFSD and FFCL share: students and one more network beside them, and the loss that fuses their maps."""

from typing import Any

from torch import nn

from fastfuse.losses import FusionLoss, ParameterGroups
from fastfuse.methods.base import Method, network_group
from fastfuse.nn import Networks


class Fusing(Method):
    """Students and the network that `extra_network` names, side by side.

    Attributes:
        peers: the students, and that network as the last one.
        criterion: the loss, with what it trains.
    """

    takes_image_size = True
    peers: Networks
    criterion: FusionLoss

    def students(self) -> list[str]:
        """See `Method.students`; the network beside them is none of them."""
        return [f"student{i}" for i in range(len(self.peers) - 1)]

    def names(self) -> list[str]:
        """The names of all peers, in order."""
        return [*self.students(), str(self.extra_network)]

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        return dict(zip(self.names(), self.peers, strict=True)) | self.criterion.fusions()

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        own = self.criterion.parameter_groups(**settings)
        return ParameterGroups([network_group(list(self.peers.parameters()), **settings), *own.sgd], own.adam)
