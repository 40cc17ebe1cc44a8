"""The operators and their gradients in eager tensor code, by the formulas that the kernels compute.

For CPU tensors, and for tests that hold the formulas to autograd in float64. Nothing here is differentiated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels._numerics import accumulate
from fastfuse.kernels._triton import empty_map
from fastfuse.kernels.concat_fuse import layout
from fastfuse.kernels.concat_fuse.layout import Module, Norm


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
            found.append(empty_map(x).copy_(functional.conv2d(grad, w.transpose(0, 1))))
    if needs_weight:
        parts = [torch.einsum("bohw,bchw->oc", grad, x) for x in features]
        found.append(torch.empty_like(weight).copy_(torch.cat(parts, 1)[:, :, None, None]))
    return found


def concat_fuse_fwd(
    features: Sequence[Tensor], counts: Sequence[int], parameters: Sequence[Tensor], frozen: Sequence[Tensor],
    running: Sequence[Tensor], results: Sequence[Tensor], training: Sequence[bool], options: Sequence[float],
    asked: Sequence[bool],
) -> None:  # fmt: skip
    """Fill the results: those of `layout.empty_results` for each module in turn."""
    statistics = layout.in_order(frozen, running, training, len(counts))
    modules = layout.modules_of(features, counts, parameters, statistics, training, options, asked)
    for module, own in zip(modules, layout.per_module(results), strict=True):
        _forward(module, *own)


def _forward(
    module: Module, fused: Tensor, attention: Tensor, pooled: Tensor, hidden: Tensor, pre: Tensor,
    statistics1: Tensor, statistics2: Tensor,
) -> None:  # fmt: skip
    hidden.copy_(_normalise(_filtered(module), module.norm1, statistics1).relu())
    pre.copy_(concat_conv1x1_fwd([hidden], module.pointwise))
    y = _normalise(pre, module.norm2, statistics2).relu().to(pre.dtype)
    wide = accumulate(y)
    wanted = y, wide.square().mean(1), wide.mean((2, 3))
    for out, value, given in zip((fused, attention, pooled), wanted, module.asked, strict=True):
        if given:
            out.copy_(value)


def _filtered(module: Module) -> Tensor:
    taps = module.depthwise.to(module.features[0].dtype).split([x.shape[1] for x in module.features])
    pairs = zip(module.features, taps, strict=True)
    return torch.cat([functional.conv2d(x, w, padding=1, groups=x.shape[1]) for x, w in pairs], 1)


def _normalise(x: Tensor, norm: Norm, statistics: Tensor) -> Tensor:
    """Batch norm of a map in its accumulation dtype; fills the batch's statistics and updates the running ones."""
    x = accumulate(x)
    mean, var = norm.mean, norm.var
    count = x.numel() // x.shape[1]
    if norm.training and count:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        norm.mean.mul_(1 - norm.momentum).add_(mean, alpha=norm.momentum)
        norm.var.mul_(1 - norm.momentum).add_(var, alpha=norm.momentum * count / (count - 1))
        statistics.copy_(torch.stack([mean, var]))
    return _standardise(x, mean, var, norm.eps) * _column(norm.weight) + _column(norm.bias)


def _column(x: Tensor) -> Tensor:
    return accumulate(x)[:, None, None]


def _standardise(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (accumulate(x) - _column(mean)) / (_column(var) + eps).sqrt()


def concat_fuse_bwd(
    cotangents: Sequence[Tensor | None], features: Sequence[Tensor], counts: Sequence[int],
    parameters: Sequence[Tensor], statistics: Sequence[Tensor], kept: Sequence[Tensor], training: Sequence[bool],
    options: Sequence[float], needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """The gradients that are needed, of each module's six parameters and its maps."""
    modules = layout.modules_of(features, counts, parameters, statistics, training, options)
    found = layout.empty_gradients(modules, needs)
    for m, (module, gradients) in enumerate(zip(modules, found, strict=True)):
        values = _backward(module, cotangents[3 * m : 3 * m + 3], *kept[2 * m : 2 * m + 2])
        for out, value in zip(gradients, values, strict=True):
            if out is not None:
                out.copy_(value)
    return [x for gradients in found for x in gradients if x is not None]


def _backward(module: Module, cotangents: Sequence[Tensor | None], hidden: Tensor, pre: Tensor) -> list[Tensor]:
    first, second = module.norm1, module.norm2
    x = _standardise(pre, second.mean, second.var, second.eps)
    y = (x * _column(second.weight) + _column(second.bias)).relu()
    of_fused, of_attention, of_pooled = cotangents
    g = torch.zeros_like(x)
    if of_fused is not None:
        g = g + of_fused
    if of_attention is not None:
        g = g + of_attention[:, None] * y * (2 / y.shape[1])
    if of_pooled is not None:
        g = g + of_pooled[:, :, None, None] / (y.shape[2] * y.shape[3])
    of_pre, of_weight2, of_bias2 = _through_norm(g * (y > 0), x, second)
    of_hidden, of_pointwise = concat_conv1x1_bwd(of_pre.to(pre.dtype), [hidden], module.pointwise, [True], True)
    x = _standardise(_filtered(module), first.mean, first.var, first.eps)
    of_filtered, of_weight1, of_bias1 = _through_norm(accumulate(of_hidden) * (hidden > 0), x, first)
    widths = [f.shape[1] for f in module.features]
    taps = module.depthwise.to(pre.dtype).split(widths)
    of_features, of_taps = [], []
    for f, k, z in zip(module.features, taps, of_filtered.to(pre.dtype).split(widths, 1), strict=True):
        options = [1, 1], [1, 1], [1, 1], False, [0, 0], f.shape[1], [True, True, False]
        of_feature, of_tap, _ = torch.ops.aten.convolution_backward(z.contiguous(), f, k, None, *options)
        of_features.append(of_feature)
        of_taps.append(of_tap)
    return [torch.cat(of_taps), of_weight1, of_bias1, of_pointwise, of_weight2, of_bias2, *of_features]


def _through_norm(g: Tensor, x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a norm's input, weight and bias, from its output's and its standardised values."""
    of_bias, of_weight = g.sum((0, 2, 3)), (g * x).sum((0, 2, 3))
    count = g.numel() // g.shape[1]
    if norm.training and count:
        g = g - (_column(of_bias) + x * _column(of_weight)) / count
    return g * (_column(norm.weight) / (_column(norm.var) + norm.eps).sqrt()), of_weight, of_bias
