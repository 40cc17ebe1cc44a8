"""Networks whose synchronised norms wait for one another: one exchange serves those of all networks."""

from collections.abc import Generator
from typing import Any

from torch import Tensor, fx, nn

from fastfuse.errors import InputError
from fastfuse.functional import BatchNorm
from fastfuse.nn import _stacked_graph as graphs
from fastfuse.nn._norm import batch_norm
from fastfuse.nn._stacked_checks import hooked

Walk = Generator[tuple[Tensor, BatchNorm], Tensor, Any]


def graph_of(network: nn.Module) -> fx.Graph | None:
    """What a network calls, to be asked before its norms are synchronised.

    None where it may do else in the next forward: it cannot be traced, calls what the rules of stacked networks do not
    know, or has hooks.
    """
    try:
        traced = graphs.trace(network)
        graphs.kinds_of(traced)
    except InputError:
        return None
    return None if any(hooked(layer) for layer in network.modules()) else traced.graph


def walk(network: nn.Module, images: Tensor, graph: fx.Graph | None) -> Walk:
    """A network's forward for `fastfuse.functional.in_step`; without a graph its norms wait for nobody here."""
    if graph is None:
        return network(images)
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        called: Any = node.target
        if node.op == "placeholder":
            values[node] = images
        elif node.op == "output":
            break
        elif node.op == "call_method":
            values[node] = getattr(args[0], called)(*args[1:], **kwargs)
        elif node.op == "call_function":
            values[node] = called(*args, **kwargs)
        else:
            layer: Any = network.get_submodule(called)
            norm = isinstance(layer, nn.BatchNorm2d)
            values[node] = (yield args[0], batch_norm(layer)) if norm else layer(*args, **kwargs)
    return args[0]
