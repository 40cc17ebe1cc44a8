"""What one stage gives back, allocated alike by the kernels, their fakes and the closed form."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class StageOutputs(NamedTuple):
    """Results of one stage's forward.

    Attributes:
        out: the stage's map [B, C_out, H_out, W_out].
        normed: what the norm took in, like `out`; empty where it is not kept.
        mean, rstd: [C_out] in the dtype of the statistics, what the norm subtracted and multiplied with.
    """

    out: Tensor
    normed: Tensor
    mean: Tensor
    rstd: Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and sums are float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stage_outputs(x: Tensor, weight: Tensor, padding: Sequence[int], keep: bool, dtype: torch.dtype) -> StageOutputs:
    """Uninitialised results; maps in the memory format of x."""
    batch, _, height, width = x.shape
    size = batch, weight.shape[1], 2 * height - 1 + padding[0], 2 * width - 1 + padding[1]
    out = _empty(x, size, dtype)
    normed = torch.empty_like(out) if keep else out.new_empty(0)
    mean, rstd = (out.new_empty(weight.shape[1], dtype=statistics_dtype(dtype)) for _ in range(2))
    return StageOutputs(out, normed, mean, rstd)


def stage_gradients(
    x: Tensor, weight: Tensor, gamma: Tensor, beta: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Uninitialised gradients in the dtypes and formats of the tensors, None where they are not needed."""
    found = []
    for t, need in zip((x, weight, gamma, beta), needed, strict=True):
        made = (_empty(t, t.shape, t.dtype) if t.dim() == 4 else torch.empty_like(t)) if need else None
        found.append(made)
    return found


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Channels-last where `like` is so and not contiguous as well, else contiguous: layouts that kernels can write."""
    last = like.is_contiguous(memory_format=torch.channels_last) and not like.is_contiguous()
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)
