"""FFL: sub-networks on a shared trunk and their fusion head.

Kim et al., "Feature Fusion for Online Mutual Knowledge Distillation", arXiv 1904.09058.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.losses import FusionLoss, ParameterGroups, ffl
from fastfuse.methods.base import Method, MethodOutput, network_group
from fastfuse.models.cifar_resnet import BranchedCifarResNet


class FFL(Method):
    """A trunk with S branches whose fused map teaches them and learns from their ensemble; sub-network 0 is deployed.

    Args:
        make_network: gives a trunk with the wanted number of branches.
        students: S, at least 2 (published: 2).
        num_classes: K.
        hyperparameters: of `FusionLoss(method="ffl")`.
    """

    name = "ffl"
    minimum_students = 2
    deployed = "student0"
    defaults = ffl.DEFAULTS
    loop_only = "its sub-networks are branches on a trunk that they share, not networks of their own"

    def __init__(
        self, make_network: Callable[[], BranchedCifarResNet], students: int, num_classes: int, **hyperparameters: Any
    ) -> None:
        super().__init__()
        self.network = make_network()
        last = self.network.feature_channels[-1]
        self.criterion = FusionLoss([last] * students, num_classes, method="ffl", **hyperparameters)

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`."""
        return self.network(images)

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
        logits["fusion"] = self.criterion.fusion([s.features[-1] for s in outputs]).logits
        return logits

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        return {"network": self.network, "fusion": self.criterion.fusion}

    def students(self) -> list[str]:
        """See `Method.students`."""
        return [f"student{i}" for i in range(len(self.network.branches))]

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        own = self.criterion.parameter_groups(**settings)
        return ParameterGroups([network_group(list(self.network.parameters()), **settings), *own.sgd], own.adam)

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.network.plain_state_dict(0)
