"""DFA: a student that learns from weighted sums of its teacher's maps, group by group.

Guan et al., "Differentiable Feature Aggregation Search for Knowledge Distillation", ECCV 2020, arXiv 2008.00506. The
weights are searched before, see `fastfuse.methods.dfa_search`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError, unknown_name
from fastfuse.losses import ParameterGroups, dfa
from fastfuse.losses._checks import check_number
from fastfuse.methods.base import network_group
from fastfuse.methods.taught import Taught, cross_entropy
from fastfuse.models.stages import BlockMaps, check_stages
from fastfuse.nn.connectors import Connector

AGGREGATIONS = ("searched", "uniform", "last", "random")


class DFA(Taught):
    """A student whose last map of each group learns a weighted sum of the teacher's block outputs.

    loss = CE + dfa_weight * sum_i D(A_i, Fs_i(S_i)), A_i = sum_j alpha_ij T_ij with weights that stay as they are.

    Args:
        make_networks: one maker, of a network with stages.
        num_classes: K.
        teachers: one trained network with as many stages.
        searched: what `dfa-search` found, its `results()["aggregation"]`; for aggregation="searched".
        dfa_weight: lambda.
        distance: "l2", the mean over all elements, or "ofd", see `MarginDistance`.
        aggregation: "searched"; "uniform"; "last", the last block alone, which is ordinary feature distillation; or
            "random", the softmax of normal numbers drawn here.

    Attributes:
        weights: alpha_i of all groups one after another, [sum N_i]; part of the state dict.
        connectors: Fs_i.

    Raises:
        InputError: an unusable hyper-parameter or teacher, or searched weights that do not fit it.
    """

    name = "dfa"
    defaults = dfa.DEFAULTS

    weights: Tensor

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        teachers: Sequence[nn.Module] = (),
        searched: Mapping[str, Any] | None = None,
        dfa_weight: float = 1.0,
        distance: str = "l2",
        aggregation: str = "searched",
    ) -> None:
        check_number("--dfa-weight", dfa_weight)
        for option, value, known in (
            ("--distance", distance, dfa.DISTANCES),
            ("--aggregation", aggregation, AGGREGATIONS),
        ):
            if value not in known:
                raise unknown_name(option, value, known)
        super().__init__(make_networks, num_classes, teachers=in_blocks(teachers))
        student: Any = self.peers[0]
        teacher: Any = teachers[0]
        check_groups(student, teacher)
        student.raw_taps = True  # as of the teacher's blocks: what its head makes of the last map is its own affair
        self.dfa_weight = dfa_weight
        self.sizes = [len(paths) for paths in teacher.stage_blocks]
        widths = zip(student.feature_channels, teacher.feature_channels, strict=True)
        self.connectors = nn.ModuleList(Connector(own, theirs) for own, theirs in widths)
        self.margin_distances = dfa.margin_distances(teacher) if distance == "ofd" else None
        self.register_buffer("weights", torch.cat(_weights(aggregation, searched, self.sizes)))

    def wanted(self, output: Any) -> Sequence[Tensor]:
        """See `Taught.wanted`."""
        return output.features

    def terms(self, student: Any, targets: Sequence[Sequence[Tensor]], labels: Tensor) -> dict[str, Tensor]:
        """See `Taught.terms`."""
        terms = {"student0_ce": cross_entropy(student.logits, labels)}
        maps, alphas = (in_groups(values, self.sizes) for values in (targets[0], self.weights))
        for i, connector in enumerate(self.connectors):
            distance = self._distance(maps[i], alphas[i], connector(student.features[i]), i)
            terms[f"group{i}_dfa"] = self.dfa_weight * distance
        return terms

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`; connectors train as the student does."""
        own = (self.peers, self.connectors)
        return ParameterGroups([network_group(list(module.parameters()), **settings) for module in own], [])

    def _distance(self, maps: Sequence[Tensor], alpha: Tensor, target: Tensor, group: int) -> Tensor:
        if self.margin_distances is None:
            return dfa.group_distance(maps, alpha, target, group=group)
        # Doubled from group to group, the last one whole, as in the published program of the distance.
        return self.margin_distances[group](maps, alpha, target, group=group) / 2 ** (len(self.sizes) - 1 - group)


def in_blocks(teachers: Sequence[nn.Module]) -> list[nn.Module]:
    """Teachers that give the maps of all their blocks.

    Raises:
        InputError: one that has no stages.
    """
    for teacher in teachers:
        check_stages(teacher, "teacher")
    return [BlockMaps(teacher) for teacher in teachers]


def check_groups(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student without stages, or with another number of them than the teacher."""
    check_stages(student, "student")
    both: tuple[Any, Any] = teacher, student
    theirs, own = (len(network.stage_modules) for network in both)
    if theirs != own:
        raise InputError(
            f"the teacher has {theirs} groups of maps and the student {own}: choose networks of as many stages"
        )


def in_groups(values: Sequence[Tensor] | Tensor, sizes: Sequence[int]) -> list[Any]:
    """Maps or weights of all groups in order as those of each."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [values[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _weights(aggregation: str, searched: Mapping[str, Any] | None, sizes: Sequence[int]) -> list[Tensor]:
    """alpha of each group."""
    if aggregation == "searched":
        return _searched(searched, sizes)
    if searched is not None:
        raise InputError(f"--aggregation {aggregation} takes no searched weights: leave them out, or give searched")
    if aggregation == "random":
        return [torch.randn(size).softmax(0) for size in sizes]
    if aggregation == "last":
        return [torch.eye(size)[-1] for size in sizes]
    return [torch.full((size,), 1 / size) for size in sizes]


def _searched(searched: Mapping[str, Any] | None, sizes: Sequence[int]) -> list[Tensor]:
    """Weights from `dfa-search`, of any data set and networks, as long as there are as many."""
    if searched is None:
        raise InputError(
            "--aggregation searched needs the weights of a search: give --aggregation-file of a dfa-search run, or "
            "--aggregation uniform, last or random"
        )
    try:
        found = [[float(x) for x in group["weights"]] for group in searched["groups"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            'searched weights must be {"groups": [{"weights": [numbers]}, ...]}, as dfa-search writes them into its '
            "aggregation.json"
        ) from error
    if [len(group) for group in found] != list(sizes):
        raise InputError(
            f"searched weights of {_listed(len(group) for group in found)} candidates do not fit this teacher, which "
            f"has {_listed(sizes)} in its groups: search with a teacher of these numbers of blocks"
        )
    for i, group in enumerate(found):
        if not (all(math.isfinite(x) for x in group) and abs(sum(group) - 1) < 1e-3):
            raise InputError(f"searched weights of group {i + 1} must be finite and sum to 1, not {group}")
    return [torch.tensor(group) for group in found]


def _listed(numbers: Iterable[int]) -> str:
    return " + ".join(map(str, numbers))
