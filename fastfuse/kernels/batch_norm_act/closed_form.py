"""Forward and backward in eager tensor code: the kernels' mathematics on tensors that they do not serve."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.kernels.batch_norm_act import layout


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
    attention_groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(batch norm(x) + residual), attention maps and the statistics used; updates the running ones if given."""
    out, attention, statistics = found = layout.empty_results(x, attention_groups)
    if x.numel() == 0:
        return found
    wide = statistics.dtype
    if running_mean is not None and running_var is not None:
        var, mean = torch.var_mean(x.to(wide), (0, 2, 3), correction=0)
        count = x.numel() // x.shape[1]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    statistics[0] = mean
    statistics[1] = (var.to(wide) + eps).rsqrt()
    values = _normalised(x, statistics, weight, bias)
    if residual is not None:
        values = values + residual.to(wide)
    out.copy_(values.relu() if relu else values)
    if attention_groups:
        attention.copy_(_by_group(out, attention_groups).to(wide).square().mean(2))
    return found


def backward(
    grad: Tensor | None,
    of_attention: Tensor | None,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    statistics: Tensor,
    training: bool,
    relu: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of x, residual, weight and bias; `out` is computed again where it is not given."""
    wide = statistics.dtype
    centred = (x.to(wide) - _column(statistics[0])) * _column(statistics[1])
    out = _normalised(x, statistics, weight, bias).to(x.dtype) if out is None else out
    g = torch.zeros_like(centred) if grad is None else grad.to(wide)
    if of_attention is not None:
        groups = len(of_attention)
        parts = 2 * groups / x.shape[1] * of_attention[:, :, None] * _by_group(out, groups)
        g = g + parts.transpose(0, 1).flatten(1, 2)
    if relu:
        g = torch.where(out <= 0, 0, g)
    of_weight, of_bias = (g * centred).sum((0, 2, 3)), g.sum((0, 2, 3))
    of_x = g
    if training and g.numel():
        count = g.numel() // g.shape[1]
        of_x = g - (_column(of_bias) + centred * _column(of_weight)) / count
    of_x = of_x * _column(statistics[1] * weight.to(wide))
    found = layout.empty_gradients(x, weight, bias, needed)
    return [t.copy_(v) for t, v in zip(found, (of_x, g, of_weight, of_bias), strict=True) if t is not None]


def _column(vector: Tensor) -> Tensor:
    """[C] as it is broadcast over [N, C, H, W]."""
    return vector[:, None, None]


def _by_group(x: Tensor, groups: int) -> Tensor:
    """[N, S C, H, W] as [S, N, C, H, W]."""
    return x.unflatten(1, (groups, -1)).transpose(0, 1)


def _normalised(x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The batch norm of x, in the dtype of the statistics."""
    wide = statistics.dtype
    centred = x.to(wide) - _column(statistics[0])
    return centred * _column(statistics[1] * weight.to(wide)) + _column(bias.to(wide))
