"""Networks of others by name, with their taps chosen automatically.

    torchvision:NAME         a classifier of torchvision.models
    timm:NAME                one of timm, whose own intermediate maps are taken
    package.module:factory   what factory(num_classes=K, ...) gives; one of ours stays as it is

Weights are drawn anew. A tap is the last map of each resolution, found by a forward on blank images.
"""

import copy
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError, unknown_name
from fastfuse.models._blocks import NetworkOutput
from fastfuse.models.extract import Extracted, Wrapper, checked_taps, extract, last_maps

# Tried in this order: a network for large images may need as many, and one for small images may take no more.
BLANK_SIZES = (224, 32)


def build_foreign(name: str, num_classes: int, **options: Any) -> nn.Module:
    """A network that gives a `NetworkOutput` and has `feature_channels`; state dicts have its maker's own keys.

    Args:
        name: see this module.
        num_classes: K.
        options: further arguments of the maker.

    Raises:
        InputError: a library, module or network that is not there; a maker that does not take the arguments; a
            network that gives no logits [B, K], or no maps.
    """
    library, _, own = name.partition(":")
    maker = _MAKERS[library](own) if library in _MAKERS else _factory(library, own)
    try:
        inspect.signature(maker).bind(num_classes=num_classes, **options)
    except (TypeError, ValueError) as error:  # ValueError: a builtin says nothing of its arguments
        raise InputError(f"{name} cannot be called with num_classes={num_classes} and {options}: {error}") from error
    network = maker(num_classes=num_classes, **options)
    if not isinstance(network, nn.Module):
        raise InputError(f"{name} must give a torch.nn.Module, not a {type(network).__name__}")
    if hasattr(network, "feature_channels"):
        return network
    return tapped(network, name, num_classes)


def pretrained(name: str, num_classes: int) -> nn.Module:
    """A network of torchvision or timm with the weights that its library has for it, downloaded where they are not.

    Args:
        name: torchvision:NAME, whose default weights are taken, or timm:NAME.
        num_classes: K of the data, which the weights must have been trained for.

    Raises:
        InputError: no such library or network, no weights for it or none that can be fetched, or weights for another
            number of classes.
    """
    library, _, own = name.partition(":")
    maker = _MAKERS[library](own)  # says what is wrong with the name
    try:
        if library == "torchvision":
            from fastfuse.models.imagenet import _torchvision_models

            weights = _torchvision_models(name).get_model_weights(own).DEFAULT
            classes = len(weights.meta["categories"])
            network: Any = maker(weights=weights, num_classes=classes) if classes == num_classes else None
        else:
            import timm

            network = timm.create_model(own, pretrained=True)
            classes = network.num_classes
    except Exception as error:  # no weights at all, no network, a damaged download: each library has its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"the weights of {name} cannot be had ({reason}); give a weight file or a run folder in --teachers"
        ) from error
    if classes != num_classes:
        raise InputError(
            f"the weights of {name} know {classes} classes, and the data have {num_classes}: train such a network on "
            f"these data and give its run, or leave --teachers out and give --teacher-model {name}"
        )
    return tapped(network, name, num_classes)


def tapped(network: nn.Module, name: str, num_classes: int) -> nn.Module:
    """A classifier with its taps chosen automatically.

    Args:
        network: images [B, 3, H, W] to logits [B, K].
        name: for messages.
        num_classes: K.

    Raises:
        InputError: it runs on no blank images, gives something else, or has no maps.
    """
    find = _intermediate_maps if hasattr(network, "forward_intermediates") else last_maps
    found = _on_blank_images(network, name, find)
    for mode, (output, _) in found.items():
        if not isinstance(output, Tensor) or output.shape != (2, num_classes):
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"{name} gives {given} in {mode} for two images, not logits (2, {num_classes}); give an option that "
                "changes it, or a factory of your own, as package.module:factory"
            )
    training, evaluation = (maps for _, maps in found.values())
    taps = [tap for tap in training if tap in evaluation]
    if not taps:
        raise InputError(f"{name} makes no maps [B, C, H, W] of more than one position; choose a convolutional network")
    made: Any = Intermediates(network, taps) if find is _intermediate_maps else extract(network, taps)
    made.feature_channels = tuple(training[tap][0] for tap in taps)
    return made


