"""Any network as one that gives its output and the maps of layers of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError, unknown_name
from fastfuse.models._blocks import NetworkOutput

_ADAPTIVE = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)


def extract(model: nn.Module, taps: Mapping[str, str] | Sequence[str]) -> nn.Module:
    """A module that gives what a network gives, and the results of layers of it: (logits, features).

    The network is held, not copied: training the one trains the other, and its own calls give what they gave. State
    dicts have the network's own keys. It can be copied, compiled and wrapped in DistributedDataParallel, as long as
    that is done to the module given back: a hook added to a compiled network would be ignored in silence.

    Args:
        model: any network that runs as Python: neither compiled nor scripted, and not wrapped yet.
        taps: paths of layers as `named_modules` gives them, "layer3.0.conv1": by name, or in order.

    Returns:
        A module that is called as the network is and gives a `NetworkOutput`; its features are a dict by the names, or
        a tuple in the order of the paths. `network` is the network.

    Raises:
        InputError: a layer that does not exist (the near ones are listed), or cannot be tapped; and when called, one
            that did not run exactly once, gave no tensor, or whose result was overwritten by what follows it.
    """
    return Extracted(model, list(taps) if isinstance(taps, Mapping) else None, checked_taps(model, taps))


def checked_taps(model: nn.Module, taps: Mapping[str, str] | Sequence[str]) -> list[str]:
    """The paths of taps, if `extract` can serve them.

    Raises:
        InputError: see `extract`.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"extract needs a torch.nn.Module, not a {type(model).__name__}")
    _check_network(model)
    paths = list(taps.values() if isinstance(taps, Mapping) else taps)
    if not paths or isinstance(taps, str):
        raise InputError("taps are paths of layers by name, or a list of them, at least one: {'deep': 'layer4'}")
    for path in paths:
        _check_layer(model, path)
    return paths


class Wrapper(nn.Module):
    """Holds a network as `network`, and is invisible in state dicts: they have the network's own keys."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The network's own."""
        return self.network.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Put the entries where torch, which loads the network after this, looks for them."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}network.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class Extracted(Wrapper):
    """What `extract` gives."""

    def __init__(self, network: nn.Module, names: list[str] | None, paths: list[str]) -> None:
        super().__init__(network)
        self.names, self.paths = names, paths
        self._notes = Notes()
        for path in dict.fromkeys(paths):
            network.get_submodule(path).register_forward_hook(Tap(path, self._notes))

    def forward(self, *args: Any, **kwargs: Any) -> NetworkOutput:
        """Arguments of the network to its output and the maps."""
        if getattr(self, "_is_replica", False):
            raise InputError("DataParallel's threads would mix their maps up; use DistributedDataParallel")
        self._notes.begin()
        try:
            output = self.network(*args, **kwargs)
            maps = [self._notes.one(path) for path in self.paths]
        finally:
            self._notes.end()
        features: Any = tuple(maps) if self.names is None else dict(zip(self.names, maps, strict=True))
        return NetworkOutput(output, features)


class Notes:
    """What tapped layers gave in one forward; nothing is kept between two.

    Attributes:
        calls: (path, result, how often the result's memory was written to when it was given).
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, int | None]] = []
        self.open = False

    # No context manager: torch 2.11 compiles none that was made before.
    def begin(self) -> None:
        """Listen from now on."""
        self.calls, self.open = [], True

    def end(self) -> None:
        """Forget everything, and listen no more."""
        self.calls, self.open = [], False

    def one(self, path: str) -> Tensor:
        """The one result of a layer."""
        found = [(result, version) for name, result, version in self.calls if name == path]
        if len(found) != 1:
            raise InputError(f"layer {path} ran {len(found)} times in this forward, and must run once; tap another")
        ((result, version),) = found
        if not isinstance(result, Tensor):
            raise InputError(f"layer {path} gives a {type(result).__name__}, not a tensor; tap a layer inside it")
        if written(result) != version:
            raise InputError(
                f"the result of layer {path} is overwritten in place by what follows; tap the layer that does it, or "
                "set its inplace=False"
            )
        return result


class Tap:
    """A forward hook. An object and no closure, so that a copy of the network writes to notes of its own."""

    def __init__(self, path: str, notes: Notes) -> None:
        self.path, self.notes = path, notes

    def __call__(self, layer: nn.Module, args: Any, result: Any) -> None:
        """Note what the layer gave, in calls of the extractor and in no others."""
        if self.notes.open:
            self.notes.calls.append((self.path, result, written(result)))


def written(result: Any) -> int | None:
    """How often a tensor's memory was written to; None where that is not counted."""
    # Compiled code has no versions; what it would overwrite shows in the first call that is not compiled.
    if torch.compiler.is_compiling() or not isinstance(result, Tensor) or result.is_inference():
        return None
    return result._version


def _check_network(model: nn.Module) -> None:
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    for name, module in model.named_modules():
        what = f"{name or 'the network'} ({type(module).__name__})"
        # By name: importing the compiler for this would take seconds.
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise InputError(
                f"{what} is compiled already, and would ignore a hook; extract from the plain network first, then "
                "compile what extract gives"
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(f"{what} is a TorchScript module, which Python hooks do not reach; extract before that")
        if isinstance(module, wrappers) or type(module).__name__ == "FullyShardedDataParallel":
            raise InputError(f"{what} is wrapped for parallel training already; extract first, then wrap the result")


def _check_layer(model: nn.Module, path: str) -> None:
    layers = dict(model.named_modules(remove_duplicate=False))
    layers.pop("")
    if path not in layers:
        raise unknown_name(f"layer of {type(model).__name__}", path, layers)
    if type(layers[path]).forward in (nn.ModuleList.forward, nn.ModuleDict.forward):
        raise InputError(f"layer {path} is a {type(layers[path]).__name__}, which never runs; tap one of its members")


def last_maps(model: nn.Module, images: Tensor) -> tuple[Any, dict[str, tuple[int, int, int]]]:
    """What a network gives, and the layer that makes the last map of each resolution, with [C, H, W] of the map.

    A map is a square [B, C, H, W] of more than one position, made once and not overwritten. Only the outermost layers
    of a resolution count: what is inside a block, such as the first convolution of the next stage before its stride,
    is no stage's result.

    Args:
        model: any network; its mode is kept, and batch norms in training mode see the images.
        images: [B, 3, N, N]; square, so that [B, H, W, C] is no map.
    """
    notes = Notes()
    # Pooled to a size that does not depend on the images', a map has no resolution.
    layers = [(path, x) for path, x in model.named_modules() if path and not isinstance(x, _ADAPTIVE)]
    handles = [layer.register_forward_hook(Tap(path, notes)) for path, layer in layers]
    notes.begin()
    try:
        with torch.no_grad():
            output = model(images)
        maps = {path: result for path, result, version in notes.calls if _is_map(result) and written(result) == version}
        times = Counter(path for path, _, _ in notes.calls)
    finally:
        notes.end()
        for handle in handles:
            handle.remove()
    last: dict[int, str] = {}
    for path, result in maps.items():
        size = result.shape[-1]
        if times[path] == 1 and path.count(".") <= last.get(size, path).count("."):
            last.pop(size, None)
            last[size] = path
    return output, {path: tuple(maps[path].shape[1:]) for path in last.values()}


def _is_map(result: Any) -> bool:
    return isinstance(result, Tensor) and result.dim() == 4 and result.shape[2] == result.shape[3] > 1
