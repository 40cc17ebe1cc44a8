"""One stage of T transforms in eager tensor code: the kernels' mathematics on tensors that they do not serve."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels.deep_to_shallow import outputs


def stage_fwd(
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    out: Sequence[Tensor],
    normed: Sequence[Tensor],
    means: Sequence[Tensor],
    rstds: Sequence[Tensor],
    training: bool,
    momentum: float,
    eps: float,
) -> None:
    """relu(batch norm(transposed convolution)); updates the running statistics in training mode."""
    given = zip(xs, weights, gammas, betas, running_means, running_vars, strict=True)
    for t, (x, weight, gamma, beta, running_mean, running_var) in enumerate(given):
        if x.numel() == 0:
            continue
        wide = means[t].dtype
        padding = [shallow - 2 * deep + 1 for shallow, deep in zip(out[t].shape[2:], x.shape[2:], strict=True)]
        values = _transposed(x, weight, padding, out[t].dtype)
        var, mean = running_var.to(wide), running_mean.to(wide)
        if training:
            var, mean = torch.var_mean(values.to(wide), (0, 2, 3), correction=0)
            count = values.numel() // values.shape[1]
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        means[t].copy_(mean)
        rstds[t].copy_((var + eps).rsqrt())
        if normed:
            normed[t].copy_(values)
        out[t].copy_(_normalise(values, means[t], rstds[t], gamma, beta).relu())


def stage_attention(
    xs: Sequence[Tensor],
    shifts: Sequence[Tensor],
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    padding: Sequence[int],
    last: bool,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Attention maps of the stage on running statistics, and its maps unless it is the last."""
    attentions, maps = outputs.attention_outputs(xs, weights, padding, last, dtype)
    given = zip(xs, weights, gammas, betas, running_means, running_vars, strict=True)
    for t, (x, weight, gamma, beta, running_mean, running_var) in enumerate(given):
        if x.numel() == 0:
            continue
        wide = attentions[t].dtype
        x = (x.to(wide) + shifts[t].unsqueeze(1)).to(dtype) if shifts else x
        values = _transposed(x, weight, padding, dtype)
        rstd = (running_var.to(wide) + eps).rsqrt()
        values = _normalise(values, running_mean.to(wide), rstd, gamma, beta).relu()
        attentions[t].copy_(values.square().mean(1))
        if maps:
            maps[t].copy_(values)
    return [*attentions, *maps]


def stage_bwd(
    grads: Sequence[Tensor],
    carried: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    kept: Sequence[Tensor],
    means: Sequence[Tensor],
    rstds: Sequence[Tensor],
    training: bool,
    keep: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    """The needed gradients of x, weight, gamma and beta; `kept` is the norm's input, or the output if not `keep`."""
    found = outputs.stage_gradients((xs, weights, gammas, betas), needed)
    given = zip(xs, weights, gammas, betas, kept, means, rstds, strict=True)
    for t, tensors in enumerate(given):
        incoming = [own[t].to(means[t].dtype) for own in (grads, carried) if own]
        computed = _gradients(sum(incoming), *tensors, training, keep)
        for gradients, value in zip(found, computed, strict=True):
            if gradients:
                gradients[t].copy_(value())
    return [g for gradients in found for g in gradients]


def _gradients(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    kept: Tensor,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    keep: bool,
) -> tuple[Callable[[], Tensor | None], ...]:
    """Functions that give the gradients of x, weight, gamma and beta from that of the stage's output."""
    scale = _channels(rstd * gamma.to(mean.dtype))
    gamma_sum = None
    if keep:
        g = torch.where(_normalise(kept, mean, rstd, gamma, beta) > 0, g, 0)
        centred = (kept.to(mean.dtype) - _channels(mean)) * _channels(rstd)
        gamma_sum = (g * centred).sum((0, 2, 3))
    else:
        g = torch.where(kept > 0, g, 0)
    beta_sum = g.sum((0, 2, 3))
    d = g * scale
    if training and g.numel():
        count = g.numel() // g.shape[1]
        d = d - scale * (_channels(beta_sum / count) + centred * _channels(gamma_sum / count))
    d = d.to(kept.dtype)
    return (
        lambda: functional.conv2d(d, weight.to(d.dtype), stride=2, padding=1),
        lambda: torch.nn.grad.conv2d_weight(d, weight.shape, x.to(d.dtype), stride=2, padding=1),
        lambda: gamma_sum,
        lambda: beta_sum,
    )


def _transposed(x: Tensor, weight: Tensor, padding: Sequence[int], dtype: torch.dtype) -> Tensor:
    return functional.conv_transpose2d(x.to(dtype), weight.to(dtype), stride=2, padding=1, output_padding=padding)


def _channels(vector: Tensor) -> Tensor:
    """[C] as it is broadcast over [B, C, H, W]."""
    return vector[:, None, None]


def _normalise(values: Tensor, mean: Tensor, rstd: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """(values - mean) rstd gamma + beta, in the dtype of the statistics."""
    wide = mean.dtype
    scale = rstd * gamma.to(wide)
    return (values.to(wide) - _channels(mean)) * _channels(scale) + _channels(beta.to(wide))
