"""DML: deep mutual learning (Zhang et al., arXiv 1706.00384)."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.methods.independent import Independent


class DML(Independent):
    """S networks that learn from each other's softened predictions; the first is deployed.

    The terms are FFSD's `student_ce` and `student_dml`: T^2 / (S - 1) sum over peers of KL, T = 2; the original paper
    has T = 1.

    Args:
        make_networks: each gives a freshly initialised network, at least two; they may differ in architecture.
        num_classes: K.
        temperature: T.
    """

    name = "dml"
    minimum_students = 2
    defaults = {"temperature": 2.0}  # noqa: RUF012 - declared as a ClassVar[Mapping] in Method

    def __init__(
        self, make_networks: Sequence[Callable[[], nn.Module]], num_classes: int, *, temperature: float = 2.0
    ) -> None:
        super().__init__(make_networks, num_classes)
        if not temperature > 0:
            raise InputError(f"temperature must be positive, not {temperature}")
        self.temperature = temperature

    def terms(self, logits: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The loss terms of one batch."""
        losses = functional.peer_kl_ce(list(logits.values()), labels, temperature=self.temperature)
        cross_entropy, divergence = losses.cross_entropy.unbind(0), losses.divergence.unbind(0)
        found = {f"{name}_ce": term for name, term in zip(logits, cross_entropy, strict=True)}
        return found | {f"{name}_dml": term for name, term in zip(logits, divergence, strict=True)}
