"""FFCL: a teacher and students that learn together from their fused maps.

Li et al., International Journal of Distributed Sensor Networks 17(11), 2021, doi 10.1177/15501477211057037. The
equations are not public; what is inferred is said in docs/methods/ffcl.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.losses import FusionLoss, ParameterGroups, ffcl
from fastfuse.methods.base import Method, MethodOutput, check_students, network_group
from fastfuse.models._blocks import last_channels
from fastfuse.models.sizes import last_map_sizes
from fastfuse.nn import Networks


class FFCL(Method):
    """A student and a larger teacher, both untrained, that learn from their fused map and from each other.

    Args:
        make_networks: each gives a freshly initialised student, at least one; they may differ in architecture.
        num_classes: K.
        teacher: gives the teacher; None: one like the first student.
        image_size: see `FFL`.
        hyperparameters: of `FusionLoss(method="ffcl")`.

    Attributes:
        peers: the students, and the teacher as the last one.
    """

    name = "ffcl"
    minimum_students = 1
    default_students = 1
    deployed = "student0"
    takes_image_size = True
    extra_network = "teacher"
    defaults = ffcl.DEFAULTS

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        teacher: Callable[[], nn.Module] | None = None,
        image_size: int | tuple[int, int] | None = None,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        check_students(type(self), len(make_networks))
        networks = [make() for make in (*make_networks, teacher or make_networks[0])]
        self.peers = Networks(networks)
        channels = [last_channels(network) for network in networks]
        sizes = None if image_size is None else last_map_sizes(networks, image_size)
        self.criterion = FusionLoss(channels, num_classes, method="ffcl", feature_sizes=sizes, **hyperparameters)

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`; the teacher's come last."""
        return self.peers(images)

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`."""
        maps, logits = [peer.features[-1] for peer in outputs], [peer.logits for peer in outputs]
        output = self.criterion(maps, logits, labels, progress=progress)
        last = f"student{len(outputs) - 1}_"
        terms = {name.replace(last, "teacher_"): term for name, term in output.terms.items()}
        rows = {name: row.detach() for name, row in zip(self._names(), logits, strict=True)}
        return MethodOutput(output.loss, rows | {"fusion": output.fused_logits}, terms)

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`."""
        logits = {name: peer.logits for name, peer in zip(self._names(), outputs, strict=True)}
        maps = self.criterion.brought_together([peer.features[-1] for peer in outputs])
        return logits | {"fusion": self.criterion.fusion(maps).logits}

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        return dict(zip(self._names(), self.peers, strict=True)) | {"fusion": self.criterion.fusion}

    def students(self) -> list[str]:
        """See `Method.students`; the teacher is none of them."""
        return [f"student{i}" for i in range(len(self.peers) - 1)]

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        own = self.criterion.parameter_groups(**settings)
        return ParameterGroups([network_group(list(self.peers.parameters()), **settings), *own.sgd], own.adam)

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.peers.state_of(0)

    def _names(self) -> list[str]:
        return [*self.students(), "teacher"]
