"""AT: a student that learns its teacher's attention maps (Zagoruyko and Komodakis, arXiv 1612.03928)."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fastfuse.losses import at
from fastfuse.losses._checks import check_number
from fastfuse.methods.taught import Taught, cross_entropy


class AT(Taught):
    """loss = CE + at_weight * sum over stages of the squared distance of normalised attention maps.

    Args:
        make_networks, num_classes: see `Taught`.
        teachers: one, with as many tapped stages of the student's heights and widths.
        at_weight: beta.
    """

    name = "at"
    defaults = at.DEFAULTS

    def __init__(
        self,
        make_networks: Sequence[Callable[[], nn.Module]],
        num_classes: int,
        *,
        teachers: Sequence[nn.Module] = (),
        at_weight: float = 1000.0,
    ) -> None:
        check_number("--at-weight", at_weight)
        super().__init__(make_networks, num_classes, teachers=teachers)
        self.at_weight = at_weight

    def wanted(self, output: Any) -> Sequence[Tensor]:
        """See `Taught.wanted`."""
        return output.features

    def terms(self, student: Any, targets: Sequence[Sequence[Tensor]], labels: Tensor) -> dict[str, Tensor]:
        """See `Taught.terms`."""
        return {
            "student0_ce": cross_entropy(student.logits, labels),
            "student0_attention": at.term(student.features, targets[0], at_weight=self.at_weight),
        }
