"""Forward and backward of normalized_lp and its joint form in eager tensor code, for CPU tensors.

Also a check of the kernels' maths: nothing here is differentiated.
"""

from collections.abc import Sequence
from itertools import compress

import torch
from torch import Tensor

from fastfuse.kernels._numerics import accumulate, attention, reduce
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


def joint_forward(
    inputs: Sequence[Tensor], targets: Sequence[Tensor], p: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both losses [P] or [P, B], attention maps [2, sum of B H W], stats [10, P, B]: features' six, maps' four."""
    feature, stats = forward(inputs, targets, p, reduction)
    own, other = ([attention(x) for x in side] for side in (inputs, targets))
    through, map_stats = forward(own, other, 2, reduction)
    maps = torch.stack([torch.cat([a.flatten() for a in side]) for side in (own, other)])
    return feature, through, maps, torch.cat([stats, map_stats[:4]])


def joint_backward(
    feature_cotangent: Tensor,
    attention_cotangent: Tensor,
    maps: Tensor,
    stats: Tensor,
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    pairs: Sequence[int],
    starts: Sequence[int],
    wanted: Sequence[bool],
    p: int,
    reduction: str,
) -> list[Tensor]:
    """As `backward`, of the sum of both losses; `starts` are the places of the pairs' attention maps."""
    exact = [[accumulate(x) for x in side] for side in (inputs, targets)]
    small = [
        [
            row[start : start + x[:, :1].numel()].view(x.shape[0], *x.shape[2:])
            for x, start in zip(side, starts, strict=True)
        ]
        for side, row in zip(exact, maps, strict=True)
    ]
    feature = backward(feature_cotangent, stats[:6], *exact, pairs, wanted, p, reduction)
    through = backward(attention_cotangent, stats[6:], *small, pairs, wanted, 2, reduction)
    own = compress((*inputs, *targets), wanted)
    return [
        gradient_like(x).copy_(dx + accumulate(x) * da.unsqueeze(1) * (2 / max(x.shape[1], 1)))
        for x, dx, da in zip(own, feature, through, strict=True)
    ]


def _slope(a: Tensor, b: Tensor, p: int) -> Tensor:
    """Half the derivative of e^2, or that of |e|, with e = a - b."""
    return (a - b).sign() if p == 1 else a - b
