"""All networks of a method behind one interface, however they are run."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from fastfuse.errors import InputError
from fastfuse.functional import in_step
from fastfuse.nn._in_step import graph_of, walk
from fastfuse.nn.casts import cast_together, layers_of
from fastfuse.nn.counts import counted_together, norms_of
from fastfuse.nn.stacked import stack, unstack
from fastfuse.nn.strategy import resolve_strategy


class Networks(nn.Module):
    """Networks that read the same images.

    They start as ordinary members that can be indexed and looped over (strategy "loop"); `arrange` chooses another way
    to run them. State dicts have the keys of the members, "0.conv1.weight", whatever the strategy.

    Args:
        networks: the members.

    Attributes:
        strategy: "loop", "branches" or "grouped".
        replicas: number of image batches side by side that they read; the first networks belong to the first.
        casts_together: whether all weights are cast in one launch under autocast, and all their gradients in one at the
            end of the backward.
    """

    stacked: Any  # a `Stacked`, where the strategy is grouped
    _cast: list[nn.Module] | None
    _counting: list[nn.Module] | None
    _graphs: list[fx.Graph | None] | None

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.strategy, self.replicas, self.casts_together = "loop", 1, True
        self._cast = self._counting = self._graphs = None
        self._set_members(networks)
        self._count = len(self._modules)

    def forward(self, images: Tensor | Sequence[Tensor]) -> list[Any]:
        """[N, 3 R, H, W] to what each network gives; of stacked networks in views of the stacked maps."""
        return self.apart(self.together(images))

    def together(self, images: Tensor | Sequence[Tensor]) -> Any:
        """What `apart` takes apart: of stacked networks in the stacked maps, else a list for each network.

        Args:
            images: [N, 3 R, H, W], or, of networks that are not stacked, R batches in a list.
        """
        if self.casts_together and self.strategy != "branches":  # whose streams would read what is another's
            device = images.device if isinstance(images, Tensor) else images[0].device
            with cast_together(self.cast_layers, device.type):
                return self._outputs(images)
        return self._outputs(images)

    def apart(self, outputs: Any) -> list[Any]:
        """What each network gives, from what `together` gave."""
        return self.stacked.apart(outputs) if self.strategy == "grouped" else outputs

    def _outputs(self, images: Tensor | Sequence[Tensor]) -> Any:
        if self.strategy == "grouped":
            return self.stacked(images)
        own = images.chunk(self.replicas, 1) if isinstance(images, Tensor) else images
        each = self._count // self.replicas
        calls = [(network, own[i // each]) for i, network in enumerate(self)]
        with counted_together(self.counting_norms):
            if self.strategy == "branches":
                return _in_branches(calls, own[0].device)
            if self._graphs is not None and self.training:
                return in_step(walk(*call, graph) for call, graph in zip(calls, self._graphs, strict=True))
            return [network(batch) for network, batch in calls]

    def arrange(self, strategy: str, *, replicas: int = 1) -> str:
        """Change in place how the networks are run; parameters are others afterwards, without gradients.

        So load initial weights by network before, and make optimizers after.

        Args:
            strategy: "loop", "branches" (CUDA), "grouped", or "auto", see `fastfuse.nn.strategy`.
            replicas: see `fastfuse.nn.stacked.stack`.

        Returns:
            The strategy, which "auto" leaves open.

        Raises:
            InputError: networks that cannot be stacked, no such strategy or none on this device; nothing is changed.
        """
        if replicas < 1 or self._count % replicas:
            raise InputError(f"{self._count} networks cannot be shared out among {replicas} replicas")
        grouped = self.strategy == "grouped"
        members = [unstack(self.stacked, i) for i in range(self._count)] if grouped else list(self)
        chosen = resolve_strategy(strategy, members)
        if chosen == "grouped":
            try:
                stacked = stack(members, replicas=replicas)
            except InputError:
                if strategy != "auto":
                    raise
                chosen = "loop"
        if chosen == "grouped":
            self._modules.clear()
            self.stacked = stacked
        elif grouped:
            self._modules.clear()
            self._set_members(members)
        self.strategy, self.replicas = chosen, replicas
        self._cast = self._counting = None
        return chosen

    @classmethod
    def of_replicas(cls, replicas: Sequence["Networks"]) -> "Networks":
        """The networks of all, those of the first replica first; they are members there now."""
        return cls(network for networks in replicas for network in networks)

    @staticmethod
    def own_name(name: str, replica: int, count: int) -> str | None:
        """A name in the state dict of R replicas of `count` networks as it is in that of one; None of another's."""
        index, _, inner = name.partition(".")
        return f"{int(index) - replica * count}.{inner}" if int(index) // count == replica else None

    def keep_in_step(self) -> None:
        """Have norms that are about to be synchronised wait for those of the other networks, which costs one exchange.

        It is so in training, of strategy "loop". A network whose calls cannot be known beforehand goes through its
        forward alone; see `fastfuse.nn.stacked.stack` for what is known.
        """
        if self.strategy == "loop" and self._graphs is None:
            self._graphs = [graph_of(network) for network in self]

    def state_of(self, index: int) -> dict[str, Tensor]:
        """The plain state dict of one network; of stacked networks a copy.

        Raises:
            InputError: there is no such network.
        """
        index = self._position(index)
        if self.strategy != "grouped":
            return self[index].state_dict()
        return unstack(self.stacked, index).state_dict()

    def split(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """What goes with parameter `name`, such as its gradient or momentum, by the names of the state dict.

        Args:
            name: of a parameter or buffer, as `named_parameters` gives it.
            tensor: in the shape of that parameter.
        """
        if self.strategy != "grouped":
            return {name: tensor}
        own = name.removeprefix(_INSIDE)
        return {f"{i}.{own}": part for i, part in enumerate(self.stacked.split(own, tensor))}

    def join(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `split`: one tensor for parameter `name`, from those of the single networks."""
        if self.strategy != "grouped":
            return tensors[name]
        own = name.removeprefix(_INSIDE)
        return self.stacked.join(own, [tensors[f"{i}.{own}"] for i in range(self._count)])

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """As of ordinary members, whatever the strategy."""
        if self.strategy != "grouped":
            return super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        if destination is None:
            destination = OrderedDict()
            destination._metadata = OrderedDict()
        destination._metadata[prefix[:-1]] = {"version": self._version}
        for i, state in enumerate(self.stacked.states()):
            for name, tensor in state.items():
                destination[f"{prefix}{i}.{name}"] = tensor if keep_vars else tensor.detach()
            for name, metadata in state._metadata.items():
                destination._metadata[f"{prefix}{i}.{name}".rstrip(".")] = metadata
        return destination

    def cast_layers(self) -> list[nn.Module]:
        """The layers whose weights are cast together under autocast; they are looked for once, at the first call."""
        if self._cast is None:
            self._cast = layers_of([self.stacked] if self.strategy == "grouped" else list(self))
        return self._cast

    def counting_norms(self) -> list[nn.Module]:
        """The norms of members whose batches are counted together; looked for once, at the first call."""
        if self._counting is None:
            self._counting = norms_of(self)
        return self._counting

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[nn.Module]:
        self._need_members()
        members: Any = self._modules
        return iter(members.values())

    def __getitem__(self, index: int) -> nn.Module:
        self._need_members()
        members: Any = self._modules
        return members[str(self._position(index))]

    def _set_members(self, networks: Iterable[nn.Module]) -> None:
        for i, network in enumerate(networks):
            self.add_module(str(i), network)

    def _position(self, index: int) -> int:
        if not -self._count <= index < self._count:
            raise InputError(f"network {index} does not exist: there are networks 0 to {self._count - 1}")
        return index % self._count

    def _need_members(self) -> None:
        if self.strategy == "grouped":
            raise InputError("stacked networks are no members; take state_of(i), or arrange('loop') first")

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Turn the members' entries into those of the stacked network, which torch loads after this."""
        if self.strategy == "grouped":
            states = self.stacked.states()
            for name in self.stacked.names:
                given = []
                for key, own in ((f"{prefix}{i}.{name}", state[name].detach()) for i, state in enumerate(states)):
                    value = state_dict.pop(key, None)
                    if value is None and strict:
                        missing_keys.append(key)
                    elif value is not None and value.shape != own.shape:
                        error_msgs.append(f"size mismatch for {key}: {list(value.shape)}, not {list(own.shape)}")
                        value = None
                    given.append(own if value is None else value.to(own))
                state_dict[f"{prefix}{_INSIDE}{name}"] = self.stacked.join(name, given)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


# Where the stacked network keeps the tensors of its layers.
_INSIDE = "stacked.network."


@cache
def _stream(device: torch.device, index: int) -> torch.cuda.Stream:
    # Not an attribute of a module: streams cannot be copied, and modules are.
    return torch.cuda.Stream(device)


def _in_branches(calls: list[tuple[nn.Module, Tensor]], device: torch.device) -> list[Any]:
    """Each call on its own stream, forked from the current one and joined with it."""
    current = torch.cuda.current_stream(device)
    streams = [_stream(device, i) for i in range(len(calls))]
    outputs = []
    for stream, (network, images) in zip(streams, calls, strict=True):
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            outputs.append(network(images))
        images.record_stream(stream)
    for stream in streams:
        current.wait_stream(stream)
    # The current stream reads what the branches made: their memory must not go to other work before.
    map_aggregate(outputs, lambda x: x.record_stream(current) if isinstance(x, Tensor) else None)
    return outputs
