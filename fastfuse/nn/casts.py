"""Weights in autocast's precision: those of all layers in one launch, and their gradients in another.

Autocast alone casts every weight where it is used and every gradient where it arises, two launches for each layer of
each network in every step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastfuse.nn._in_step import graph_of
from fastfuse.nn._stacked_layers import StackedConv, StackedLinear
from fastfuse.nn.stacked import Stacked

# Exactly these: a layer derived from one may do else with its weight.
_LAYERS = (nn.Conv2d, nn.Linear, StackedConv, StackedLinear)


def layers_of(networks: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers whose weights autocast would cast; none of a network whose forward is not known, which may stop it."""
    known = [network for network in networks if isinstance(network, Stacked) or graph_of(network) is not None]
    return [layer for network in known for layer in network.modules() if type(layer) in _LAYERS]


@contextmanager
def cast_together(layers: Callable[[], Sequence[nn.Module]], device_type: str) -> Iterator[None]:
    """A block in which layers hold the weights that autocast would give them; without autocast nothing happens.

    A compiler arranges casts by itself.

    Args:
        layers: gives those of `layers_of`; asked only if they are needed.
        device_type: of their inputs.
    """
    # In this order: torch 2.11 cannot trace the question.
    if torch.compiler.is_compiling() or not _casting(device_type):
        yield
        return
    held: Any = [layer._parameters for layer in layers()]
    places = [(own, name) for own in held for name, weight in own.items() if weight is not None]
    places = [(own, name) for own, name in places if own[name].dtype == torch.float32]
    weights = [own[name] for own, name in places]
    low = _Cast.apply(torch.get_autocast_dtype(device_type), *weights) if weights else ()
    for (own, name), cast in zip(places, low, strict=True):
        own[name] = cast
    try:
        yield
    finally:
        for (own, name), weight in zip(places, weights, strict=True):
            own[name] = weight


def _casting(device_type: str) -> bool:
    # Not every device can: "meta" has no autocast.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        return _copies(weights, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        found = iter(_copies([gradient for gradient in given if gradient is not None], ctx.dtype))
        return (None, *(None if gradient is None else next(found) for gradient in given))


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    copies = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return tuple(copies)
