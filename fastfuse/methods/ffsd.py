"""FFSD: common students and a leader.

Li et al., "Distilling a Powerful Student Model via Online Knowledge Distillation", arXiv 2103.14473.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.losses import FusionLoss, ffsd
from fastfuse.methods.base import MethodOutput
from fastfuse.methods.fusing import Fusing
from fastfuse.models.sizes import last_map_sizes
from fastfuse.nn import Networks


class FFSD(Fusing):
    """S common students, their fusion head, and a leader that learns from the fused map; the leader is deployed.

    Args:
        make_networks: each gives a freshly initialised common student, at least two; they may differ in architecture.
        num_classes: K.
        leader: gives the leader; None: one like the first student.
        image_size: see `FFL`.
        hyperparameters: of `FusionLoss(method="ffsd")`.
    """

    name = "ffsd"
    minimum_students = 2
    deployed = "leader"
    extra_network = "leader"
    defaults = ffsd.DEFAULTS

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        leader: Callable[[], nn.Module] | None = None,
        image_size: int | tuple[int, int] | None = None,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        self.peers = Networks(make() for make in (*make_networks, leader or make_networks[0]))
        tapped: list[Any] = list(self.peers)
        *students, leads = (network.feature_channels for network in tapped)
        sizes: dict[str, Any] = {}
        if image_size is not None:
            *own, its = last_map_sizes(self.peers, image_size)
            sizes = {"feature_sizes": own, "leader_size": its}
        self.criterion = FusionLoss(
            students, num_classes, method="ffsd", leader_channels=leads, **sizes, **hyperparameters
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
        maps = self.criterion.brought_together([s.features[-1] for s in students])
        logits["fusion"] = self.criterion.fusion(maps).logits
        return logits | {"leader": leader.logits}

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.peers.state_of(-1)
