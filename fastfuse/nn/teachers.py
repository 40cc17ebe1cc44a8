"""Frozen networks that only give targets."""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError, unknown_name
from fastfuse.nn._stacked_checks import are_alike
from fastfuse.nn.casts import cast_together, layers_of
from fastfuse.nn.folding import folded
from fastfuse.nn.stacked import stack
from fastfuse.nn.strategy import STRATEGIES


class Teachers(nn.Module):
    """Networks that are trained no more: without gradients, always in evaluation mode, absent from state dicts.

    They have no parameters or buffers as far as others can see, and follow this module to another device, dtype or
    memory format all the same.

    Args:
        networks: of any architectures; copied.

    Attributes:
        strategy: "loop" or "grouped".
    """

    _cast: list[nn.Module] | None = None

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        # In lists, so that they are no submodules.
        self._plain = [copy.deepcopy(network).eval().requires_grad_(False) for network in networks]
        self.strategy = "loop"
        self._set_running([(network, [i]) for i, network in enumerate(self._plain)])

    def forward(self, images: Tensor) -> list[Any]:
        """[B, 3, H, W] to what each network gives, in the order given; of stacked ones in views of stacked maps."""
        with torch.no_grad(), cast_together(self.cast_layers, images.device.type):
            found: list[Any] = []
            running: Any = self._running
            for network, count in zip(running, self._counts, strict=True):
                output = network(images)
                found += [output] if count == 1 else network.apart(output)
        return [found[position] for position in self._order]

    def arrange(self, strategy: str) -> str:
        """Choose how the networks run; in any way their batch norms are folded into convolutions where that is exact.

        Call it when the values and the device are final: it copies them.

        Args:
            strategy: "loop" or "branches": one after another; "grouped": those of one architecture as one stacked
                network; "auto": "loop" on a CPU, where grouped ResNet-20s take 1.7 times as long (docs/LOG.md), and
                elsewhere, which is not measured, "grouped" as far as they can be stacked.

        Returns:
            "loop" or "grouped".

        Raises:
            InputError: an unknown strategy, or "grouped" and teachers of one architecture that cannot be stacked.
        """
        if strategy not in (*STRATEGIES, "auto"):
            raise unknown_name("strategy", strategy, (*STRATEGIES, "auto"))
        own = [folded(network) for network in self._plain]
        if strategy == "grouped":
            _check_stackable(own)
        if strategy == "auto":
            strategy = "loop" if self._on_cpu() else "grouped"
        self.strategy = "grouped" if strategy == "grouped" else "loop"
        groups = _groups(own) if self.strategy == "grouped" else [[i] for i in range(len(own))]
        self._set_running([pair for group in groups for pair in _stacked([own[i] for i in group], group)])
        return self.strategy

    def plain(self, index: int) -> nn.Module:
        """A network as it was given, frozen.

        Raises:
            InputError: there is no such network.
        """
        if not 0 <= index < len(self._plain):
            raise InputError(f"teacher {index} does not exist: there are teachers 0 to {len(self._plain) - 1}")
        return self._plain[index]

    def cast_layers(self) -> list[nn.Module]:
        """The layers whose weights are cast together under autocast; they are looked for once, at the first call."""
        if self._cast is None:
            self._cast = layers_of(self._running)
        return self._cast

    def __len__(self) -> int:
        return len(self._plain)

    def _set_running(self, pairs: Sequence[tuple[nn.Module, list[int]]]) -> None:
        """What runs, each with the positions of the networks in it."""
        self._running = [network for network, _ in pairs]
        self._cast = None
        self._counts = [len(members) for _, members in pairs]
        members = [i for _, own in pairs for i in own]
        self._order = [members.index(i) for i in range(len(members))]

    def _on_cpu(self) -> bool:
        return all(parameter.device.type == "cpu" for network in self._plain for parameter in network.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What .to(), .cuda() and their like do."""
        for network in {id(network): network for network in [*self._plain, *self._running]}.values():
            network._apply(fn, recurse)
        return super()._apply(fn, recurse)


def _check_stackable(networks: Sequence[nn.Module]) -> None:
    """Refuse a network that cannot be stacked with another one of its shapes."""
    shapes = [{name: x.shape for name, x in network.state_dict().items()} for network in networks]
    for i, network in enumerate(networks):
        if shapes.count(shapes[i]) > 1:
            try:
                stack([network])
            except InputError as error:
                raise InputError(f"teacher {i} cannot run grouped with others like it: {error}") from error


def _groups(networks: Sequence[nn.Module]) -> list[list[int]]:
    """The positions of networks of one architecture, together."""
    groups: list[list[int]] = []
    for i, network in enumerate(networks):
        own = next((group for group in groups if are_alike(networks[group[0]], network)), None)
        if own is None:
            groups.append([i])
        else:
            own.append(i)
    return groups


def _stacked(networks: Sequence[nn.Module], members: list[int]) -> list[tuple[nn.Module, list[int]]]:
    """Networks as one where they can be, else each alone."""
    if len(networks) > 1:
        try:
            return [(stack(networks), members)]
        except InputError:
            pass
    return [(network, [i]) for network, i in zip(networks, members, strict=True)]
