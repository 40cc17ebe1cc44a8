"""Shapes, memory formats and arguments that fakes, closed forms and kernels of this folder share."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.kernels._triton import empty_map

_PLAIN = torch.contiguous_format
PARAMETERS = 6  # of a module: depthwise, weight1, bias1, pointwise, weight2, bias2
RESULTS = 7  # of a module, as `empty_results` gives them


def gradient_of_weight(weight: Tensor) -> Tensor:
    """An uninitialised gradient of a convolution's weight, whose kernel positions follow each other in memory."""
    return torch.empty_like(weight) if weight.is_contiguous() else torch.empty_like(weight, memory_format=_PLAIN)


def product_results(features: Sequence[Tensor], weight: Tensor, statistics: bool) -> list[Tensor]:
    """Uninitialised result of a 1x1 product of maps and, if asked for, its mean and biased variance [C_out]."""
    first, outputs = features[0], weight.shape[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    return [empty_map(first, outputs), *(first.new_empty(outputs, dtype=wide) for _ in range(2 * statistics))]


def empty_product_gradients(
    features: Sequence[Tensor], weight: Tensor, affine: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Uninitialised gradients of maps, weight and, where there are any, scale and shift; None if not needed."""
    makers = [*[empty_map] * len(features), *[torch.empty_like] * (1 + len(affine))]
    triples = zip(makers, (*features, weight, *affine), needs, strict=True)
    return [make(x) if needed else None for make, x, needed in triples]


class Norm(NamedTuple):
    """One batch norm of a module.

    Attributes:
        weight, bias: [C].
        mean, var: [C], the running ones in a forward, those that were used in a backward.
        training: whether the batch's statistics normalise (and a forward updates the running ones in place).
        momentum, eps: PyTorch's.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor
    training: bool
    momentum: float
    eps: float

    def statistics(self, x: Tensor) -> Tensor:
        """Uninitialised [2, C], mean and biased variance of a batch like x, in float32 at least; [0] in evaluation."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.empty((2, self.weight.shape[0]) if self.training else (0,), dtype=dtype, device=x.device)


class Module(NamedTuple):
    """One fusion module as schemas take it, and which of fused map, attention map and spatial mean are asked for."""

    features: list[Tensor]
    depthwise: Tensor
    norm1: Norm
    pointwise: Tensor
    norm2: Norm
    asked: tuple[bool, ...] = ()

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """In the order in which gradients are given."""
        first, second = self.norm1, self.norm2
        return self.depthwise, first.weight, first.bias, self.pointwise, second.weight, second.bias


def in_order(
    frozen: Sequence[Tensor], running: Sequence[Tensor], training: Sequence[bool], modules: int
) -> list[Tensor]:
    """Running mean1, var1, mean2, var2 of each module from those of norms in evaluation and in training mode."""
    sources = iter(frozen), iter(running)
    return [next(sources[mode]) for _ in range(modules) for mode in training for _ in range(2)]


def modules_of(
    features: Sequence[Tensor],
    counts: Sequence[int],
    parameters: Sequence[Tensor],
    statistics: Sequence[Tensor],
    training: Sequence[bool],
    options: Sequence[float],
    asked: Sequence[bool] = (),
) -> list[Module]:
    """The modules of a call.

    Args:
        features: the maps of all modules, `counts` of them each.
        parameters: six of each module.
        statistics: mean1, var1, mean2, var2 of each module.
        training: of the first norms and of the second norms.
        options: momentum1, eps1, momentum2, eps2 of each module.
        asked: three of each module.
    """
    maps, six, four, numbers, three = map(iter, (features, parameters, statistics, options, asked))
    found = []
    for count in counts:
        own = list(islice(maps, count))
        depthwise, weight1, bias1, pointwise, weight2, bias2 = islice(six, PARAMETERS)
        mean1, var1, mean2, var2 = islice(four, 4)
        momentum1, eps1, momentum2, eps2 = islice(numbers, 4)
        norm1 = Norm(weight1, bias1, mean1, var1, training[0], momentum1, eps1)
        norm2 = Norm(weight2, bias2, mean2, var2, training[1], momentum2, eps2)
        found.append(Module(own, depthwise, norm1, pointwise, norm2, tuple(islice(three, 3))))
    return found


def empty_results(module: Module) -> list[Tensor]:
    """Uninitialised fused map, attention map, spatial mean, first ReLU's output, second norm's input, statistics.

    What is not asked for is empty. The statistics are those of the batch, of either norm.
    """
    first, outputs = module.features[0], module.pointwise.shape[0]
    batch, _, height, width = first.shape
    wide = torch.promote_types(first.dtype, torch.float32)
    fused, attention, pooled = module.asked
    return [
        empty_map(first, outputs) if fused else first.new_empty(0),
        first.new_empty((batch, height, width) if attention else (0,), dtype=wide),
        first.new_empty((batch, outputs) if pooled else (0,)),
        empty_map(first, module.pointwise.shape[1]),
        empty_map(first, outputs),
        module.norm1.statistics(first),
        module.norm2.statistics(first),
    ]


def per_module(results: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """The results of each module."""
    return [results[i : i + RESULTS] for i in range(0, len(results), RESULTS)]


def empty_gradients(modules: Sequence[Module], needs: Sequence[bool]) -> list[list[Tensor | None]]:
    """Uninitialised gradients of each module's six parameters and its maps, None where they are not needed."""
    asked: Iterator[bool] = iter(needs)
    found = []
    for module in modules:
        own: list[Tensor | None] = []
        for i, x in enumerate((*module.parameters, *module.features)):
            make = empty_map if i >= PARAMETERS else gradient_of_weight if i == 0 else torch.empty_like
            own.append(make(x) if next(asked) else None)
        found.append(own)
    return found
