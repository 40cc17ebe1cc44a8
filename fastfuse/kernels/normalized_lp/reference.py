"""Eager truth of normalized_lp."""

from torch import Tensor

from fastfuse.kernels._numerics import normalize, reduce


def normalized_lp(x: Tensor, target: Tensor, p: int, reduction: str) -> Tensor:
    """Per sample, the mean over C H W of |nrm(x) - nrm(target)|^p."""
    difference = normalize(x) - normalize(target)
    return reduce((difference.abs() if p == 1 else difference.square()).mean(1), reduction)
