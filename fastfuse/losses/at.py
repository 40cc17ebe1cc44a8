"""The losses of attention transfer (Zagoruyko and Komodakis, arXiv 1612.03928), as the published program has them."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse import functional
from fastfuse.errors import InputError

DEFAULTS = {"at_weight": 1000.0}


def term(student: Sequence[Tensor], teacher: Sequence[Tensor], *, at_weight: float) -> Tensor:
    """at_weight times the sum over stages of the mean of (att(F) / |att(F)| - att(F_T) / |att(F_T)|)^2, 0-d.

    Args:
        student: a map [B, C, H, W] of each stage.
        teacher: as many, of any channels; detached.
        at_weight: beta.

    Raises:
        InputError: other numbers of stages, or a stage of another height or width.
    """
    if len(student) != len(teacher):
        raise InputError(
            f"the teacher has maps of {len(teacher)} stages and the student of {len(student)}: at compares stage by "
            "stage; choose networks of one family, or --taps as many layers"
        )
    for i, (ours, theirs) in enumerate(zip(student, teacher, strict=True)):
        if ours.shape[-2:] != theirs.shape[-2:]:
            sizes = (f"{list(x.shape[-2:])}" for x in (theirs, ours))
            raise InputError(
                "stage {}: the teacher's map is {} and the student's {}: at compares maps of one height and width; "
                "choose networks of one family".format(i + 1, *sizes)
            )
    return at_weight * functional.attention_mse(list(student), [x.detach() for x in teacher]).sum()
