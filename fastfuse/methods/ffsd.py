"""FFSD: common students and a leader.

Li et al., "Distilling a Powerful Student Model via Online Knowledge Distillation", arXiv 2103.14473.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.losses import FusionLoss, ParameterGroups, ffsd
from fastfuse.methods.base import Method, MethodOutput, network_group
from fastfuse.nn import Networks


class FFSD(Method):
    """S common students, their fusion head, and a leader that learns from the fused map; the leader is deployed.

    Args:
        make_network: gives a freshly initialised network each time.
        students: S, at least 2.
        num_classes: K.
        hyperparameters: of `FusionLoss(method="ffsd")`.

    Attributes:
        peers: the students, and the leader as the last one.
    """

    name = "ffsd"
    minimum_students = 2
    deployed = "leader"
    defaults = ffsd.DEFAULTS

    def __init__(
        self, make_network: Callable[[], nn.Module], students: int, num_classes: int, **hyperparameters: Any
    ) -> None:
        super().__init__()
        self.peers = Networks(make_network() for _ in range(students + 1))
        channels = self.peers[-1].feature_channels
        self.criterion = FusionLoss(
            [channels] * students, num_classes, method="ffsd", leader_channels=channels, **hyperparameters
        )

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`; the leader's come last."""
        return self.peers(images)

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`."""
        *students, leader = outputs
        output = self.criterion(
            [student.features for student in students],
            [student.logits for student in students],
            labels,
            leader_features=leader.features,
            leader_logits=leader.logits,
            progress=progress,
        )
        logits = {name: s.logits.detach() for name, s in zip(self.students(), students, strict=True)}
        logits |= {"fusion": output.fused_logits, "leader": leader.logits.detach()}
        return MethodOutput(output.loss, logits, output.terms)

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`."""
        *students, leader = outputs
        logits = {name: s.logits for name, s in zip(self.students(), students, strict=True)}
        logits["fusion"] = self.criterion.fusion([s.features[-1] for s in students]).logits
        return logits | {"leader": leader.logits}

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        names = [*self.students(), "leader"]
        return dict(zip(names, self.peers, strict=True)) | {"fusion": self.criterion.fusion}

    def students(self) -> list[str]:
        """See `Method.students`."""
        return [f"student{i}" for i in range(len(self.peers) - 1)]

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        own = self.criterion.parameter_groups(**settings)
        return ParameterGroups([network_group(list(self.peers.parameters()), **settings), *own.sgd], own.adam)

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.peers.state_of(-1)
