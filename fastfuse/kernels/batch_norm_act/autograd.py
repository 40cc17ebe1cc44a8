"""Schemas, fakes and autograd function of batch_norm_act; torch only, kernels are loaded when first executed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.kernels import _library
from fastfuse.kernels._autograd import first_derivatives_only
from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.batch_norm_act import closed_form, layout


def _fwd_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, mean: Tensor | None, var: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, momentum: float, eps: float, relu: bool,
    attention_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return layout.empty_results(x, attention_groups)


def _bwd_fake(
    grad: Tensor | None, of_attention: Tensor | None, x: Tensor, out: Tensor | None, weight: Tensor, bias: Tensor,
    statistics: Tensor, training: bool, relu: bool, needed: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return [g for g in layout.empty_gradients(x, weight, bias, needed) if g is not None]


_library.define(
    "batch_norm_act_fwd",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor? mean, Tensor? var, Tensor(a!)? running_mean,"
    " Tensor(b!)? running_var, float momentum, float eps, bool relu, int attention_groups)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    closed_form=closed_form.forward,
    launcher="fastfuse.kernels.batch_norm_act.triton_kernels:forward",
)
_library.define(
    "batch_norm_act_bwd",
    "(Tensor? grad, Tensor? of_attention, Tensor x, Tensor? out, Tensor weight, Tensor bias, Tensor statistics,"
    " bool training, bool relu, bool[4] needed) -> Tensor[]",
    fake=_bwd_fake,
    closed_form=closed_form.backward,
    launcher="fastfuse.kernels.batch_norm_act.triton_kernels:backward",
)


def batch_norm_act(
    x: Tensor, norm: BatchNorm, residual: Tensor | None, relu: bool, attention_groups: int | None
) -> tuple[Tensor, Tensor | None]:
    """The result and, for a number of groups, their attention maps."""
    options = norm.training, norm.momentum, norm.eps, relu, attention_groups or 0
    tensors = norm.weight, norm.bias, norm.running_mean, norm.running_var
    out, attention = BatchNormAct.apply(options, x, residual, *tensors)
    return out, attention if attention_groups else None


class BatchNormAct(torch.autograd.Function):
    """relu(batch norm(x) + residual); saves x, its statistics, and the result where only that tells the ReLU's cut."""

    @staticmethod
    def forward(
        ctx: Any,
        options: tuple[bool, float, float, bool, int],
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The result, and the attention maps, which are empty where not asked for."""
        training, momentum, eps, relu, attention_groups = options
        # Declared as mutated in training mode only.
        used = (None, None, mean, var) if training else (mean, var, None, None)
        out, attention, statistics = torch.ops.fastfuse.batch_norm_act_fwd(
            x, residual, weight, bias, *used, momentum, eps, relu, attention_groups
        )
        # Without a residual the result is computed again from x.
        keep = residual is not None and (relu or attention_groups)
        ctx.save_for_backward(x, out if keep else None, weight, bias, statistics)
        ctx.training, ctx.relu, ctx.with_attention = training, relu, bool(attention_groups)
        ctx.set_materialize_grads(False)
        if not attention_groups:
            ctx.mark_non_differentiable(attention)
        return out, attention

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, grad: Tensor | None, of_attention: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, residual, weight and bias, where needed."""
        if not ctx.with_attention:
            of_attention = None  # compiled graphs give zeros
        needed = list(ctx.needs_input_grad[1:5])
        found: list[Tensor | None] = [None] * 4
        if not ctx.relu and of_attention is None and needed[1]:
            found[1], needed[1] = grad, False
        if any(needed) and (grad is not None or of_attention is not None):
            backward = torch.ops.fastfuse.batch_norm_act_bwd
            gradients = iter(backward(grad, of_attention, *ctx.saved_tensors, ctx.training, ctx.relu, needed))
            found = [next(gradients) if need else known for need, known in zip(needed, found, strict=True)]
        return None, *found, None, None
