"""Eager truth of normalized_lp and of its joint form."""

from torch import Tensor

from fastfuse.kernels._numerics import attention, normalize, reduce


def normalized_lp(x: Tensor, target: Tensor, p: int, reduction: str) -> Tensor:
    """Per sample, the mean over C H W of |nrm(x) - nrm(target)|^p."""
    difference = normalize(x) - normalize(target)
    return reduce((difference.abs() if p == 1 else difference.square()).mean(1), reduction)


def normalized_lp_joint(x: Tensor, target: Tensor, p: int, reduction: str) -> tuple[Tensor, Tensor]:
    """The distance of the maps and the squared one of their attention maps, which is that of attention_mse."""
    return normalized_lp(x, target, p, reduction), normalized_lp(attention(x), attention(target), 2, reduction)
