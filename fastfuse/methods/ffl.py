"""FFL: sub-networks, on a shared trunk or apart, and their fusion head.

Kim et al., "Feature Fusion for Online Mutual Knowledge Distillation", arXiv 1904.09058.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.errors import InputError, unknown_name
from fastfuse.losses import FusionLoss, ParameterGroups, ffl
from fastfuse.methods.base import Method, MethodOutput, check_students, network_group
from fastfuse.methods.branching import Branched
from fastfuse.models._blocks import last_channels
from fastfuse.models.sizes import last_map_sizes
from fastfuse.nn import Networks

SHARING = ("shared", "separate")


class FFL(Method):
    """S sub-networks whose fused map teaches them and learns from their ensemble; sub-network 0 is deployed.

    Args:
        make_networks: each gives a freshly initialised network, at least two; of one architecture where they share a
            trunk, of any where they are separate.
        num_classes: K.
        sharing: "shared", branches on one trunk (FFL-S, the published program), or "separate" networks.
        branch_stage: number of stages in the trunk; None is all but the last, as published.
        image_size: (height, width), or one number for both, of the images. Given, the sizes of separate networks' last
            maps are found, and where they differ a learned regressor brings them together; None takes them as equal.
        hyperparameters: of `FusionLoss(method="ffl")`.

    Attributes:
        peers: the networks; if shared, a trunk with branches.
    """

    name = "ffl"
    minimum_students = 2
    deployed = "student0"
    takes_image_size = True
    defaults = {**ffl.DEFAULTS, "sharing": "shared", "branch_stage": None}  # noqa: RUF012 - a ClassVar in Method

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        sharing: str = "shared",
        branch_stage: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        check_students(type(self), len(make_networks))
        if sharing not in SHARING:
            raise unknown_name("--sharing", sharing, SHARING)
        if sharing == "separate" and branch_stage is not None:
            raise InputError("--branch-stage is where a shared trunk ends: leave it out with --sharing separate")
        networks = [make() for make in make_networks]
        channels = [last_channels(network) for network in networks]
        sizes = None
        if sharing == "separate" and image_size is not None:
            sizes = last_map_sizes(networks, image_size)
        self.peers = Branched(networks, stage=branch_stage) if sharing == "shared" else Networks(networks)
        self.sharing = sharing
        self.criterion = FusionLoss(channels, num_classes, method="ffl", feature_sizes=sizes, **hyperparameters)

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`."""
        return self.peers(images)

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`."""
        output = self.criterion(
            [s.features[-1] for s in outputs], [s.logits for s in outputs], labels, progress=progress
        )
        logits = {name: s.logits.detach() for name, s in zip(self.students(), outputs, strict=True)}
        return MethodOutput(output.loss, logits | {"fusion": output.fused_logits}, output.terms)

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`."""
        logits = {name: s.logits for name, s in zip(self.students(), outputs, strict=True)}
        maps = self.criterion.brought_together([s.features[-1] for s in outputs])
        return logits | {"fusion": self.criterion.fusion(maps).logits}

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        shared = self.sharing == "shared"
        own = {"network": self.peers} if shared else dict(zip(self.students(), self.peers, strict=True))
        return own | {"fusion": self.criterion.fusion}

    def students(self) -> list[str]:
        """See `Method.students`."""
        return [f"student{i}" for i in range(len(self.criterion.feature_channels))]

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        own = self.criterion.parameter_groups(**settings)
        return ParameterGroups([network_group(list(self.peers.parameters()), **settings), *own.sgd], own.adam)

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.peers.state_of(0)
