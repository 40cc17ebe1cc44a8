"""Forward and backward of feature_kl in eager tensor code, for CPU tensors and as a check of the kernels' maths."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from fastfuse.kernels import _students
from fastfuse.kernels._numerics import accumulate
from fastfuse.kernels.feature_kl import reference


def forward(features: Sequence[Tensor], targets: Sequence[Tensor], temperature: float, over_channels: bool) -> Tensor:
    """Loss; one target stands for all students."""
    over = "channels" if over_channels else "positions"
    return reference.feature_kl(features, _students.one_each(features, targets), temperature, over)


def backward(
    gradient: Tensor,
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    temperature: float,
    over_channels: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of (*features, *targets) that are wanted, each in its map's dtype and strides."""
    dim = 1 if over_channels else 2
    own, goals = [], []
    for feature, target in zip(features, _students.one_each(features, targets), strict=True):
        rows = [accumulate(x).flatten(2) / temperature for x in (feature, target)]
        log_p, log_q = (functional.log_softmax(x, dim) for x in rows)
        p, q, ratio = log_p.exp(), log_q.exp(), log_q - log_p
        distributions = max(feature.numel() // max(rows[0].shape[dim], 1), 1)
        scale = gradient * temperature / distributions
        own.append((scale * (p - q)).view(feature.shape))
        goals.append((scale * q * (ratio - (q * ratio).sum(dim, keepdim=True))).view(feature.shape))
    return _students.closed_gradients(features, targets, own, goals, wanted)
