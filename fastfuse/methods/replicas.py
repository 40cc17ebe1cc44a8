"""Several independent runs of one method, which differ in their seeds, trained in one pass."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.losses import ParameterGroups
from fastfuse.methods.base import Method, MethodOutput, side_by_side
from fastfuse.methods.branching import Branched
from fastfuse.nn import Networks


class Replicas(Method):
    """R methods whose networks run together; none sees another, and each one's update is that of a run of its own.

    Once arranged, `peers` holds the networks of all, those of the first replica first, and each method has a share of
    it. Everything with a name, such as a term or a head, has the replica's name before its own: "seed3/leader".

    Args:
        methods: alike but for their weights; those without networks side by side (`peers`) run one after another.
        names: of the replicas.
    """

    def __init__(self, methods: Sequence[Method], names: Sequence[str]) -> None:
        super().__init__()
        self.methods: Any = nn.ModuleList(methods)
        self.names = list(names)
        for attribute in ("name", "minimum_students", "deployed", "image_parts"):
            setattr(self, attribute, getattr(methods[0], attribute))

    def arrange(self, strategy: str) -> str:
        """See `Method.arrange`."""
        if side_by_side(self):
            return self.peers.arrange(strategy, replicas=len(self.methods))
        for method in self.methods:
            method.arrange_teachers(strategy)
        if not side_by_side(self.methods[0]):
            return self.methods[0].arrange(strategy)
        own = [method.peers for method in self.methods]
        peers = own[0].of_replicas(own)
        chosen = peers.arrange(strategy, replicas=len(self.methods))
        self.peers = peers
        for r, method in enumerate(self.methods):
            method.peers = Share(peers, r, len(own[r]))
        return chosen

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """What the networks of each replica give; images [B, R 3, H, W]."""
        each = images.chunk(len(self.methods), 1)
        if not hasattr(self, "peers"):
            return [method.outputs(batch) for method, batch in zip(self.methods, each, strict=True)]
        targets = [method.targets(batch) for method, batch in zip(self.methods, each, strict=True)]
        return [[*own, *others] for own, others in zip(self._peers_of_each(images), targets, strict=True)]

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`; labels [R, B]. The loss is the sum of the replicas', of which each is a term."""
        logits: dict[str, Tensor] = {}
        terms: dict[str, Tensor] = {}
        total = []
        for name, method, own, its_labels in zip(self.names, self.methods, outputs, labels.unbind(0), strict=True):
            found = method.losses(own, its_labels, progress)
            total.append(found.loss)
            logits |= {f"{name}/{head}": rows for head, rows in found.logits.items()}
            terms |= {f"{name}/loss": found.loss.detach()}
            terms |= {f"{name}/{term}": value for term, value in found.terms.items()}
        return MethodOutput(torch.stack(total).sum(), logits, terms)

    def answers(self, images: Tensor) -> Sequence[Any]:
        """See `Method.answers`; every replica sees the same images [B, 3, H, W]."""
        side_by_side = images.repeat(1, len(self.methods), 1, 1)
        # No head is a teacher where there are networks side by side.
        return self._peers_of_each(side_by_side) if hasattr(self, "peers") else self.outputs(side_by_side)

    def _peers_of_each(self, images: Tensor) -> list[list[Any]]:
        found = self.peers(images)
        each = len(found) // len(self.methods)
        return [found[start : start + each] for start in range(0, len(found), each)]

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`."""
        each = zip(self.names, self.methods, outputs, strict=True)
        return {f"{name}/{head}": rows for name, method, own in each for head, rows in method.heads(own).items()}

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        each = zip(self.names, self.methods, strict=True)
        return {f"{name}/{own}": network for name, method in each for own, network in method.networks().items()}

    def students(self) -> list[str]:
        """All heads that are students of some replica."""
        return [student for students in self.ensembles().values() for student in students]

    def ensembles(self) -> dict[str, list[str]]:
        """See `Method.ensembles`: one for each replica."""
        each = zip(self.names, self.methods, strict=True)
        return {f"{name}/": [f"{name}/{student}" for student in method.students()] for name, method in each}

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        own = [method.parameter_groups(**settings) for method in self.methods]
        if hasattr(self, "peers"):
            # The first group of a method is that of its networks, of which a share has no parameters.
            own[0].sgd[0]["params"] = [*self.peers.parameters(), *own[0].sgd[0]["params"]]
        return ParameterGroups(*(_merged([g for groups in kind for g in groups]) for kind in zip(*own, strict=True)))

    def results(self) -> dict[str, Any]:
        """See `Method.results`: of each replica by its name."""
        found: dict[str, Any] = {}
        for replica, method in zip(self.names, self.methods, strict=True):
            for name, result in method.results().items():
                found.setdefault(name, {})[replica] = result
        return found

    def deployed_states(self) -> dict[str, dict[str, Tensor]]:
        """See `Method.deployed_states`: one for each replica."""
        each = zip(self.names, self.methods, strict=True)
        return {f"{name}/{method.deployed}": method.deployed_state() for name, method in each}

    def deployed_state(self) -> dict[str, Tensor]:
        """Refused: there are as many deployed networks as replicas.

        Raises:
            InputError: always.
        """
        raise InputError("replicas deploy a network each: take deployed_states()")

    def own(self, replica: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """What belongs to one replica in a mapping by parameter, such as a state dict, by the names of a single run."""
        share: Any = getattr(self.methods[replica], "peers", None)
        found = {}
        for name, value in values.items():
            start, _, rest = name.partition(".")
            index, _, inner = rest.partition(".")
            if start == "methods" and int(index) == replica:
                found[inner] = value
            elif start == "peers" and (own := share.own_name(rest)) is not None:
                found[f"peers.{own}"] = value
        return found


class Share(nn.Module):
    """The networks of one replica among those that others hold and run; it has no parameters itself.

    Args:
        networks: all of them.
        replica: which one's these are.
        count: how many.
    """

    def __init__(self, networks: Networks | Branched, replica: int, count: int) -> None:
        super().__init__()
        self._replica, self._count = replica, count
        self._all = (networks,)  # in a tuple, so that it is no submodule

    def __len__(self) -> int:
        return self._count

    def own_name(self, name: str) -> str | None:
        """See `Networks.own_name`."""
        return self._all[0].own_name(name, self._replica, self._count)

    def state_of(self, index: int) -> dict[str, Tensor]:
        """See `Networks.state_of`."""
        return self._all[0].state_of(self._replica * self._count + range(self._count)[index])


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of equal settings as one, so that updates do not grow in number with the replicas."""
    merged: list[dict[str, Any]] = []
    for group in groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        parameters = list(group["params"])
        for other in merged:
            if {key: value for key, value in other.items() if key != "params"} == settings:
                other["params"] += parameters
                break
        else:
            merged.append({**settings, "params": parameters})
    return [group for group in merged if group["params"]]
