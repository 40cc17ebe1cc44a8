"""Forward and backward of feature_mse in eager tensor code, for CPU tensors and as a check of the kernels' maths."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse.kernels import _students
from fastfuse.kernels._numerics import accumulate
from fastfuse.kernels.feature_mse import reference


def forward(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Loss; one target stands for all students."""
    return reference.feature_mse(features, _students.one_each(features, targets))


def backward(
    gradient: Tensor, features: Sequence[Tensor], targets: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Gradients of those of (*features, *targets) that are wanted, each in its map's dtype and strides."""
    pairs = zip(features, _students.one_each(features, targets), strict=True)
    own = [2 * gradient / max(f.numel(), 1) * (accumulate(f) - accumulate(t)) for f, t in pairs]
    return _students.closed_gradients(features, targets, own, [-g for g in own], wanted)
