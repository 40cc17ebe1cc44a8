"""Forward and backward of normalized_lp in eager tensor code, for CPU tensors and as a check of the kernels' maths."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels._numerics import accumulate, reduce
from fastfuse.kernels.normalized_lp.layout import gradient_like


def forward(inputs: Sequence[Tensor], targets: Sequence[Tensor], p: int, reduction: str) -> tuple[Tensor, Tensor]:
    """Losses [P] or [P, B], stats [6, P, B]: norms, dots and the norms' ratio for the backward."""
    losses, stats = [], []
    row = max(x.shape[0] for x in inputs)
    for pair in zip(inputs, targets, strict=True):
        flat = [accumulate(x).flatten(1) for x in pair]
        norms = [x.norm(dim=1) for x in flat]
        a, b = (x / n.clamp_min(1e-12)[:, None] for x, n in zip(flat, norms, strict=True))
        distance = (a - b).abs() if p == 1 else (a - b).square()
        losses.append(reduce(distance.mean(1), reduction))
        g = _slope(a, b, p)
        ratio = norms[0].clamp_min(1e-12) / norms[1].clamp_min(1e-12)
        found = torch.stack([*norms, (a * g).sum(1), -(b * g).sum(1), ratio, torch.zeros_like(ratio)])
        stats.append(torch.nn.functional.pad(found, (0, row - found.shape[1])))
    return torch.stack(losses), torch.stack(stats, 1)


def backward(
    cotangent: Tensor,
    stats: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    pairs: Sequence[int],
    wanted: Sequence[bool],
    p: int,
    reduction: str,
) -> list[Tensor]:
    """Gradients of those of (*inputs, *targets) that are wanted; the inputs' pairs are counted as in the forward."""
    gradients: tuple[list[Tensor], list[Tensor]] = ([], [])
    for i, (x, y, pair) in enumerate(zip(inputs, targets, pairs, strict=True)):
        batch, elements = x.shape[0], x.shape[1:].numel()
        found = stats[:, pair, :batch, None]
        a, b = (accumulate(m).flatten(1) / found[side].clamp_min(1e-12) for side, m in enumerate((x, y)))
        g = _slope(a, b, p)
        upstream = cotangent[pair, :, None] if reduction == "none" else cotangent[pair]
        upstream = upstream * p / (max(elements, 1) * (batch if reduction == "mean" else 1))
        for side, (m, own, slope) in enumerate(((x, a, g), (y, b, -g))):
            if wanted[i + side * len(inputs)]:
                scale = torch.where(found[side] < 1e-12, 0, upstream / found[side])
                gradient = scale * (slope - found[2 + side] * own)
                gradients[side].append(gradient_like(m).copy_(gradient.view(m.shape)))
    return [*gradients[0], *gradients[1]]


def _slope(a: Tensor, b: Tensor, p: int) -> Tensor:
    """Half the derivative of e^2, or that of |e|, with e = a - b."""
    return (a - b).sign() if p == 1 else a - b
