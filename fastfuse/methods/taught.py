"""What the methods share in which one student learns from frozen teachers."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.losses import ParameterGroups
from fastfuse.methods.base import Method, MethodOutput, check_students, network_group
from fastfuse.nn import Networks
from fastfuse.nn.teachers import Teachers


class Taught(Method):
    """One student, which is deployed, and trained networks that only give it targets.

    Args:
        make_networks: one, which gives a freshly initialised student.
        num_classes: K.
        teachers: at least one trained network; copied.

    Class attributes:
        maximum_teachers: None: any number.
    """

    minimum_students = 1
    maximum_students = 1
    default_students = 1
    teacher_count = 1
    maximum_teachers: ClassVar[int | None] = 1
    deployed = "student0"

    def __init__(
        self, make_networks: Sequence[Callable[[], nn.Module]], num_classes: int, *, teachers: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        check_students(type(self), len(make_networks))
        check_teachers(type(self), len(teachers), self.maximum_teachers)
        self.peers = Networks(make() for make in make_networks)
        self.teachers = Teachers(teachers)

    @abstractmethod
    def terms(self, student: Any, targets: Sequence[Any], labels: Tensor) -> dict[str, Tensor]:
        """The loss terms of one batch as they enter the sum.

        Args:
            student: what it gives, (logits, features).
            targets: see `wanted`, of each teacher.
            labels: [B] int64.
        """

    def wanted(self, output: Any) -> Any:
        """What of a teacher's output is a target; the rest is freed before the student's maps need the memory."""
        return output

    def targets(self, images: Tensor) -> list[Any]:
        """What each teacher wants the student to give."""
        return [self.wanted(output) for output in self.teachers(images)]

    def outputs(self, images: Tensor) -> Sequence[Any]:
        """See `Method.outputs`; the student's, then the targets."""
        targets = self.targets(images)
        return [*self.peers(images), *targets]

    def answers(self, images: Tensor) -> Sequence[Any]:
        """See `Method.answers`; the teachers are not asked."""
        return self.peers(images)

    def losses(self, outputs: Sequence[Any], labels: Tensor, progress: Tensor) -> MethodOutput:
        """See `Method.losses`."""
        student, *targets = outputs
        terms = self.terms(student, targets, labels)
        return MethodOutput(
            torch.stack(list(terms.values())).sum(),
            {"student0": student.logits.detach()},
            {name: term.detach() for name, term in terms.items()},
        )

    def heads(self, outputs: Sequence[Any]) -> dict[str, Tensor]:
        """See `Method.heads`."""
        return {"student0": outputs[0].logits}

    def networks(self) -> dict[str, nn.Module]:
        """See `Method.networks`."""
        return {"student0": self.peers[0]}

    def students(self) -> list[str]:
        """See `Method.students`."""
        return ["student0"]

    def parameter_groups(self, **settings: Any) -> ParameterGroups:
        """See `Method.parameter_groups`."""
        return ParameterGroups([network_group(list(self.peers.parameters()), **settings)], [])

    def deployed_state(self) -> dict[str, Tensor]:
        """See `Method.deployed_state`."""
        return self.peers.state_of(0)


def check_teachers(method: type[Method], count: int, maximum: int | None) -> None:
    """Refuse no teachers, and more than a method can have.

    Raises:
        InputError: says which.
    """
    if count == 0:
        raise InputError(f"{method.name} needs trained teachers and has none: name them with --teachers")
    if maximum is not None and count > maximum:
        raise InputError(
            f"{method.name} learns from {maximum} teacher, not {count}: name one in --teachers, or lower "
            "--teacher-count"
        )


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The student's, 0-d."""
    return functional.peer_kl_ce([logits], labels, temperature=1.0, teachers=[[]]).cross_entropy[0]
