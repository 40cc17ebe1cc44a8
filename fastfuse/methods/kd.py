"""KD: a student that learns its teachers' softened predictions (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.losses import kd
from fastfuse.losses._checks import check_number
from fastfuse.methods.taught import Taught


class KD(Taught):
    """loss = (1 - kd_weight) CE + kd_weight T^2 mean over teachers of KL(teacher || student).

    Args:
        make_networks, num_classes: see `Taught`.
        teachers: one or several of the student's classes.
        temperature: T.
        kd_weight: w, in 0..1.
    """

    name = "kd"
    maximum_teachers = None
    defaults = kd.DEFAULTS

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        teachers: Sequence[nn.Module] = (),
        temperature: float = 4.0,
        kd_weight: float = 0.9,
    ) -> None:
        check_number("--temperature", temperature, positive=True)
        if not 0 <= kd_weight <= 1:
            raise InputError(f"--kd-weight must be between 0 and 1, not {kd_weight}")
        super().__init__(make_networks, num_classes, teachers=teachers)
        self.temperature, self.kd_weight = temperature, kd_weight

    def wanted(self, output: Any) -> Tensor:
        """See `Taught.wanted`."""
        return output.logits

    def terms(self, student: Any, targets: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """See `Taught.terms`."""
        return kd.terms(student.logits, targets, labels, temperature=self.temperature, kd_weight=self.kd_weight)
