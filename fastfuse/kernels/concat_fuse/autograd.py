"""Schemas, fakes and autograd functions of both operators; torch only, kernels are loaded when first executed."""

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfuse.kernels import _library
from fastfuse.kernels._autograd import first_derivatives_only
from fastfuse.kernels.concat_fuse import closed_form, layout


def _conv1x1_fwd_fake(
    features: Sequence[Tensor], weight: Tensor, affine: Sequence[Tensor], statistics: bool
) -> list[Tensor]:
    return layout.product_results(features, weight, statistics)


def _conv1x1_bwd_fake(
    cotangents: Sequence[Tensor | None], kept: Sequence[Tensor], features: Sequence[Tensor], weight: Tensor,
    affine: Sequence[Tensor], needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    return [x for x in layout.empty_product_gradients(features, weight, affine, needs) if x is not None]


# affine: scale and shift, or nothing. The results are the map and, with statistics, its mean and biased variance; the
# cotangents are theirs, and the map and its mean are kept then. Gradients: of maps, weight, scale, shift.
_library.define(
    "concat_conv1x1_fwd",
    "(Tensor[] features, Tensor weight, Tensor[] affine, bool statistics) -> Tensor[]",
    fake=_conv1x1_fwd_fake,
    closed_form=closed_form.concat_conv1x1_fwd,
    launcher="fastfuse.kernels.concat_fuse.triton_products:launch_fwd",
)
_library.define(
    "concat_conv1x1_bwd",
    "(Tensor?[] cotangents, Tensor[] kept, Tensor[] features, Tensor weight, Tensor[] affine, bool[] needs)"
    " -> Tensor[]",
    fake=_conv1x1_bwd_fake,
    closed_form=closed_form.concat_conv1x1_bwd,
    launcher="fastfuse.kernels.concat_fuse.triton_products:launch_bwd",
)


class ConcatConv1x1(torch.autograd.Function):
    """1x1 convolution of S maps [B, C_s, H, W] by a weight [C_out, C, 1, 1]; saves its inputs.

    With statistics the result and its mean are saved too: the gradients of mean and variance need them.
    """

    @staticmethod
    def forward(
        ctx: Any, statistics: bool, weight: Tensor, scale: Tensor | None, shift: Tensor | None, *features: Tensor
    ) -> tuple[Tensor, ...]:
        """The map [B, C_out, H, W] and, with statistics, its mean and biased variance [C_out]."""
        affine = [] if scale is None else [scale, shift]
        found = torch.ops.fastfuse.concat_conv1x1_fwd(features, weight, affine, statistics)
        ctx.counts = len(found[:2]) if statistics else 0, len(affine)
        ctx.save_for_backward(*found[: ctx.counts[0]], *affine, weight, *features)
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the weight, scale, shift and each map, where needed."""
        kept, affine, (weight, *features) = _split(ctx.saved_tensors, *ctx.counts)
        _, needs_weight, *needs_affine = ctx.needs_input_grad[:4]
        needs = [*ctx.needs_input_grad[4:], needs_weight, *needs_affine[: len(affine)]]
        if all(x is None for x in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        found = iter(torch.ops.fastfuse.concat_conv1x1_bwd(cotangents, kept, features, weight, affine, needs))
        of_maps = [next(found) if needed else None for needed in ctx.needs_input_grad[4:]]
        return None, *[next(found) if needed else None for needed in ctx.needs_input_grad[1:4]], *of_maps


def _fuse_fwd_fake(
    features: Sequence[Tensor], counts: Sequence[int], parameters: Sequence[Tensor], frozen: Sequence[Tensor],
    running: Sequence[Tensor], results: Sequence[Tensor], training: Sequence[bool], options: Sequence[float],
    asked: Sequence[bool],
) -> None:  # fmt: skip
    """Nothing is returned."""


def _fuse_bwd_fake(
    cotangents: Sequence[Tensor | None], features: Sequence[Tensor], counts: Sequence[int],
    parameters: Sequence[Tensor], statistics: Sequence[Tensor], kept: Sequence[Tensor], training: Sequence[bool],
    options: Sequence[float], needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    modules = layout.modules_of(features, counts, parameters, statistics, training, options)
    return [x for own in layout.empty_gradients(modules, needs) for x in own if x is not None]


# Statistics of norms in evaluation mode come as `frozen`, those that a forward in training mode updates as `running`.
# Results are handed in: torch.compile takes no operator that both changes tensors and returns a list of them.
_library.define(
    "concat_fuse_fwd",
    "(Tensor[] features, int[] counts, Tensor[] parameters, Tensor[] frozen, Tensor(a!)[] running,"
    " Tensor(b!)[] results, bool[2] training, float[] options, bool[] asked) -> ()",
    fake=_fuse_fwd_fake,
    closed_form=closed_form.concat_fuse_fwd,
    launcher="fastfuse.kernels.concat_fuse.triton_launch:launch_fwd",
    joined="fastfuse.kernels.concat_fuse.joined:launch_fwd",
)
_library.define(
    "concat_fuse_bwd",
    "(Tensor?[] cotangents, Tensor[] features, int[] counts, Tensor[] parameters, Tensor[] statistics, Tensor[] kept,"
    " bool[2] training, float[] options, bool[] needs) -> Tensor[]",
    fake=_fuse_bwd_fake,
    closed_form=closed_form.concat_fuse_bwd,
    launcher="fastfuse.kernels.concat_fuse.triton_launch:launch_bwd",
    joined="fastfuse.kernels.concat_fuse.joined:launch_bwd",
)


class Options(NamedTuple):
    """What a call is told besides its tensors.

    Attributes:
        counts: maps of each module.
        training: of the first norms, of the second norms.
        numbers: momentum1, eps1, momentum2, eps2 of each module.
        asked: fused map, attention map and spatial mean, of each module.
        backend: "triton" or "cuda".
    """

    counts: tuple[int, ...]
    training: tuple[bool, bool]
    numbers: tuple[float, ...]
    asked: tuple[bool, ...]
    backend: str


class ConcatFuse(torch.autograd.Function):
    """M fusion modules of one size and one mode; saves their inputs, the statistics used and two maps of each.

    The maps are the first ReLU's output and the second norm's input.
    """

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Fused map, attention map and spatial mean of each module, empty where not asked for.

        `tensors`: four running statistics of each module, six parameters of each, then the maps of all.
        """
        modules, training = len(options.counts), options.training
        running, parameters = tensors[: 4 * modules], tensors[4 * modules : 10 * modules]
        features = tensors[10 * modules :]
        split = [[x for i, x in enumerate(running) if training[i % 4 // 2] == mode] for mode in (False, True)]
        called = layout.modules_of(
            features, options.counts, parameters, running, training, options.numbers, options.asked
        )
        results = [result for module in called for result in layout.empty_results(module)]
        _library.namespace(options.backend).concat_fuse_fwd(
            features, options.counts, parameters, *split, results, training, options.numbers, options.asked
        )
        found, kept, used = [], [], []
        for m in range(modules):
            *given, hidden, pre, statistics1, statistics2 = results[layout.RESULTS * m : layout.RESULTS * (m + 1)]
            found += given
            kept += [hidden, pre]
            for i, statistics in enumerate((statistics1, statistics2)):
                used += statistics.unbind() if training[i] else running[4 * m + 2 * i : 4 * m + 2 * i + 2]
        ctx.save_for_backward(*used, *parameters, *kept, *features)
        ctx.options = options
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x, asked in zip(found, options.asked, strict=True) if not asked])
        return tuple(found)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the parameters and of each map, where needed."""
        options, modules = ctx.options, len(ctx.options.counts)
        statistics, parameters, kept, features = _split(ctx.saved_tensors, 4 * modules, 6 * modules, 2 * modules)
        asked = ctx.needs_input_grad[1 + 4 * modules :]
        maps, needs = iter(asked[6 * modules :]), []
        for m, count in enumerate(options.counts):
            needs += [*asked[6 * m : 6 * m + 6], *islice(maps, count)]
        backward = _library.namespace(options.backend).concat_fuse_bwd
        gradients = iter(
            backward(
                cotangents, features, options.counts, parameters, statistics, kept, options.training, options.numbers,
                needs,
            )
        )  # fmt: skip
        found = iter([next(gradients) if needed else None for needed in needs])
        own = [(list(islice(found, 6)), list(islice(found, count))) for count in options.counts]
        of_parameters, of_maps = ([x for parts in own for x in parts[i]] for i in (0, 1))
        return None, *[None] * (4 * modules), *of_parameters, *of_maps


def _split(tensors: Sequence[Tensor], *lengths: int) -> list[Sequence[Tensor]]:
    """Consecutive parts of the lengths given, and the rest."""
    found = []
    for length in lengths:
        found.append(tensors[:length])
        tensors = tensors[length:]
    return [*found, tensors]
