"""DFA's search: how much each block of a teacher is worth to a student, group by group.

Guan et al., "Differentiable Feature Aggregation Search for Knowledge Distillation", ECCV 2020, arXiv 2008.00506.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.losses import ParameterGroups, dfa
from fastfuse.losses._checks import check_number
from fastfuse.methods.base import Method, MethodOutput, check_students, network_group
from fastfuse.methods.dfa import check_groups, in_blocks, in_groups
from fastfuse.methods.taught import check_teachers
from fastfuse.models.stages import front
from fastfuse.nn.connectors import Connector
from fastfuse.nn.teachers import Teachers

# The published bi-level program that this search follows, differentiable architecture search (arXiv 1806.09055).
ADAM_BETAS = (0.5, 0.999)


class Bridged(NamedTuple):
    """One group's two paths on one batch.

    Attributes:
        logits: [B, K], the student's last stages on the projected aggregate.
        target: r, the student's last map of the group behind its connector.
        maps: the teacher's candidates.
        weights: alpha of the group.
    """

    logits: Tensor
    target: Tensor
    maps: Sequence[Tensor]
    weights: Tensor


class Bridge(nn.Module):
    """What is trained beside the weights of one group: a student in two halves that do not touch, and connectors.

    Args:
        student: with stages.
        stage: i, the number of stages in its first half.
        channels: of the teacher's maps in this group.
    """

    def __init__(self, student: nn.Module, stage: int, channels: int) -> None:
        super().__init__()
        self.student, self.stage = student, stage
        staged: Any = student
        own = staged.feature_channels[stage - 1]
        self.from_student, self.from_teacher = Connector(own, channels), Connector(channels, own)

    def forward(self, images: Tensor, maps: Sequence[Tensor], weights: Tensor) -> Bridged:
        """Images [B, 3, H, W] and the teacher's maps of them to both paths."""
        target = self.from_student(front(self.student, images, self.stage))
        dfa.check_resolution(maps, target, self.stage - 1)
        staged: Any = self.student
        logits = staged.resume(self.from_teacher(dfa.aggregate(maps, weights)), self.stage).logits
        return Bridged(logits, target, maps, weights)


