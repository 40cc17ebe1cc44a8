"""Sub-networks on a shared trunk: the first stages once, the remaining stages and the head once per branch."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models._blocks import NetworkOutput, Staged
from fastfuse.nn import Networks


class Trunk(nn.Module):
    """The first stages of a network, under their names there.

    Args:
        network: whose children these are.
        stages: names of the children of each stage, in the order of their calls.
    """

    def __init__(self, network: nn.Module, stages: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self._stages = tuple(map(tuple, stages))
        for name in dict.fromkeys(name for names in stages for name in names):
            self.add_module(name, network.get_submodule(name))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] to the map of each stage."""
        x, maps = images, []
        for names in self._stages:
            for name in names:
                x = getattr(self, name)(x)
            maps.append(x)
        return tuple(maps)


class Branched(nn.Module):
    """Several networks of one architecture that share their first stages.

    The trunk has the weights that the first network was given with, every branch those of its own network. State dicts
    have the keys of the plain networks, "trunk.0.conv1.weight" and "branches.1.layer3.0.conv1.weight", however the
    networks are run.

    Args:
        networks: S networks with stages (all of `fastfuse.models`, see `Staged` there), of which parts are taken.
        stage: number of stages in the trunk, 1 to one less than all; None is all but the last, as FFL and ONE publish.

    Attributes:
        trunk: the shared part; of R replicas R trunks.
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
        _check_stages(first)
        stages = first.stage_modules
        self.stage = len(stages) - 1 if stage is None else stage
        if not 1 <= self.stage < len(stages):
            raise InputError(
                f"--branch-stage must be 1 to {len(stages) - 1} for a network of {len(stages)} stages, not {stage}: "
                "at least one stage is shared, and at least one is not"
            )
        self.feature_channels = tuple(first.feature_channels)
        trunk = Trunk(first, stages[: self.stage])
        shared = [name for name, _ in trunk.named_children()]
        for network in networks[1:]:
            _check_trunk(first, network, shared)
        self.trunk = Networks([trunk])
        self.branches = Networks(_branch(network, shared, self.stage) for network in networks)

    def forward(self, images: Tensor) -> list[NetworkOutput]:
        """[B, 3 R, H, W] to one (logits, features) per branch; the maps of the trunk are the same ones in all."""
        found = self.trunk.together(images)
        shared = self.trunk.apart(found)
        rest = self.branches(found[-1] if self.trunk.strategy == "grouped" else [maps[-1] for maps in shared])
        each = len(self.branches) // len(self.trunk)
        return [NetworkOutput(logits, (*shared[i // each], *own)) for i, (logits, own) in enumerate(rest)]

    def arrange(self, strategy: str, *, replicas: int = 1) -> str:
        """Change in place how the trunk and the branches are run, see `Networks.arrange`.

        Raises:
            InputError: one of both has no such strategy; nothing is changed.
        """
        before = self.branches.strategy, self.branches.replicas
        chosen = self.branches.arrange(strategy, replicas=replicas)
        try:
            return self.trunk.arrange(chosen, replicas=replicas)
        except InputError:
            if strategy != "auto":
                self.branches.arrange(before[0], replicas=before[1])
                raise
            self.branches.arrange("loop", replicas=replicas)
            return self.trunk.arrange("loop", replicas=replicas)

    @classmethod
    def of_replicas(cls, replicas: Sequence["Branched"]) -> "Branched":
        """See `Networks.of_replicas`."""
        together = copy.copy(replicas[0])
        together._modules = {}
        together.trunk = Networks.of_replicas([own.trunk for own in replicas])
        together.branches = Networks.of_replicas([own.branches for own in replicas])
        return together

    @staticmethod
    def own_name(name: str, replica: int, count: int) -> str | None:
        """See `Networks.own_name`; of each replica one trunk."""
        part, _, rest = name.partition(".")
        own = Networks.own_name(rest, replica, 1 if part == "trunk" else count)
        return None if own is None else f"{part}.{own}"

    def __len__(self) -> int:
        return len(self.branches)

    def state_of(self, index: int) -> dict[str, Tensor]:
        """The weights of one sub-network under the keys of the plain network: it loads there with `strict=True`.

        Raises:
            InputError: there is no such sub-network.
        """
        own = self.branches.state_of(index)
        each = len(self.branches) // len(self.trunk)
        return {**self.trunk.state_of(index % len(self.branches) // each), **own}

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """See `Networks.split`."""
        part, _, own = name.partition(".")
        return {f"{part}.{key}": value for key, value in getattr(self, part).split(own, tensor).items()}

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `Networks.join`."""
        part, _, own = name.partition(".")
        prefix = part + "."
        given = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        return getattr(self, part).join(own, given)


def _branch(network: Any, shared: Sequence[str], stage: int) -> nn.Module:
    """What is left of a network behind its first stages, in place."""
    for name in shared:
        # What serves in later stages too, such as a pooling, stays.
        if not any(name in names for names in network.stage_modules[stage:]):
            delattr(network, name)
    network.done_stages = stage
    return network


def _check_stages(network: nn.Module) -> None:
    """Refuse a network whose stages are not known."""
    if not isinstance(network, Staged):
        raise InputError(
            f"{type(network).__name__} has no stages that branches could share; train whole networks side by side "
            "(ffl: --sharing separate), or choose a network of fastfuse.models, such as resnet32"
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
