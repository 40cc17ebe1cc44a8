"""How large the maps of networks are for images of a size."""

import copy
from collections.abc import Iterable

import torch
from torch import nn

from fastfuse.errors import InputError


def last_map_sizes(networks: Iterable[nn.Module], image_size: int | tuple[int, int]) -> list[tuple[int, int]]:
    """(height, width) of the last map of each network, see `map_sizes`."""
    return [sizes[-1] for sizes in map_sizes(networks, image_size)]


def map_sizes(networks: Iterable[nn.Module], image_size: int | tuple[int, int]) -> list[list[tuple[int, int]]]:
    """(height, width) of the maps of each network, shallow to deep, found by a forward of copies on blank images.

    Args:
        networks: each gives a `NetworkOutput`; neither statistics nor random numbers change.
        image_size: (height, width) of the images, or one number for both.

    Raises:
        InputError: a network that does not run on such images.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return [_sizes(network, (height, width)) for network in networks]


def _sizes(network: nn.Module, size: tuple[int, int]) -> list[tuple[int, int]]:
    reason = ""
    own = next((p.device for p in network.parameters()), torch.device("cpu"))
    # Without values first, which takes no time; then with them, for a network that looks at them.
    for device in (torch.device("meta"), own):
        blank = copy.deepcopy(network).to(device).eval()
        try:
            with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                maps = blank(torch.zeros(2, 3, *size, device=device)).features
            return [(feature.shape[2], feature.shape[3]) for feature in maps]
        except Exception as error:  # a network can raise anything
            reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(f"images of {size[0]}x{size[1]} do not suit {type(network).__name__}: {reason}")
