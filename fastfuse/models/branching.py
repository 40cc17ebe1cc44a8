"""Sub-networks on a shared trunk: the first stages once, the remaining stages and the head once per branch."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models._blocks import NetworkOutput


class Branched(nn.Module):
    """Several networks of one architecture that share their first stages.

    The trunk has the weights that the first network was given with, every branch those of its own network.

    Args:
        networks: S networks with stages (all of `fastfuse.models`, see `Staged` there), of which parts are taken.
        stage: number of stages in the trunk, 1 to one less than all; None is all but the last, as FFL and ONE publish.

    Attributes:
        trunk: the shared children by their names in one network.
        branches: one per sub-network: what is left of it.
        stage: number of stages in the trunk.
        feature_channels: C of each tapped map of one sub-network.

    Raises:
        InputError: networks without stages, with other trunks than the first, or no such number of stages.
    """

    def __init__(self, networks: Sequence[nn.Module], *, stage: int | None = None) -> None:
        super().__init__()
        networks = list(networks)
        if not networks:
            raise InputError("branches are made of at least one network, and none is given")
        first: Any = networks[0]
        check_stages(first, type(first).__name__)
        stages = first.stage_modules
        self.stage = len(stages) - 1 if stage is None else stage
        if not 1 <= self.stage < len(stages):
            raise InputError(
                f"--branch-stage must be 1 to {len(stages) - 1} for a network of {len(stages)} stages, not {stage}: "
                "at least one stage is shared, and at least one is not"
            )
        self.feature_channels = tuple(first.feature_channels)
        self._calls = stages[: self.stage]
        shared = list(dict.fromkeys(name for names in self._calls for name in names))
        self.trunk = nn.ModuleDict({name: getattr(first, name) for name in shared})
        for network in networks[1:]:
            _check_trunk(first, network, shared)
        for network in networks:
            for name in shared:
                # What serves in later stages too, such as a pooling, stays.
                if not any(name in names for names in stages[self.stage :]):
                    delattr(network, name)
        self.branches = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> list[NetworkOutput]:
        """[B, 3, H, W] to one (logits, features) per branch; the maps of the trunk are the same ones in all."""
        x, shared = images, []
        for names in self._calls:
            for name in names:
                x = self.trunk[name](x)
            shared.append(x)
        branches: Any = self.branches
        rest = [branch.resume(x, self.stage) for branch in branches]
        return [NetworkOutput(logits, (*shared, *features)) for logits, features in rest]

    def plain_state_dict(self, branch: int) -> dict[str, Tensor]:
        """The weights of one sub-network under the keys of the plain network: it loads there with `strict=True`.

        Raises:
            InputError: there is no such branch.
        """
        if not 0 <= branch < len(self.branches):
            raise InputError(f"branch {branch} does not exist: there are branches 0 to {len(self.branches) - 1}")
        return {**self.trunk.state_dict(), **self.branches[branch].state_dict()}


def check_stages(network: nn.Module, name: str) -> None:
    """Refuse a network whose stages are not known.

    Raises:
        InputError: says what can be done in its place.
    """
    if not hasattr(network, "stage_modules"):
        raise InputError(
            f"{name} has no stages that branches could share; train whole networks side by side (ffl: --sharing "
            "separate), or choose a network of fastfuse.models, such as resnet32"
        )


def _check_trunk(first: nn.Module, network: nn.Module, shared: list[str]) -> None:
    """Refuse a network that could not have the first one's trunk."""

    def described(of: nn.Module) -> tuple:
        children = [getattr(of, name, None) for name in shared]
        return type(of), getattr(of, "stage_modules", None), list(map(repr, children))

    if described(first) != described(network):
        raise InputError(
            "sub-networks that share a trunk must be of one architecture; choose one --model, or for ffl "
            "--sharing separate"
        )
