"""The losses of DFA (Guan et al., ECCV 2020, arXiv 2008.00506): aggregated teacher maps and the distance from them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.models.stages import norms_behind

DEFAULTS = {"dfa_weight": 1.0, "distance": "l2", "aggregation": "searched"}
SEARCH_DEFAULTS = {"gamma_st": 1.0, "gamma_ts": 1.0, "alpha_lr": 3e-4, "alpha_weight_decay": 1e-3}
DISTANCES = ("l2", "ofd")


def aggregate(maps: Sequence[Tensor], weights: Tensor) -> Tensor:
    """A = sum_j alpha_j T_j, where a network has to read it; the distance from A needs no A, see `group_distance`.

    Args:
        maps: N maps [B, C, H, W].
        weights: [N], or [N, C] with weights of each channel. Gradients flow to them.
    """
    alphas = weights.reshape(len(maps), -1, 1, 1).unbind()
    total = alphas[0] * maps[0]
    for alpha, x in zip(alphas[1:], maps[1:], strict=True):
        total = torch.addcmul(total, alpha, x)
    return total


def group_distance(maps: Sequence[Tensor], weights: Tensor, target: Tensor, *, group: int) -> Tensor:
    """D(A, r), the mean over all elements of (sum_j alpha_j T_j - r)^2, without writing A.

    Args:
        maps: the teacher's candidates T_j of one group, [B, C, H, W] each.
        weights: alpha [N].
        target: r, the student's last map of the group behind its connector, [B, C, H, W].
        group: for messages, counted from 0.

    Raises:
        InputError: student and teacher have maps of different height or width in this group.
    """
    check_resolution(maps, target, group)
    return functional.aggregate_distance(maps, weights, target)


def check_resolution(maps: Sequence[Tensor], target: Tensor, group: int) -> None:
    """Refuse a group whose maps have one size in the teacher and another in the student."""
    theirs, own = (list(x.shape[-2:]) for x in (maps[0], target))
    if theirs != own:
        raise InputError(
            f"group {group + 1}: the teacher's maps are {theirs} and the student's {own}: a group has the same height "
            "and width in both; choose a teacher and a student of one family of networks"
        )


class MarginDistance(nn.Module):
    """Overhaul distillation's distance (arXiv 1904.01866) from aggregated maps: margin ReLU, then partial L2.

    P_j = norm_j(T_j), the candidates behind the teacher's norm, which the ReLU reads; A = sum_j alpha_j P_j and margin
    m = sum_j alpha_j m_j per channel, t = max(A, m); D = sum of (r - t)^2 where r > t or t > 0, over 1000 B.
    Of one candidate with weight 1 this is the published program's, whose teacher though takes the batch's statistics.

    Args:
        norms: one for each candidate, copied as it is; None: the maps end with a ReLU, so P_j = T_j and m = 0.
        channels: C of the candidates.
        count: N, the number of candidates.
    """

    scale: Tensor
    shift: Tensor
    margins: Tensor

    def __init__(self, norms: Sequence[nn.BatchNorm2d] | None, *, channels: int, count: int) -> None:
        super().__init__()
        scale, shift, margins = torch.ones(count, channels), torch.zeros(count, channels), torch.zeros(count, channels)
        if norms is not None:
            scale, shift = (torch.stack(rows) for rows in zip(*map(_affine, norms), strict=True))
            margins = torch.stack([margin(norm) for norm in norms])
        # Of the teacher, which is no part of a state dict either.
        for name, value in (("scale", scale), ("shift", shift), ("margins", margins)):
            self.register_buffer(name, value, persistent=False)

    def forward(self, maps: Sequence[Tensor], weights: Tensor, target: Tensor, *, group: int) -> Tensor:
        """See `group_distance`; 0-d, float32 at least."""
        check_resolution(maps, target, group)
        dtype = torch.promote_types(target.dtype, torch.float32)
        alphas, target = weights.to(dtype)[:, None], target.to(dtype)
        shift, least = ((alphas * x).sum(0)[:, None, None] for x in (self.shift, self.margins))
        wanted = torch.maximum(aggregate([x.to(dtype) for x in maps], alphas * self.scale) + shift, least)
        counted = (target > wanted) | (wanted > 0)
        return ((target - wanted).square() * counted).sum() / (1000 * target.shape[0])


def margin(norm: nn.BatchNorm2d) -> Tensor:
    """E[x | x < 0] of each channel [C], x normal with mean bias and deviation |weight|.

    Where P(x < 0) <= 0.001 it is -3 |weight|, as in the program of overhaul distillation (arXiv 1904.01866).
    """
    mean, deviation = norm.bias.detach().double(), norm.weight.detach().double().abs()
    # A channel that does not vary is the limit of ones that hardly do.
    z = mean / deviation.clamp_min(1e-30)
    below = torch.special.log_ndtr(-z)
    density = (-z.square() / 2 - below).exp() / math.sqrt(2 * math.pi)
    found = torch.where(below > math.log(0.001), mean - deviation * density, -3 * deviation)
    return torch.where(deviation > 1e-30, found, mean.clamp_max(0)).to(norm.weight.dtype)


def margin_distances(teacher: nn.Module) -> nn.ModuleList:
    """A `MarginDistance` for each group of a teacher with stages."""
    staged: Any = teacher
    norms, blocks = norms_behind(teacher), staged.stage_blocks
    return nn.ModuleList(
        MarginDistance(None if norms is None else norms[i], channels=channels, count=len(blocks[i]))
        for i, channels in enumerate(staged.feature_channels)
    )


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] that are a norm in evaluation."""
    scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias.detach() - norm.running_mean * scale
