"""What a network costs at inference: parameters and multiply-adds counted, latency measured."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastfuse import info

_WARM_UP, _REPEATS = 3, 20


class Cost(NamedTuple):
    """Numbers of `parameters`, and of `multiply_adds` for one image."""

    parameters: int
    multiply_adds: int


class Latency(NamedTuple):
    """Milliseconds of a forward of one image: `median`, `fastest` and `slowest` of so many on the named device."""

    median: float
    fastest: float
    slowest: float
    forwards: int
    device: str


@torch.no_grad()
def cost(network: nn.Module, image_size: tuple[int, int]) -> Cost:
    """Count a network's cost.

    Args:
        network: in evaluation mode, on the CPU.
        image_size: (height, width).
    """
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *image_size))
    # The counter counts a multiply-add as two operations.
    return Cost(sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2)


@torch.no_grad()
def latency(networks: Mapping[str, nn.Module], image_size: tuple[int, int], device: torch.device) -> dict[str, Latency]:
    """Measure several networks in turn, so that whatever else the machine does meets all of them.

    Args:
        networks: by name, in evaluation mode; they are moved to the device and back to the CPU.
        image_size: (height, width).
        device: where.
    """
    images = torch.randn(1, 3, *image_size).to(device)
    moved = {name: network.to(device) for name, network in networks.items()}
    times: dict[str, list[float]] = {name: [] for name in moved}
    for turn in range(_WARM_UP + _REPEATS):
        for name, network in moved.items():
            taken = _milliseconds(network, images, device)
            if turn >= _WARM_UP:
                times[name].append(taken)
    for network in moved.values():
        network.cpu()
    where = info.device_name(device)
    return {name: Latency(statistics.median(t), min(t), max(t), len(t), where) for name, t in times.items()}


def _milliseconds(network: Callable[[Tensor], object], images: Tensor, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    network(images)
    _wait(device)
    return 1000 * (time.perf_counter() - began)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
