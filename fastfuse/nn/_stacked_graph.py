"""What each value of a traced network becomes in a stacked one, and the fusing of norms with what follows them."""

import copy
import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from fastfuse.errors import InputError

# What a value is in the stacked network: images and what is made of them alone, [N, R C, H, W]; maps [N, S C, H, W];
# flattened maps [N, S C]; what linear layers give, [S, N, K].
IMAGES, MAP, FLAT, HEADS = "images", "map", "flat", "heads"
ANY = frozenset({IMAGES, MAP, FLAT, HEADS})
SPATIAL = frozenset({IMAGES, MAP})

_RELU = {nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_ELEMENTWISE = _RELU | {
    nn.Identity, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Dropout,
    F.relu6, F.leaky_relu, F.gelu, F.silu, F.hardswish,
}  # fmt: skip
_POOLING = {
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, torch.max_pool2d,
}  # fmt: skip
_ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}
_FLATTEN = {nn.Flatten, torch.flatten, "flatten"}
# What each operation reads, and what it gives; None: what it reads.
_RULES = {
    **dict.fromkeys(_ELEMENTWISE | _ADD, (ANY, None)),
    **dict.fromkeys(_POOLING, (SPATIAL, None)),
    **dict.fromkeys(_FLATTEN, ({MAP, FLAT}, FLAT)),
    nn.Conv2d: (SPATIAL, MAP),
    nn.BatchNorm2d: ({MAP}, MAP),
    nn.Linear: ({FLAT, HEADS}, HEADS),
}
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


def refusal(what: str, reason: str) -> InputError:
    """The error for networks that cannot be stacked."""
    return InputError(f"{what} cannot be stacked: {reason}; use --strategy loop")


def trace(network: nn.Module) -> fx.GraphModule:
    """The network as a graph of its leaf modules and functions, on a copy without values.

    Raises:
        InputError: its forward cannot be traced, or is another one in evaluation.
    """
    name, blank = type(network).__name__, copy.deepcopy(network).to("meta")
    try:
        training, evaluation = (_traced(blank.train(mode)) for mode in (True, False))
    except Exception as error:  # what a tracer stumbles over can raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise refusal(f"the forward of {name}", f"it cannot be traced ({reason})") from error
    if training.code != evaluation.code:
        raise refusal(f"the forward of {name}", "it is another one in evaluation than in training")
    return training


class _Tracer(fx.Tracer):
    """Stumbles where a forward leaves autocast, of which the graph would know nothing."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As of any tracer."""
        if not all(torch.is_autocast_enabled(kind) for kind in _AUTOCAST):
            raise TypeError("it switches autocast off")
        return super().create_node(*args, **kwargs)


_AUTOCAST = ("cpu", "cuda")


def _traced(network: nn.Module) -> fx.GraphModule:
    before = [torch.is_autocast_enabled(kind) for kind in _AUTOCAST]
    tracer = _Tracer()
    try:
        for kind in _AUTOCAST:
            torch.set_autocast_enabled(kind, True)
        return fx.GraphModule(network, tracer.trace(network), type(network).__name__)
    finally:
        for kind, enabled in zip(_AUTOCAST, before, strict=True):
            torch.set_autocast_enabled(kind, enabled)


def kinds_of(traced: fx.GraphModule, *, networks: int = 1, replicas: int = 1) -> dict[fx.Node, Any]:
    """What each value is; for a tuple of values, a tuple. Norms of the images are given a copy for each network.

    Raises:
        InputError: an operation that would mix the channels of networks, or that is not known; it is named.
    """
    kinds: dict[fx.Node, Any] = {}
    for node in list(traced.graph.nodes):
        if node.op == "placeholder":
            if kinds:
                raise refusal("a network of several inputs", f"besides the images it takes {node.target}")
            kinds[node] = IMAGES
        elif node.op == "output" or _is_named_tuple(node):
            if IMAGES in [kinds[source] for source in node.all_input_nodes]:
                raise refusal("the forward of a network", "it gives back what none of its layers has made")
            kinds[node] = fx.node.map_arg(_contents(node), kinds.__getitem__)
        else:
            if _is_norm(node, traced) and [kinds[source] for source in node.all_input_nodes] == [IMAGES]:
                with traced.graph.inserting_before(node):
                    own = traced.graph.call_function(spread, (*node.all_input_nodes, networks, replicas))
                node.replace_input_with(node.all_input_nodes[0], own)
                kinds[own] = MAP
            kinds[node] = _kind(node, operation(node, traced), kinds)
    return kinds


def spread(images: Tensor, networks: int, replicas: int) -> Tensor:
    """[N, R C, H, W] to [N, S C, H, W]: for each of S networks the map that it reads, of R ones side by side."""
    each = networks // replicas
    return images if each == 1 else torch.cat([own for own in images.chunk(replicas, 1) for _ in range(each)], 1)


