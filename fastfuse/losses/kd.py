"""The losses of knowledge distillation (Hinton et al., arXiv 1503.02531)."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse import functional
from fastfuse.errors import InputError

DEFAULTS = {"temperature": 4.0, "kd_weight": 0.9}


def terms(
    student: Tensor, teachers: Sequence[Tensor], labels: Tensor, *, temperature: float, kd_weight: float
) -> dict[str, Tensor]:
    """(1 - w) CE, and w T^2 / N sum_n KL(softmax(z_n / T) || softmax(z / T)), as they enter the sum.

    Args:
        student: z, [B, K].
        teachers: z_n, N logits [B, K]; detached.
        labels: [B] int64.
        temperature: T.
        kd_weight: w, in 0..1.

    Raises:
        InputError: a teacher of other classes.
    """
    for i, row in enumerate(teachers):
        if row.shape != student.shape:
            raise InputError(
                f"teacher {i} tells {row.shape[-1]} classes apart and the student {student.shape[-1]}: kd compares "
                "logits; give a teacher of the same data"
            )
    count = len(teachers)
    found = functional.peer_kl_ce(
        [student, *teachers],
        labels,
        temperature=temperature,
        teachers=[list(range(1, count + 1)), *([] for _ in range(count))],
    )
    return {
        "student0_ce": (1.0 - kd_weight) * found.cross_entropy[0],
        "student0_kd": kd_weight * found.divergence[0],
    }
