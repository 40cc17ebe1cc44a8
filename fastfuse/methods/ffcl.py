"""FFCL: a teacher and students that learn together from their fused maps.

Li et al., International Journal of Distributed Sensor Networks 17(11), 2021, doi 10.1177/15501477211057037. The
equations are not public; what is inferred is said in docs/methods/ffcl.md.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.losses import FusionLoss, ffcl
from fastfuse.methods.base import MethodOutput, check_students
from fastfuse.methods.fusing import Fusing
from fastfuse.models.sizes import map_sizes
from fastfuse.nn import Networks
from fastfuse.nn.teachers import Teachers


class FFCL(Fusing):
    """A student and a larger teacher, both untrained, that learn from their fused map and from each other.

    Args:
        make_networks: each gives a freshly initialised student, at least one; they may differ in architecture.
        num_classes: K.
        teacher: gives the teacher; None: one like the first student.
        teachers: with regularization="self", a trained copy of every student and of the teacher, in this order; copied
            and frozen.
        image_size: see `FFL`.
        fused_stages: how many of the deepest stages are fused.
        hyperparameters: further ones of `FusionLoss(method="ffcl")`.

    Attributes:
        teachers: the frozen copies, if there are any.
    """

    name = "ffcl"
    minimum_students = 1
    default_students = 1
    deployed = "student0"
    extra_network = "teacher"
    defaults = {**ffcl.DEFAULTS, "feature_temperature": 1.0}  # noqa: RUF012 - a ClassVar[Mapping] in Method

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        teacher: Callable[[], nn.Module] | None = None,
        teachers: Sequence[nn.Module] = (),
        image_size: int | tuple[int, int] | None = None,
        fused_stages: int = 1,
        **hyperparameters: Any,
    ) -> None:
        super().__init__()
        check_students(type(self), len(make_networks))
        networks = [make() for make in (*make_networks, teacher or make_networks[0])]
        self.peers = Networks(networks)
        tapped: list[Any] = networks
        stages = min(len(network.feature_channels) for network in tapped)
        if not 1 <= fused_stages <= stages:
            raise InputError(
                f"--fused-stages must be between 1 and {stages}, the stages that every network has, not {fused_stages}"
            )
        self.criterion = FusionLoss(
            [list(network.feature_channels[-fused_stages:]) for network in tapped],
            num_classes,
            method="ffcl",
            feature_sizes=None if image_size is None else _sizes(networks, image_size, fused_stages),
            fused_stages=fused_stages,
            **hyperparameters,
        )
        copied = self.criterion.hyperparameters["regularization"] == "self"
        if len(teachers) != copied * len(networks):
            raise InputError(
                f"--regularization self needs a trained copy of each of the {len(networks)} networks, the students' "
                f"first, not {len(teachers)}: name as many in --teachers, or leave them out and they are trained first"
                if copied
                else "ffcl has trained teachers with --regularization self alone: leave --teachers out"
            )
        if copied:
            _check_copies(self.names(), networks, teachers)
            self.teachers = Teachers(teachers)

    def targets(self, images: Tensor) -> list[Any]:
        """See `Method.targets`: the logits of the frozen copies, if there are any."""
        return [copy.logits for copy in self.teachers(images)] if hasattr(self, "teachers") else []

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`; the teacher's come behind the students', then the targets."""
        targets = self.targets(images)
        return [*self.peers(images), *targets]

    def answers(self, images: Tensor) -> Sequence[Any]:
        """See `Method.answers`; the copies are not asked."""
        return self.peers(images)

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`."""
        count = len(self.peers)
        peers, copies = outputs[:count], list(outputs[count:])
        logits = [peer.logits for peer in peers]
        output = self.criterion(self._maps(peers), logits, labels, copy_logits=copies or None, progress=progress)
        last = f"student{count - 1}_"
        terms = {name.replace(last, "teacher_"): term for name, term in output.terms.items()}
        rows = {name: row.detach() for name, row in zip(self.names(), logits, strict=True)}
        fused = zip(self.criterion.fusions(), (output.fused_logits, *output.shallow_logits), strict=True)
        return MethodOutput(output.loss, rows | dict(fused), terms)

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`."""
        peers = outputs[: len(self.peers)]
        logits = {name: peer.logits for name, peer in zip(self.names(), peers, strict=True)}
        return logits | self.criterion.fused_heads(self._maps(peers))

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.peers.state_of(0)

    def _maps(self, peers: Sequence[Any]) -> list[list[Tensor]]:
        """Of each peer those of the stages that are fused."""
        return [list(peer.features[-self.criterion.fused_stages :]) for peer in peers]


def _check_copies(names: Sequence[str], networks: Sequence[nn.Module], copies: Sequence[nn.Module]) -> None:
    """Refuse copies that are in another order than the networks, or no copies at all."""
    for i, (name, network, copy) in enumerate(zip(names, networks, copies, strict=True)):
        own, theirs = ({key: x.shape for key, x in module.state_dict().items()} for module in (network, copy))
        if own != theirs:
            raise InputError(
                f"teacher {i} is of another architecture than {name}, whose trained copy it should be: name the copies "
                f"in the order {', '.join(names)} in --teachers, or leave them out and they are trained first"
            )


def _sizes(networks: Sequence[nn.Module], image_size: int | tuple[int, int], stages: int) -> Sequence[Any]:
    """As `FusionLoss` wants them: of each network the size of its last map, or those of several stages."""
    every = map_sizes(networks, image_size)
    return [own[-1] if stages == 1 else own[-stages:] for own in every]
