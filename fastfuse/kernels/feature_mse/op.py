"""Public form of feature_mse, and its registration."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse.kernels import _students
from fastfuse.kernels.feature_mse import closed_form, reference

_students.define("feature_mse", "", closed_form)


def feature_mse(
    features: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor], *, backend: str = "auto"
) -> Tensor:
    """Squared distance of S students' maps from a target, averaged over all elements and summed over students.

    sum_s mean (F_s - T)^2; nothing is normalised (`normalized_lp` does that).

    Args:
        features: S maps [B, C, H, W], or one stack [S, B, C, H, W].
        target: one map [B, C, H, W] for all, or one each.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        0-d, float32 for half-precision maps.

    Raises:
        InputError, TypeError: maps and targets of different number, shape or device, or of wrong dtype.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    features, targets = _students.students_and_targets(features, target)
    if not _students.usable("feature_mse", backend, (*features, *targets)):
        return reference.feature_mse(features, targets)
    return _students.loss("feature_mse", features, target)
