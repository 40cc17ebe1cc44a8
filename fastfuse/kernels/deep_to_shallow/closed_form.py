"""One stage, forward and backward, in eager tensor code: the kernels' mathematics on tensors that they do not serve."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels.deep_to_shallow import outputs


def stage_fwd(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    padding: Sequence[int],
    training: bool,
    keep: bool,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """relu(batch norm(transposed convolution)); updates the running statistics in training mode."""
    found = outputs.stage_outputs(x, weight, padding, keep, dtype)
    if x.numel() == 0:
        return found
    wide = found.mean.dtype
    values = functional.conv_transpose2d(x.to(dtype), weight.to(dtype), stride=2, padding=1, output_padding=padding)
    var, mean = running_var.to(wide), running_mean.to(wide)
    if training:
        var, mean = torch.var_mean(values.to(wide), (0, 2, 3), correction=0)
        count = values.numel() // values.shape[1]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    found.mean.copy_(mean)
    found.rstd.copy_((var + eps).rsqrt())
    if keep:
        found.normed.copy_(values)
    found.out.copy_(_normalise(values, found.mean, found.rstd, gamma, beta).relu())
    return found


def stage_bwd(
    grad: Tensor | None,
    carried: Tensor | None,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    kept: Tensor,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    keep: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of x, weight, gamma and beta; `kept` is the norm's input, or the output if not `keep`."""
    wide = mean.dtype
    g = sum(t.to(wide) for t in (grad, carried) if t is not None)
    scale = _channels(rstd * gamma.to(wide))
    if keep:
        g = torch.where(_normalise(kept, mean, rstd, gamma, beta) > 0, g, 0)
        centred = (kept.to(wide) - _channels(mean)) * _channels(rstd)
        gamma_sum = (g * centred).sum((0, 2, 3))
    else:
        g = torch.where(kept > 0, g, 0)
    beta_sum = g.sum((0, 2, 3))
    d = g * scale
    if training and g.numel():
        count = g.numel() // g.shape[1]
        d = d - scale * (_channels(beta_sum / count) + centred * _channels(gamma_sum / count))
    d = d.to(kept.dtype)
    computed = (
        lambda: functional.conv2d(d, weight.to(d.dtype), stride=2, padding=1),
        lambda: torch.nn.grad.conv2d_weight(d, weight.shape, x.to(d.dtype), stride=2, padding=1),
        lambda: gamma_sum,
        lambda: beta_sum,
    )
    found = outputs.stage_gradients(x, weight, gamma, beta, needed)
    return [g.copy_(value()) for g, value in zip(found, computed, strict=True) if g is not None]


def _channels(vector: Tensor) -> Tensor:
    """[C] as it is broadcast over [B, C, H, W]."""
    return vector[:, None, None]


def _normalise(values: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """(values - mean) rstd gamma + beta, in the dtype of the statistics."""
    wide = mean.dtype
    scale = rstd * gamma.to(wide)
    return (values.to(wide) - _channels(mean)) * _channels(scale) + _channels(beta.to(wide))
