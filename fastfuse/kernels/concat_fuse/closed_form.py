"""The operators and their gradients in eager tensor code, by the formulas that the kernels compute.

For CPU tensors, and for tests that hold the formulas to autograd in float64. Nothing here is differentiated.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels._numerics import accumulate
from fastfuse.kernels.concat_fuse.layout import Norm, empty_map, gradient_of, gradient_of_weight


def concat_conv1x1_fwd(features: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Sum over maps of each map's own slice of the 1x1 convolution."""
    slices = weight.to(features[0].dtype).split([x.shape[1] for x in features], 1)
    total = sum(functional.conv2d(x, w) for x, w in zip(features, slices, strict=True))
    return empty_map(features[0], weight.shape[0]).copy_(total)


def concat_conv1x1_bwd(
    grad: Tensor, features: Sequence[Tensor], weight: Tensor, needs_features: Sequence[bool], needs_weight: bool
) -> list[Tensor]:
    """Gradients of the maps that need one, in order, then the weight's if it is needed."""
    found = []
    slices = weight.to(grad.dtype).split([x.shape[1] for x in features], 1)
    for x, w, needed in zip(features, slices, needs_features, strict=True):
        if needed:
            found.append(gradient_of(x).copy_(functional.conv2d(grad, w.transpose(0, 1))))
    if needs_weight:
        parts = [torch.einsum("bohw,bchw->oc", grad, x) for x in features]
        found.append(torch.empty_like(weight).copy_(torch.cat(parts, 1)[:, :, None, None]))
    return found


def concat_fuse_fwd(
    features: Sequence[Tensor], depthwise: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fused map, its attention and mean, the first ReLU's output, the second norm's input, batch statistics."""
    norm1, pointwise, norm2, (attention, pooled) = Norm(*rest[:8]), rest[8], Norm(*rest[9:17]), rest[17:]
    first = features[0]
    x, statistics1 = _normalise(_filtered(features, depthwise), norm1)
    hidden = empty_map(first, x.shape[1]).copy_(x.relu())
    pre = concat_conv1x1_fwd([hidden], pointwise)
    x, statistics2 = _normalise(pre, norm2)
    fused = empty_map(first, x.shape[1]).copy_(x.relu())
    wide = accumulate(fused)
    energy = wide.square().mean(1) if attention else wide.new_empty(0)
    mean = wide.mean((2, 3)).to(fused.dtype) if pooled else fused.new_empty(0)
    return fused, energy, mean, hidden, pre, statistics1, statistics2


def _filtered(features: Sequence[Tensor], depthwise: Tensor) -> Tensor:
    taps = depthwise.to(features[0].dtype).split([x.shape[1] for x in features])
    pairs = zip(features, taps, strict=True)
    return torch.cat([functional.conv2d(x, w, padding=1, groups=x.shape[1]) for x, w in pairs], 1)


def _normalise(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Batch norm of a map in its accumulation dtype, and the batch's statistics; updates the running ones."""
    x = accumulate(x)
    statistics = norm.statistics(x)
    mean, var = norm.mean, norm.var
    if norm.training:
        count = x.numel() // x.shape[1]
        if count:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            norm.running_mean.mul_(1 - norm.momentum).add_(mean, alpha=norm.momentum)
            norm.running_var.mul_(1 - norm.momentum).add_(var, alpha=norm.momentum * count / (count - 1))
            statistics.copy_(torch.stack([mean, var]))
        else:
            mean, var = norm.running_mean, norm.running_var
    return _standardise(x, mean, var, norm.eps) * _column(norm.weight) + _column(norm.bias), statistics


def _column(x: Tensor) -> Tensor:
    return accumulate(x)[:, None, None]


def _standardise(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (accumulate(x) - _column(mean)) / (_column(var) + eps).sqrt()


def concat_fuse_bwd(
    of_fused: Tensor | None, of_attention: Tensor | None, of_pooled: Tensor | None,
    features: Sequence[Tensor], depthwise: Tensor, weight1: Tensor, bias1: Tensor, mean1: Tensor, var1: Tensor,
    eps1: float, training1: bool, pointwise: Tensor, weight2: Tensor, bias2: Tensor, mean2: Tensor, var2: Tensor,
    eps2: float, training2: bool, hidden: Tensor, pre: Tensor, needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients, where needed, of depthwise, weight1, bias1, pointwise, weight2, bias2 and the maps, in this order."""
    x = _standardise(pre, mean2, var2, eps2)
    y = (x * _column(weight2) + _column(bias2)).relu()
    g = torch.zeros_like(x)
    if of_fused is not None:
        g = g + of_fused
    if of_attention is not None:
        g = g + of_attention[:, None] * y * (2 / y.shape[1])
    if of_pooled is not None:
        g = g + of_pooled[:, :, None, None] / (y.shape[2] * y.shape[3])
    of_pre, of_weight2, of_bias2 = _through_norm(g * (y > 0), x, weight2, var2, eps2, training2)
    of_hidden, of_pointwise = concat_conv1x1_bwd(of_pre.to(pre.dtype), [hidden], pointwise, [True], True)
    x = _standardise(_filtered(features, depthwise), mean1, var1, eps1)
    g = accumulate(of_hidden) * (hidden > 0)
    of_filtered, of_weight1, of_bias1 = _through_norm(g, x, weight1, var1, eps1, training1)
    of_filtered = of_filtered.to(pre.dtype)
    widths = [f.shape[1] for f in features]
    of_features, of_taps = [], []
    taps = depthwise.to(pre.dtype).split(widths)
    for f, k, z in zip(features, taps, of_filtered.split(widths, 1), strict=True):
        options = [1, 1], [1, 1], [1, 1], False, [0, 0], f.shape[1], [True, True, False]
        of_feature, of_tap, _ = torch.ops.aten.convolution_backward(z.contiguous(), f, k, None, *options)
        of_features.append(gradient_of(f).copy_(of_feature))
        of_taps.append(of_tap)
    of_depthwise = gradient_of_weight(depthwise).copy_(torch.cat(of_taps))
    vectors = [
        torch.empty_like(parameter).copy_(found)
        for parameter, found in ((weight1, of_weight1), (bias1, of_bias1), (weight2, of_weight2), (bias2, of_bias2))
    ]
    found = [of_depthwise, *vectors[:2], of_pointwise, *vectors[2:], *of_features]
    return [x for x, needed in zip(found, needs, strict=True) if needed]


def _through_norm(
    g: Tensor, x: Tensor, weight: Tensor, var: Tensor, eps: float, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a norm's input, weight and bias, from its output's and its standardised values."""
    of_bias, of_weight = g.sum((0, 2, 3)), (g * x).sum((0, 2, 3))
    count = g.numel() // g.shape[1]
    if training and count:
        g = g - (_column(of_bias) + x * _column(of_weight)) / count
    return g * (_column(weight) / (_column(var) + eps).sqrt()), of_weight, of_bias
