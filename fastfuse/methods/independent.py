"""Plain training of networks that do not see each other: the baseline of every method."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse import functional
from fastfuse.losses import ParameterGroups
from fastfuse.methods.base import Method, MethodOutput, check_students, network_group
from fastfuse.nn import Networks


class Independent(Method):
    """S networks, each trained by cross-entropy alone; the first is deployed.

    Args:
        make_networks: each gives a freshly initialised network; they may differ in architecture.
        num_classes: K.
    """

    name = "independent"
    minimum_students = 1
    deployed = "student0"

    def __init__(self, make_networks: Sequence[Callable[[], nn.Module]], num_classes: int) -> None:
        super().__init__()
        check_students(type(self), len(make_networks))
        self.peers = Networks(make() for make in make_networks)

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`."""
        return self.peers(images)

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`."""
        logits = self.heads(outputs)
        terms = self.terms(logits, labels)
        return MethodOutput(
            torch.stack(list(terms.values())).sum(),
            {name: row.detach() for name, row in logits.items()},
            {name: term.detach() for name, term in terms.items()},
        )

    def terms(self, logits: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The loss terms of one batch."""
        without_teachers: list[list[int]] = [[] for _ in logits]
        cross_entropy, _, _ = functional.peer_kl_ce(
            list(logits.values()), labels, temperature=1.0, teachers=without_teachers
        )
        return {f"{name}_ce": term for name, term in zip(logits, cross_entropy.unbind(0), strict=True)}

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`."""
        return {name: output.logits for name, output in zip(self.students(), outputs, strict=True)}

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        return dict(zip(self.students(), self.peers, strict=True))

    def students(self) -> list[str]:
        """See `Method.students`."""
        return [f"student{i}" for i in range(len(self.peers))]

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        return ParameterGroups([network_group(list(self.peers.parameters()), **settings)], [])

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.peers.state_of(0)