class DFASearch(Method):
    """Weights alpha_i = softmax(beta_i) of a teacher's blocks in each group, by the bridge loss in two levels.

    L_i = gamma_ts CE(student's stages > i on Ft_i(A_i)) + gamma_st D(A_i, Fs_i(student's stages <= i)), each group with
    a student of its own. Every batch holds images of two halves of the training set, which `image_parts` asks for: on
    the first half L trains the students and connectors (w) and takes beta as it is, on the second half it trains beta
    and takes w as it is. One backward serves both: the gradient of beta is the bi-level one of first order.

    Args:
        make_networks: one maker, of a network with stages; each group has a fresh one.
        num_classes: K.
        teachers: one trained network with as many stages.
        gamma_st, gamma_ts: weights of the two paths.
        alpha_lr, alpha_weight_decay: of beta (Adam); the decay is the regulariser R(beta).

    Attributes:
        betas: beta_i of all groups one after another, [sum N_i], from 0: uniform weights.
        bridges: students and connectors.

    Raises:
        InputError: an unusable hyper-parameter or teacher.
    """

    name = "dfa-search"
    minimum_students = maximum_students = default_students = 1
    teacher_count = 1
    image_parts = 2
    deployed = "aggregation"
    defaults = dfa.SEARCH_DEFAULTS
    loop_only = "each of its students runs in two halves, of which the second one reads the teacher's maps"

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        teachers: Sequence[nn.Module] = (),
        gamma_st: float = 1.0,
        gamma_ts: float = 1.0,
        alpha_lr: float = 3e-4,
        alpha_weight_decay: float = 1e-3,
    ) -> None:
        super().__init__()
        check_students(type(self), len(make_networks))
        check_teachers(type(self), len(teachers), 1)
        check_number("--gamma-st", gamma_st)
        check_number("--gamma-ts", gamma_ts)
        check_number("--alpha-lr", alpha_lr, positive=True)
        check_number("--alpha-weight-decay", alpha_weight_decay)
        self.gamma_st, self.gamma_ts = gamma_st, gamma_ts
        self.alpha_lr, self.alpha_weight_decay = alpha_lr, alpha_weight_decay
        (make,) = make_networks
        teacher: Any
        (teacher,) = teachers
        self.teachers = Teachers(in_blocks(teachers))
        student = make()
        check_groups(student, teacher)
        self.candidates, self.teacher_text = teacher.stage_blocks, _described(teacher)
        self.sizes = [len(paths) for paths in self.candidates]
        students = [student, *(make() for _ in self.sizes[1:])]
        channels = teacher.feature_channels
        self.bridges: Any = nn.ModuleList(Bridge(own, i + 1, channels[i]) for i, own in enumerate(students))
        self.betas = nn.Parameter(torch.zeros(sum(self.sizes)))

    def alphas(self) -> list[Tensor]:
        """alpha_i of each group, [N_i], sum 1."""
        return [beta.softmax(0) for beta in in_groups(self.betas, self.sizes)]

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`: of each group what trains w, then of each what trains beta; in evaluation the first.

        Raises:
            InputError: in training, a batch that has no two halves.
        """
        (teacher,) = self.teachers(images)
        groups = list(zip(self.bridges, in_groups(teacher.features, self.sizes), self.alphas(), strict=True))
        if not self.training:
            return [bridge(images, maps, alpha) for bridge, maps, alpha in groups]
        if len(images) % 2 or not len(images):
            raise InputError(f"a batch of the search has two halves, and {len(images)} images have none")
        half = len(images) // 2
        trained = [bridge(images[:half], [x[:half] for x in maps], alpha.detach()) for bridge, maps, alpha in groups]
        searched = [_frozen(bridge, images[half:], [x[half:] for x in maps], alpha) for bridge, maps, alpha in groups]
        return trained + searched

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`; terms of the half that trains beta are named val_."""
        count = len(self.sizes)
        terms: dict[str, Tensor] = {}
        own_labels = labels.chunk(len(outputs) // count)
        for part, name in enumerate(("", "val_")[: len(own_labels)]):
            terms |= self._bridge_losses(outputs[part * count : (part + 1) * count], own_labels[part], name)
        return MethodOutput(
            torch.stack(list(terms.values())).sum(),
            {name: row.detach() for name, row in self.heads(outputs[:count]).items()},
            {name: term.detach() for name, term in terms.items()},
        )

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`: what each student's last stages make of the aggregated maps."""
        return {name: own.logits for name, own in zip(self.students(), outputs, strict=False)}

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        return dict(zip(self.students(), (bridge.student for bridge in self.bridges), strict=True))

    def students(self) -> list[str]:
        """See `Method.students`: one for each group."""
        return [f"group{i}" for i in range(len(self.sizes))]

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`; beta has Adam, whose decay is added to the gradient."""
        adam = {"params": [self.betas], "lr": self.alpha_lr, "betas": ADAM_BETAS}
        return ParameterGroups(
            [network_group(list(self.bridges.parameters()), **settings)],
            [{**adam, "weight_decay": self.alpha_weight_decay}],
        )

    def results(self) -> dict[str, Any]:
        """The weights found so far, as `DFA(searched=...)` takes them."""
        found = [alpha.detach().double().cpu() for alpha in self.alphas()]
        groups = [
            {"candidates": list(paths), "weights": (alpha / alpha.sum()).tolist()}
            for paths, alpha in zip(self.candidates, found, strict=True)
        ]
        return {"aggregation": {"groups": groups, "teacher": self.teacher_text}}

    def deployed_state(self) -> dict[str, Tensor]:
        """Beta of each group: the search deploys no network."""
        betas = in_groups(self.betas.detach(), self.sizes)
        return dict(zip(self.students(), betas, strict=True))

    def _bridge_losses(self, outputs: Sequence[Bridged], labels: Tensor, prefix: str) -> dict[str, Tensor]:
        logits = [own.logits for own in outputs]
        expressive, _, _ = functional.peer_kl_ce(logits, labels, temperature=1.0, teachers=[[] for _ in logits])
        terms = {}
        for i, (own, of_student) in enumerate(zip(outputs, expressive.unbind(0), strict=True)):
            learnable = dfa.group_distance(own.maps, own.weights, own.target, group=i)
            terms[f"{prefix}group{i}_ts"] = self.gamma_ts * of_student
            terms[f"{prefix}group{i}_st"] = self.gamma_st * learnable
        return terms


def _frozen(bridge: Bridge, images: Tensor, maps: Sequence[Tensor], weights: Tensor) -> Bridged:
    """The same forward, batch statistics included, that leaves no trace in the bridge: no gradient, no running mean."""
    state = {name: p.detach() for name, p in bridge.named_parameters()}
    state |= {name: buffer.clone() for name, buffer in bridge.named_buffers()}
    return functional_call(bridge, state, (images, maps, weights))


def _described(teacher: Any) -> str:
    blocks, channels = (
        "+".join(map(str, numbers)) for numbers in (map(len, teacher.stage_blocks), teacher.feature_channels)
    )
    return f"{type(teacher).__name__} of {blocks} blocks, {channels} channels"
