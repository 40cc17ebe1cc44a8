"""Forward and backward of attention_mse and attention_map in eager tensor code, for CPU tensors.

Also a check of the kernels' maths: nothing here is differentiated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels._numerics import accumulate, attention, reduce
from fastfuse.kernels._triton import map_like
from fastfuse.kernels.attention_mse import reference


def map_forward(features: Sequence[Tensor]) -> Tensor:
    """[B, H, W] of the concatenation of S maps."""
    return reference.attention_map(features)


def map_backward(cotangent: Tensor, wanted: Sequence[Tensor], total: int) -> list[Tensor]:
    """Gradients of the wanted features, dF = 2 F / C times the map's; `total` counts the channels of all."""
    factor = cotangent.unsqueeze(1) * (2 / total)
    return [map_like(x).copy_(accumulate(x) * factor) for x in wanted]


def forward(inputs: Sequence[Tensor], targets: Sequence[Tensor], reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [P] or [P, B], attention maps [2, sum of B H W], stats [4, P, B]: norms and dots for the backward."""
    losses, maps, stats = [], ([], []), []
    row = max(x.shape[0] for x in inputs)
    for pair in zip(inputs, targets, strict=True):
        flat = [attention(x).flatten(1) for x in pair]
        norms = [a.norm(dim=1) for a in flat]
        a, t = (x / n.clamp_min(1e-12)[:, None] for x, n in zip(flat, norms, strict=True))
        losses.append(reduce((a - t).square().mean(1), reduction))
        dots = (a * (a - t)).sum(1), (t * (t - a)).sum(1)
        found = torch.stack([*norms, *dots])
        stats.append(torch.nn.functional.pad(found, (0, row - found.shape[1])))
        for side, x in zip(maps, flat, strict=True):
            side.append(x.flatten())
    return torch.stack(losses), torch.stack([torch.cat(side) for side in maps]), torch.stack(stats, 1)


def backward(
    cotangent: Tensor,
    maps: Tensor,
    stats: Tensor,
    wanted: Sequence[Tensor],
    places: Sequence[int],
    starts: Sequence[int],
    reduction: str,
) -> list[Tensor]:
    """Gradients of the wanted ones of (*inputs, *targets), which stand at `places` among them."""
    return [
        map_like(x).copy_(_gradient(x, cotangent, maps, stats, place, start, reduction))
        for x, place, start in zip(wanted, places, starts, strict=True)
    ]


def _gradient(
    x: Tensor, cotangent: Tensor, maps: Tensor, stats: Tensor, place: int, start: int, reduction: str
) -> Tensor:
    side, pair = divmod(place, stats.shape[1])
    batch, positions = x.shape[0], x.shape[-2] * x.shape[-1]
    found = stats[:, pair, :batch, None]
    norms, dot = found[:2], found[2 + side]
    normalized = maps[:, start : start + batch * positions].view(2, batch, positions) / norms.clamp_min(1e-12)
    own, other = normalized[side], normalized[1 - side]
    slope = torch.where(norms[side] < 1e-12, 0, 2 / (norms[side] * positions))
    upstream = cotangent[pair, :, None] if reduction == "none" else cotangent[pair]
    upstream = upstream / batch if reduction == "mean" else upstream
    gradient = (upstream * slope * (own - other - dot * own)).view(batch, *x.shape[-2:])
    return gradient if x.dim() == 3 else gradient.unsqueeze(1) * (2 / x.shape[1]) * accumulate(x)
