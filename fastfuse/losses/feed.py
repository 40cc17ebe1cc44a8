"""The loss of Factor Transfer (Kim et al., arXiv 1802.04977) and FEED (Park and Kwak, arXiv 1909.10754)."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastfuse import functional
from fastfuse.errors import InputError

FT_DEFAULTS: dict[str, Any] = {"factor_weight": 500.0, "factor_ratio": 0.5, "translator_norm": False}
SEQUENTIAL_DEFAULTS = FT_DEFAULTS | {"factor_targets": "raw"}
PARALLEL_DEFAULTS = SEQUENTIAL_DEFAULTS | {"teacher_reduction": "sum"}
TARGETS = ("raw", "paraphrased")
REDUCTIONS = ("sum", "mean")


def factor_width(channels: int, factor_ratio: float) -> int:
    """Channels m of the factor of a map of C channels: C times the ratio, rounded."""
    return round(channels * factor_ratio)


def term(
    translated: Sequence[Tensor], targets: Sequence[Tensor], *, factor_weight: float, reduction: str = "sum"
) -> Tensor:
    """beta times the sum or mean over teachers of the mean of |TL_n(F) / |TL_n(F)| - X_n / |X_n||, 0-d.

    Norms are of whole samples; the mean is over the batch and all elements.

    Args:
        translated: TL_n(F), what each translator makes of the student's last map, [B, m_n, H, W].
        targets: X_n, each teacher's last map or its factor; detached.
        factor_weight: beta.
        reduction: "sum" or "mean" over teachers.

    Raises:
        InputError: a target of another height or width.
    """
    for i, (ours, theirs) in enumerate(zip(translated, targets, strict=True)):
        if ours.shape[-2:] != theirs.shape[-2:]:
            raise InputError(
                f"the last map of teacher {i} is {list(theirs.shape[-2:])} and the student's {list(ours.shape[-2:])}: "
                "factors are of one height and width; choose a teacher of the student's family, or --taps of that size"
            )
    distances = functional.normalized_lp(list(translated), [x.detach() for x in targets], p=1)
    return factor_weight * (distances.sum() if reduction == "sum" else distances.mean())
