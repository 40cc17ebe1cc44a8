"""ONE: branches on a shared trunk and a gate that makes them each other's teacher.

Lan et al., "Knowledge Distillation by On-the-Fly Native Ensemble", arXiv 1806.04606.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.losses import ParameterGroups, one
from fastfuse.losses._checks import check_number
from fastfuse.methods.base import Method, MethodOutput, check_students, network_group
from fastfuse.methods.branching import Branched
from fastfuse.nn.gate import Gate, gated


class ONE(Method):
    """A trunk with S branches that learn from their gated ensemble; branch 0 is deployed.

    Args:
        make_networks: each gives a freshly initialised network of one architecture, at least two.
        num_classes: K.
        branch_stage: number of stages in the trunk; None is all but the last, as published.
        temperature: T.
        rampup_epochs: warm-up of the KL terms; 0 switches it off.
        kl_target_epsilon: added to KL targets (its program adds 1e-7).

    Attributes:
        peers: the trunk with its branches.
        gate: weighs the branches.
    """

    name = "one"
    minimum_students = 2
    default_students = 3
    deployed = "student0"
    defaults = {**one.DEFAULTS, "branch_stage": None}  # noqa: RUF012 - declared as a ClassVar[Mapping] in Method

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        branch_stage: int | None = None,
        temperature: float = one.DEFAULTS["temperature"],
        rampup_epochs: float = one.DEFAULTS["rampup_epochs"],
        kl_target_epsilon: float = one.DEFAULTS["kl_target_epsilon"],
    ) -> None:
        super().__init__()
        check_students(type(self), len(make_networks))
        given = {"temperature": temperature, "rampup_epochs": rampup_epochs, "kl_target_epsilon": kl_target_epsilon}
        for name, value in given.items():
            check_number("--" + name.replace("_", "-"), value, positive=name == "temperature")
        self.peers = Branched([make() for make in make_networks], stage=branch_stage)
        self.branch_stage = self.peers.stage
        self.gate = Gate(self.peers.feature_channels[self.branch_stage - 1], len(make_networks))
        self.hyperparameters = given

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`."""
        return self.peers(images)

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`."""
        logits = self.heads(outputs)
        *branches, ensemble = logits.values()
        terms = one.terms(branches, ensemble, labels, progress=progress, **self.hyperparameters)
        return MethodOutput(
            torch.stack(list(terms.values())).sum(),
            {name: row.detach() for name, row in logits.items()},
            {name: term.detach() for name, term in terms.items()},
        )

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`."""
        logits = {name: output.logits for name, output in zip(self.students(), outputs, strict=True)}
        weights = self.gate(outputs[0].features[self.branch_stage - 1])
        return logits | {"gated": gated(weights, list(logits.values()))}

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        return {"network": self.peers, "gate": self.gate}

    def students(self) -> list[str]:
        """See `Method.students`."""
        return [f"student{i}" for i in range(len(self.peers))]

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`; as published, the gate is trained as the network is."""
        return ParameterGroups([network_group(list(self.parameters()), **settings)], [])

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.peers.state_of(0)
