"""attention_mse and attention_map as differentiable functions over registered operators."""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from fastfuse.kernels import _library
from fastfuse.kernels._autograd import first_derivatives_only
from fastfuse.kernels._triton import map_like
from fastfuse.kernels.attention_mse import closed_form

KERNELS = "fastfuse.kernels.attention_mse.triton_kernels"
MAP_KERNELS = "fastfuse.kernels.attention_mse.triton_maps"


class AttentionMap(torch.autograd.Function):
    """Attention [B, H, W] of the concatenation of maps; every map has one stride for its positions."""

    @staticmethod
    def forward(ctx: Any, backend: str, *features: Tensor) -> Tensor:
        """One launch, which reads every map once."""
        ctx.ops, ctx.total = _library.namespace(backend), sum(x.shape[1] for x in features)
        ctx.save_for_backward(*compress(features, ctx.needs_input_grad[1:]))
        return ctx.ops.attention_map_fwd(features)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """One launch for all the features that need it."""
        found = iter(ctx.ops.attention_map_bwd(cotangent, ctx.saved_tensors, ctx.total))
        return None, *(next(found) if asked else None for asked in ctx.needs_input_grad[1:])


class AttentionMse(torch.autograd.Function):
    """Losses [P] or [P, B] of P inputs and as many targets; every map has one stride for its positions."""

    @staticmethod
    def forward(ctx: Any, backend: str, reduction: str, *maps: Tensor) -> Tensor:
        """Saves the small attention maps, and of the maps those that need a gradient."""
        pairs, ctx.ops = len(maps) // 2, _library.namespace(backend)
        losses, attention, stats = ctx.ops.attention_mse_fwd(maps[:pairs], maps[pairs:], reduction)
        starts = [0]
        for x in maps[:pairs]:
            starts.append(starts[-1] + x.shape[0] * x.shape[-2] * x.shape[-1])
        ctx.places = [i for i, asked in enumerate(ctx.needs_input_grad[2:]) if asked]
        ctx.starts = [starts[i % pairs] for i in ctx.places]
        ctx.reduction = reduction
        ctx.save_for_backward(attention, stats, *(maps[i] for i in ctx.places))
        return losses

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        """One launch for all the maps that need it."""
        attention, stats, *wanted = ctx.saved_tensors
        found = iter(
            ctx.ops.attention_mse_bwd(cotangent, attention, stats, wanted, ctx.places, ctx.starts, ctx.reduction)
        )
        return None, None, *(next(found) if asked else None for asked in ctx.needs_input_grad[2:])


def _accumulated(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _empty_map(features: Sequence[Tensor]) -> Tensor:
    batch, _, height, width = features[0].shape
    return features[0].new_empty((batch, height, width), dtype=_accumulated(features[0]))


def _empty_map_gradients(cotangent: Tensor, wanted: Sequence[Tensor], total: int) -> list[Tensor]:
    return [map_like(x) for x in wanted]


def _empty_losses(inputs: Sequence[Tensor], targets: Sequence[Tensor], reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    pairs, row = len(inputs), max(x.shape[0] for x in inputs)
    size = sum(x.shape[0] * x.shape[-2] * x.shape[-1] for x in inputs)
    shapes = ((pairs, row) if reduction == "none" else (pairs,), (2, size), (4, pairs, row))
    return tuple(inputs[0].new_empty(shape, dtype=_accumulated(inputs[0])) for shape in shapes)


def _empty_gradients(
    cotangent: Tensor,
    maps: Tensor,
    stats: Tensor,
    wanted: Sequence[Tensor],
    places: Sequence[int],
    starts: Sequence[int],
    reduction: str,
) -> list[Tensor]:
    return [map_like(x) for x in wanted]


_library.define(
    "attention_map_fwd",
    "(Tensor[] features) -> Tensor",
    fake=_empty_map,
    closed_form=closed_form.map_forward,
    launcher=f"{MAP_KERNELS}:forward",
)
_library.define(
    "attention_map_bwd",
    "(Tensor cotangent, Tensor[] wanted, SymInt total) -> Tensor[]",
    fake=_empty_map_gradients,
    closed_form=closed_form.map_backward,
    launcher=f"{MAP_KERNELS}:backward",
)
_library.define(
    "attention_mse_fwd",
    "(Tensor[] inputs, Tensor[] targets, str reduction) -> (Tensor, Tensor, Tensor)",
    fake=_empty_losses,
    closed_form=closed_form.forward,
    launcher=f"{KERNELS}:forward",
)
_library.define(
    "attention_mse_bwd",
    "(Tensor cotangent, Tensor maps, Tensor stats, Tensor[] wanted, int[] places, SymInt[] starts, str reduction)"
    " -> Tensor[]",
    fake=_empty_gradients,
    closed_form=closed_form.backward,
    launcher=f"{KERNELS}:backward",
)
