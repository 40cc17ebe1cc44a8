"""Several networks of one architecture as one network, and back.

Maps of S networks lie side by side as channels, [N, S C, H, W]: the first layer is one dense convolution, later ones
are grouped, one batch norm over S C channels is S batch norms, and a linear layer is a batched product. Values,
gradients and running statistics are those of the networks run one after another.
"""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fastfuse.errors import InputError
from fastfuse.nn import _stacked_checks as checks
from fastfuse.nn import _stacked_graph as graphs
from fastfuse.nn._stacked_graph import refusal
from fastfuse.nn._stacked_layers import StackedNorm, joined, stacked_layer


def stack(models: Sequence[nn.Module], *, replicas: int = 1) -> nn.Module:
    """One network that computes what each of several networks of one architecture computes.

    It has the parameters of all, as copies, and gives the structure that one network gives, with maps [N, S C, H, W]
    and logits [S, N, K]. Modes (requires_grad of a parameter, training of a norm) are kept, and must agree.

    Args:
        models: S networks on one device, convolutional, whose forward torch.fx can trace. With replicas, those of the
            first replica come first.
        replicas: R, number of image batches [N, R 3, H, W] side by side, each read by S / R networks.

    Raises:
        InputError: networks that differ, or a layer or function that cannot be stacked; it is named.
    """
    models = list(models)
    if not models or replicas < 1 or len(models) % replicas:
        raise InputError(f"{len(models)} networks cannot be shared out among {replicas} replicas; give as many to each")
    return Stacked(models, replicas)


def unstack(stacked: nn.Module, index: int) -> nn.Module:
    """One network of a stacked one: an ordinary network with copies of its present weights and statistics.

    Raises:
        InputError: not a network that `stack` gave, or no such index.
    """
    if not isinstance(stacked, Stacked):
        raise InputError(f"only what stack() gave can be taken apart, not a {type(stacked).__name__}")
    return stacked.one(index)


class Stacked(nn.Module):
    """What `stack` gives.

    Attributes:
        count: S.
        replicas: R.
        names: parameters and buffers of one network, in its own order.
    """

    def __init__(self, models: Sequence[nn.Module], replicas: int) -> None:
        super().__init__()
        self.count, self.replicas = len(models), replicas
        traced = graphs.trace(models[0])
        checks.check_alike(models, traced)
        kinds = graphs.kinds_of(traced, networks=self.count, replicas=replicas)
        leaves = _leaves(models, traced, kinds, replicas)
        output = next(node for node in traced.graph.nodes if node.op == "output")
        self._kinds = kinds[output]
        graphs.fuse_norms(traced)
        # A norm's calls in one forward: each counts as a batch.
        calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
        self._norm_calls = Counter(name for name in calls if isinstance(leaves.get(name), StackedNorm))
        own = {name: traced.get_submodule(name) for name in calls}
        self.network = fx.GraphModule(own | leaves, traced.graph, type(models[0]).__name__)
        # Held in a tuple, so that it is no submodule: it has no values.
        self._template = (copy.deepcopy(models[0]).to("meta"),)
        self.names = tuple(self._template[0].state_dict())
        checks.check_complete(models[0], self.network)
        self.train(models[0].training)
        for name, leaf in leaves.items():
            leaf.train(models[0].get_submodule(name).training)

    def forward(self, images: Tensor) -> Any:
        """[N, 3 R, H, W] to what one network gives, of all: maps [N, S C, H, W] and logits [S, N, K]."""
        norms: dict[str, Any] = {name: self.network.get_submodule(name) for name in self._norm_calls}
        counted = {name: norm.num_batches_tracked for name, norm in norms.items() if norm.training}
        if counted:
            torch._foreach_add_(list(counted.values()), [self._norm_calls[name] for name in counted])
        return self.network(images)

    def apart(self, output: Any) -> list[Any]:
        """What each network gives, in views of what `forward` gave."""
        return _apart(output, self._kinds, self.count)

    def one(self, index: int) -> nn.Module:
        """See `unstack`."""
        if not 0 <= index < self.count:
            raise InputError(f"network {index} does not exist: there are networks 0 to {self.count - 1}")
        network = copy.deepcopy(self._template[0]).train(self.training)
        for name, tensor in [*self.network.named_parameters(), *self.network.named_buffers()]:
            owner, _, attribute = name.rpartition(".")
            layer, own = network.get_submodule(owner), self.split(name, tensor)[index].detach().clone()
            layer.train(self.network.get_submodule(owner).training)
            if isinstance(tensor, nn.Parameter):
                own = nn.Parameter(own, requires_grad=tensor.requires_grad)
            setattr(layer, attribute, own)
        return network

    def split(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor in the shape of the stacked parameter or buffer `name`, as a view [S, *shape in one network]."""
        return tensor.view(self.count, *self._plain(name).shape)

    def join(self, name: str, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`: one tensor of the networks' own."""
        return joined(parts, self._template[0].get_submodule(name.rpartition(".")[0]))

    def states(self) -> list[Mapping[str, Tensor]]:
        """The state dict of each network, in views of the stacked parameters and buffers."""
        tensors = dict([*self.network.named_parameters(), *self.network.named_buffers()])
        found: list[Mapping[str, Tensor]] = []
        for index in range(self.count):
            state = self._template[0].state_dict()  # has names, order and versions
            state.update({name: self.split(name, tensors[name])[index] for name in state})
            found.append(state)
        return found

    def _plain(self, name: str) -> Tensor:
        owner, _, attribute = name.rpartition(".")
        return getattr(self._template[0].get_submodule(owner), attribute)


def _apart(output: Any, kinds: Any, count: int) -> list[Any]:
    if kinds == graphs.MAP or kinds == graphs.FLAT:
        return list(output.chunk(count, 1))  # one node of the autograd graph for all
    if kinds == graphs.HEADS:
        return list(output.unbind(0))
    if isinstance(kinds, dict):
        columns = {key: _apart(output[key], kind, count) for key, kind in kinds.items()}
        return [{key: column[i] for key, column in columns.items()} for i in range(count)]
    if isinstance(kinds, tuple | list):
        listed = [_apart(value, kind, count) for value, kind in zip(output, kinds, strict=True)]
        rows = [[column[i] for column in listed] for i in range(count)]
        return [type(output)(*row) if hasattr(output, "_fields") else type(output)(row) for row in rows]
    return [output] * count  # a constant


def _leaves(
    models: Sequence[nn.Module], traced: fx.GraphModule, kinds: Mapping[fx.Node, Any], replicas: int
) -> dict[str, nn.Module]:
    """The stacked layers by name, with the values of all networks."""
    found: dict[str, nn.Module] = {}
    read: dict[str, str] = {}
    for node in traced.graph.nodes:
        if node.op != "call_module" or graphs.operation(node, traced) not in graphs.LAYERS:
            continue
        name, kind = node.target, kinds[node.all_input_nodes[0]]
        if read.setdefault(name, kind) != kind:
            raise refusal(f"layer {name}", "it is called on the images and on maps")
        if name not in found:
            own = [model.get_submodule(name) for model in models]
            found[name] = stacked_layer(name, own, replicas if kind == graphs.IMAGES else 0)
    return found
