"""The operators and their gradients in eager tensor code, by the formulas that the kernels compute.

For CPU tensors, and for tests that hold the formulas to autograd in float64. Nothing here is differentiated.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastfuse.kernels._numerics import accumulate
from fastfuse.kernels.concat_fuse import layout
from fastfuse.kernels.concat_fuse.layout import Module, Norm


def concat_conv1x1_fwd(
    features: Sequence[Tensor], weight: Tensor, affine: Sequence[Tensor] = (), statistics: bool = False
) -> list[Tensor]:
    """Sum over maps of each map's own slice of the 1x1 convolution; mean and biased variance too if asked for."""
    found = layout.product_results(features, weight, statistics)
    loaded = [x if a is None else _loaded(x, *a) for x, a in zip(features, _per_map(features, affine), strict=True)]
    slices = weight.to(features[0].dtype).split([x.shape[1] for x in features], 1)
    found[0].copy_(sum(functional.conv2d(x, w) for x, w in zip(loaded, slices, strict=True)))
    if statistics:
        wide = accumulate(found[0])
        mean = found[1].copy_(wide.mean((0, 2, 3)))
        found[2].copy_((wide - _column(mean)).square().mean((0, 2, 3)))
    return found


def _per_map(features: Sequence[Tensor], affine: Sequence[Tensor]) -> Sequence[tuple[Tensor, ...] | None]:
    """Scale and shift of each map's channels."""
    widths = [x.shape[1] for x in features]
    return list(zip(*(v.split(widths) for v in affine), strict=True)) if affine else [None] * len(features)


def _loaded(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return (accumulate(x) * _column(scale) + _column(shift)).relu().to(x.dtype)


def concat_conv1x1_bwd(
    cotangents: Sequence[Tensor | None], kept: Sequence[Tensor], features: Sequence[Tensor], weight: Tensor,
    affine: Sequence[Tensor], needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Gradients that are needed of the maps, the weight, scale and shift, in this order.

    The gradients of mean m and variance v reach each of n values y of a channel as (dm + 2 dv (y - m)) / n.
    """
    grad, of_mean, of_var = (*cotangents, None, None)[:3]
    if of_mean is not None or of_var is not None:
        grad = _with_statistics(grad, of_mean, of_var, *kept)
    found = layout.empty_product_gradients(features, weight, affine, needs)
    of_loaded: list[tuple] = []
    own = zip(features, weight.to(grad.dtype).split([x.shape[1] for x in features], 1), strict=True)
    for (x, w), vectors in zip(own, _per_map(features, affine), strict=True):
        g = functional.conv2d(grad, w.transpose(0, 1))
        if vectors is None:
            of_loaded.append((x, g))
            continue
        scale, shift = map(_column, vectors)
        g = torch.where(accumulate(x) * scale + shift <= 0, 0, accumulate(g))
        of_loaded.append((_loaded(x, *vectors), g * scale, (g * x).sum((0, 2, 3)), g.sum((0, 2, 3))))
    loaded, *gradients = zip(*of_loaded, strict=True)
    of_weight = torch.cat([torch.einsum("bohw,bchw->oc", grad, x) for x in loaded], 1)[:, :, None, None]
    values = [*gradients[0], of_weight, *map(torch.cat, gradients[1:])]
    return [x.copy_(value) for x, value in zip(found, values, strict=True) if x is not None]


def _with_statistics(
    grad: Tensor | None, of_mean: Tensor | None, of_var: Tensor | None, out: Tensor, mean: Tensor
) -> Tensor:
    wide = accumulate(out)
    count = max(out.numel() // max(out.shape[1], 1), 1)
    total = torch.zeros_like(wide) if grad is None else accumulate(grad)
    if of_mean is not None:
        total = total + _column(of_mean) / count
    if of_var is not None:
        total = total + (wide - _column(mean)) * _column(of_var) * (2 / count)
    return total.to(out.dtype)


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
    pre.copy_(concat_conv1x1_fwd([hidden], module.pointwise)[0])
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
    of_hidden, of_pointwise = concat_conv1x1_bwd(
        [of_pre.to(pre.dtype)], [], [hidden], module.pointwise, [], [True, True]
    )
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
