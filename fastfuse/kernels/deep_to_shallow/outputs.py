"""What one stage gives back, allocated alike by the kernels, their fakes and the closed form."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfuse.kernels._triton import empty_map


class StageOutputs(NamedTuple):
    """Results of one stage's forward, one entry per transform.

    Attributes:
        out: the stage's maps [B, C_out, H_out, W_out].
        normed: what the norms took in, like `out`; empty where it is not kept.
        mean, rstd: [C_out] in the dtype of the statistics, what the norms subtracted and multiplied with.
    """

    out: list[Tensor]
    normed: list[Tensor]
    mean: list[Tensor]
    rstd: list[Tensor]


def alike(keys: Sequence[Any]) -> list[list[int]]:
    """Places of equal keys, in order of appearance."""
    groups: list[tuple[Any, list[int]]] = []
    for i, key in enumerate(keys):
        for other, members in groups:
            if other == key:
                members.append(i)
                break
        else:
            groups.append((key, [i]))
    return [members for _, members in groups]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics and sums are float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def stage_outputs(
    xs: Sequence[Tensor], weights: Sequence[Tensor], padding: Sequence[int], keep: bool, dtype: torch.dtype
) -> StageOutputs:
    """Uninitialised results; maps in the memory format of x."""
    out = _maps(xs, weights, padding, dtype)
    normed = [torch.empty_like(y) for y in out] if keep else []
    mean, rstd = ([y.new_empty(y.shape[1], dtype=statistics_dtype(dtype)) for y in out] for _ in range(2))
    return StageOutputs(out, normed, mean, rstd)


def attention_outputs(
    xs: Sequence[Tensor], weights: Sequence[Tensor], padding: Sequence[int], last: bool, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Uninitialised attention maps [B, H_out, W_out], and the maps themselves unless the stage is the last."""
    wide = statistics_dtype(dtype)
    attentions = [x.new_empty((x.shape[0], *_size(x, padding)), dtype=wide) for x in xs]
    return attentions, [] if last else _maps(xs, weights, padding, dtype)


def stage_gradients(tensors: Sequence[Sequence[Tensor]], needed: Sequence[bool]) -> list[list[Tensor]]:
    """Uninitialised gradients of x, weight, gamma and beta in their dtypes and formats; empty where not needed."""
    return [[_like(t) for t in own] if need else [] for own, need in zip(tensors, needed, strict=True)]


def _maps(xs: Sequence[Tensor], weights: Sequence[Tensor], padding: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    pairs = zip(xs, weights, strict=True)
    return [empty_map(x, weight.shape[1], size=_size(x, padding), dtype=dtype) for x, weight in pairs]


def _size(x: Tensor, padding: Sequence[int]) -> tuple[int, int]:
    return 2 * x.shape[2] - 1 + padding[0], 2 * x.shape[3] - 1 + padding[1]


def _like(t: Tensor) -> Tensor:
    return empty_map(t) if t.dim() == 4 else torch.empty_like(t)