def tapped_at(network: nn.Module, name: str, taps: Sequence[str]) -> nn.Module:
    """A network with layers of it as its taps.

    Args:
        network: images [B, 3, H, W] to logits [B, K]; taps of its own are left.
        name: for messages.
        taps: paths of layers, shallow to deep.

    Raises:
        InputError: a layer that does not exist or cannot be tapped, or gives no map [B, C, H, W].
    """
    own = network.network if isinstance(network, Wrapper) else network
    made: Any = Tapped(own, None, checked_taps(own, taps))

    def shapes(blank: Tapped, images: Tensor) -> list[torch.Size]:
        with torch.no_grad():
            return [feature.shape for feature in blank(images).features]

    found = _on_blank_images(made, name, shapes)["training"]
    for path, shape in zip(taps, found, strict=True):
        if len(shape) != 4:
            raise InputError(f"--taps {path}: the layer gives {list(shape)}, not a map [B, C, H, W]; tap another one")
    sizes = [shape[-1] for shape in found]
    if sizes != sorted(sizes, reverse=True):
        raise InputError(f"--taps {' '.join(taps)}: maps are given shallow to deep, but these have widths {sizes}")
    made.feature_channels = tuple(shape[1] for shape in found)
    return made


class Tapped(Extracted):
    """A network, which may have taps of its own, with others."""

    def forward(self, images: Tensor) -> NetworkOutput:
        """[B, 3, H, W] to logits [B, K] and the maps."""
        output, features = super().forward(images)
        return NetworkOutput(output.logits if isinstance(output, NetworkOutput) else output, features)


class Intermediates(Wrapper):
    """A network of timm that gives its own intermediate maps.

    Args:
        network: has timm's `forward_intermediates` and `forward_head`.
        indices: of the maps.
    """

    def __init__(self, network: nn.Module, indices: list[int]) -> None:
        super().__init__(network)
        self.indices = indices

    def forward(self, images: Tensor) -> NetworkOutput:
        """[B, 3, H, W] to logits [B, K] and the maps."""
        network: Any = self.network
        last, maps = network.forward_intermediates(images, indices=self.indices)
        return NetworkOutput(network.forward_head(last), tuple(maps))


def _intermediate_maps(network: Any, images: Tensor) -> tuple[Tensor, dict[int, tuple[int, int, int]]]:
    """As `last_maps`, of a network of timm: the logits and the last of its maps of each resolution, by index."""
    with torch.no_grad():
        last, maps = network.forward_intermediates(images)
        logits = network.forward_head(last)
    chosen = {tuple(m.shape[2:]): i for i, m in enumerate(maps) if m.dim() == 4 and m.shape[2] * m.shape[3] > 1}
    return logits, {i: tuple(maps[i].shape[1:]) for i in chosen.values()}


def _on_blank_images(network: nn.Module, name: str, find: Callable[..., Any]) -> dict[str, Any]:
    """What `find` finds in both modes, on a copy: neither statistics nor random numbers of the network change."""
    reason = ""
    own = next((p.device for p in network.parameters()), torch.device("cpu"))
    # Without values first, which takes no time; then with them, for a network that looks at them.
    for device in (torch.device("meta"), own):
        blank = copy.deepcopy(network).to(device)
        for size in BLANK_SIZES:
            images = torch.zeros(2, 3, size, size, device=device)
            try:
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    return {"training": find(blank.train(), images), "evaluation": find(blank.eval(), images)}
            except Exception as error:  # a network can raise anything
                reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
    sizes = " or ".join(f"{size}x{size}" for size in BLANK_SIZES)
    raise InputError(f"{name} does not run on blank images of {sizes}: {reason}")


def _torchvision(own: str) -> Callable[..., nn.Module]:
    from fastfuse.models.imagenet import _torchvision_models

    models = _torchvision_models(f"torchvision:{own}")
    names = models.list_models(module=models)
    if own not in names:
        raise unknown_name("network of torchvision", own, names)
    return models.get_model_builder(own)


def _timm(own: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise InputError(
            f"timm:{own} needs timm, which cannot be imported ({error}): pip install timm, or choose another model"
        ) from error
    if own not in (names := timm.list_models()):
        raise unknown_name("network of timm", own, names)

    def maker(num_classes: int, **options: Any) -> nn.Module:
        return timm.create_model(own, num_classes=num_classes, **options)

    return maker


def _factory(module: str, own: str) -> Callable[..., nn.Module]:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InputError(
            f"model {module}:{own}: there is no module {error.name!r}; a factory is named package.module:factory, and "
            "its package is installed or on PYTHONPATH"
        ) from error
    makers = {key: value for key, value in vars(found).items() if callable(value) and not key.startswith("_")}
    if own not in makers:
        raise unknown_name(f"factory in {module}", own, makers)
    return makers[own]


_MAKERS: dict[str, Callable[[str], Callable[..., nn.Module]]] = {"torchvision": _torchvision, "timm": _timm}
