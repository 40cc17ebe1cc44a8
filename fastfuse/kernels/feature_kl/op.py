"""Public form of feature_kl, and its registration."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _students
from fastfuse.kernels.feature_kl import closed_form, reference

_students.define("feature_kl", ", float temperature, bool over_channels", closed_form)


def feature_kl(
    features: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    temperature: float,
    over: str = "positions",
    backend: str = "auto",
) -> Tensor:
    """Temperature KL between the maps of S students and a target, summed over students.

    sum_s T^2 mean KL(softmax(target / T) || softmax(F_s / T)); over "positions" there is one distribution over H W for
    every sample and channel (channel-wise distillation, arXiv 2011.13256), over "channels" one over C for every sample
    and position; the mean is over these distributions.

    Args:
        features: S maps [B, C, H, W], or one stack [S, B, C, H, W].
        target: one map [B, C, H, W] for all, or one each.
        temperature: T > 0.
        over: "positions" or "channels".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        0-d, float32 for half-precision maps.

    Raises:
        InputError, TypeError: maps and targets of different number, shape or device, wrong dtype, T <= 0, an unknown
            `over`.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    features, targets = _students.students_and_targets(features, target)
    if not temperature > 0:
        raise InputError(f"temperature must be positive, not {temperature}")
    if over not in ("positions", "channels"):
        raise InputError(f"over is 'positions' or 'channels', not {over!r}")
    if not _students.usable("feature_kl", backend, (*features, *targets)):
        return reference.feature_kl(features, targets, temperature, over)
    return _students.loss("feature_kl", features, target, float(temperature), over == "channels")