def operation(node: fx.Node, traced: fx.GraphModule) -> Any:
    """The class of the layer that a node calls, or its function, or its method's name."""
    return type(traced.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _is_named_tuple(node: fx.Node) -> bool:
    return isinstance(node.target, type) and issubclass(node.target, tuple)


def _contents(node: fx.Node) -> Any:
    called: Any = node.target
    return node.args[0] if node.op == "output" else called(*node.args, **node.kwargs)


def _kind(node: fx.Node, done: Any, kinds: dict[fx.Node, Any]) -> str:
    name = done if isinstance(done, str) else getattr(done, "__name__", str(done))
    said = {"call_module": f"layer {node.target} ({name})", "get_attr": f"the use of parameter {name}"}
    what = said.get(node.op, f"the call of {name}")
    if node.op == "get_attr" or done not in _RULES:
        raise refusal(what, "only convolutions, batch norms, linear layers, ReLU, pooling, flatten and additions are")
    reads, gives = _RULES[done]
    found = {kinds[source] for source in node.all_input_nodes}
    if len(found) != 1:
        raise refusal(what, f"it joins values of different kinds ({', '.join(sorted(map(str, found)))})")
    (kind,) = found
    if kind not in reads:
        raise refusal(what, f"it reads {kind}, and only {' or '.join(sorted(reads))} can be read by it")
    if done not in _ADD and (len(node.all_input_nodes), len(node.args) > 0) != (1, True):
        raise refusal(what, "it must be called with one tensor, as its first argument")
    if reason := _why_not(node, done, kind):
        raise refusal(what, reason)
    return gives or kind


def _why_not(node: fx.Node, done: Any, kind: str) -> str | None:
    """What the configuration of a call stands in the way of."""
    owner: Any = node.graph.owning_module
    layer: Any = owner.get_submodule(node.target) if node.op == "call_module" else None
    if done is nn.Conv2d and kind == IMAGES and layer.groups != 1:
        return "it reads the images, where a grouped convolution of several networks is not one convolution"
    if done is nn.Dropout and layer.p > 0:
        return "networks stacked would draw other random numbers than one after another"
    if getattr(layer, "return_indices", False):
        return "it gives indices besides the map"
    if done in _FLATTEN:
        said = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        said = said if layer is None else vars(layer)
        if (said.get("start_dim", 0), said.get("end_dim", -1)) != (1, -1):
            return "only flatten(1), of everything but the batch, keeps networks apart"
    return None


def fuse_norms(traced: fx.GraphModule) -> None:
    """Let batch norms do the addition and the ReLU after them, where nobody else reads what lies between.

    `batch norm -> ReLU` and `batch norm -> addition -> ReLU` become one call `norm(x, residual=..., relu=True)`.
    """
    calls = Counter(node.target for node in traced.graph.nodes if node.op == "call_module")
    for relu in list(traced.graph.nodes):
        if relu.op not in ("call_module", "call_function", "call_method") or operation(relu, traced) not in _RELU:
            continue
        last = relu.args[0]
        is_sum = last.op != "placeholder" and operation(last, traced) in _ADD
        candidates = _operands(last) if is_sum and len(last.users) == 1 else [last]
        for norm in candidates:
            if not _is_norm(norm, traced) or len(norm.users) != 1 or calls[norm.target] != 1:
                continue
            residual = next((x for x in candidates if x is not norm), None)
            read: list[Any] = [norm.args[0], *([residual] if residual else [])]
            if _changed_between(norm, relu, read, traced):
                continue
            _replace(traced.graph, norm, relu, [relu, last] if is_sum else [relu], residual)
            break
    traced.graph.lint()


def _operands(total: fx.Node) -> list[fx.Node]:
    """Both terms of a plain sum of two different values."""
    given: list[Any] = list(total.args)
    plain = len(given) == 2 and not total.kwargs and len(total.all_input_nodes) == 2
    return given if plain else []


def _is_norm(node: fx.Node, traced: fx.GraphModule) -> bool:
    return node.op == "call_module" and operation(node, traced) is nn.BatchNorm2d


def _changed_between(first: fx.Node, last: fx.Node, values: list[fx.Node], traced: fx.GraphModule) -> bool:
    """Whether an operation in place, between two nodes, writes into one of the values."""
    memory = {_memory(value, traced) for value in values}
    node = first.next
    while node is not last:
        if _in_place(node, traced) and _memory(node, traced) in memory:
            return True
        node = node.next
    return False


def _memory(node: Any, traced: fx.GraphModule) -> fx.Node:
    """The node whose result a value written in place, or passed on as it is, lies in."""
    while node.op != "placeholder" and (_in_place(node, traced) or operation(node, traced) is nn.Identity):
        node = node.args[0]
    return node


def _in_place(node: fx.Node, traced: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return getattr(traced.get_submodule(str(node.target)), "inplace", False)
    named = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return named.endswith("_") or node.target is operator.iadd or bool(node.kwargs.get("inplace", False))


def _replace(graph: fx.Graph, norm: fx.Node, relu: fx.Node, after: list[fx.Node], residual: fx.Node | None) -> None:
    with graph.inserting_before(relu):
        fused = graph.call_module(str(norm.target), (norm.args[0],), {"residual": residual, "relu": True})
    relu.replace_all_uses_with(fused)
    for node in (*after, norm):
        graph.erase_node(node)
