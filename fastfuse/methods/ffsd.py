"""FFSD: common students and a leader.

Li et al., "Distilling a Powerful Student Model via Online Knowledge Distillation", arXiv 2103.14473.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastfuse.losses import FusionLoss, ParameterGroups, ffsd
from fastfuse.methods.base import Method, MethodOutput, network_group


class FFSD(Method):
    """S common students, their fusion head, and a leader that learns from the fused map; the leader is deployed.

    Args:
        make_network: gives a freshly initialised network each time.
        students: S, at least 2.
        num_classes: K.
        hyperparameters: of `FusionLoss(method="ffsd")`.
    """

    name = "ffsd"
    minimum_students = 2
    deployed = "leader"
    defaults = ffsd.DEFAULTS

    def __init__(
        self, make_network: Callable[[], nn.Module], students: int, num_classes: int, **hyperparameters: Any
    ) -> None:
        super().__init__()
        self.common_students = nn.ModuleList(make_network() for _ in range(students))
        self.leader = make_network()
        channels = self.leader.feature_channels
        self.criterion = FusionLoss(
            [channels] * students, num_classes, method="ffsd", leader_channels=channels, **hyperparameters
        )

    def forward(self, images: Tensor, labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.forward`."""
        leader = self.leader(images)
        students = [student(images) for student in self.common_students]
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

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """See `Method.predict`."""
        students = [student(images) for student in self.common_students]
        logits = {name: s.logits for name, s in zip(self.students(), students, strict=True)}
        logits["fusion"] = self.criterion.fusion([s.features[-1] for s in students]).logits
        logits["leader"] = self.leader(images).logits
        return logits

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        return {
            **dict(zip(self.students(), self.common_students, strict=True)),
            "leader": self.leader,
            "fusion": self.criterion.fusion,
        }

    def students(self) -> list[str]:
        """See `Method.students`."""
        return [f"student{i}" for i in range(len(self.common_students))]

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        own = self.criterion.parameter_groups(**settings)
        networks = [*self.common_students.parameters(), *self.leader.parameters()]
        return ParameterGroups([network_group(networks, **settings), *own.sgd], own.adam)

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.leader.state_dict()
