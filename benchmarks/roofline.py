"""The least time that a step's networks need on a device: bytes over its copy bandwidth, products over its matrix rate.

Both rates are measured in the same run. The bytes are those of an engine whose convolutions take everything between
them along: statistics of batch norm leave the convolution that makes a map, normalisation and ReLU belong to the one
that reads it, and the same backward. Per convolution from a map X to a map Y, and per block that ends in a sum Z:

    forward           read X, write Y
    input's gradient  read dY and Y, write dX, read X        (none for the images)
    weight's gradient read dY and Y, read X
    residual sum      read two maps and write one, forward and backward: 6 Z
    max pooling       read a map and write P, and read dP: the weight's gradient before it remakes the rest

Weights, and all that distillation adds, are left out: the bound stays a bound.
"""

from typing import NamedTuple

import torch
from torch import nn

from benchmarks.timing import measure_in_turn
from fastfuse import models
from fastfuse.train.modes import float32_products

MATRIX = 8192


class Work(NamedTuple):
    """Bytes moved and floating point operations, a multiplication and an addition counted as two."""

    bytes: int
    flops: int


class Rates(NamedTuple):
    """Bytes per second of a copy, read plus written, and FLOP per second of a matrix product."""

    copy: float
    matrix: float


def least_work(model: str, *, networks: int, batch_size: int, image_size: int, element_bytes: int) -> Work:
    """One training step of independent networks of one architecture."""
    with torch.device("meta"):
        network = models.build(model, 10)
        images = torch.empty(batch_size, 3, image_size, image_size)
    elements, flops = 0, 0

    def note(layer: nn.Conv2d, inputs: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
        nonlocal elements, flops
        x, products = inputs[0], 2 * y.numel() * layer.weight[0].numel()
        first = x is images
        elements += x.numel() + y.numel() + (2 * y.numel() + x.numel())
        flops += 2 * products
        if not first:
            elements += 2 * y.numel() + 2 * x.numel()
            flops += products

    def note_sum(block: nn.Module, inputs: tuple[torch.Tensor, ...], z: torch.Tensor) -> None:
        nonlocal elements
        elements += 6 * z.numel()

    def note_pool(pool: nn.Module, inputs: tuple[torch.Tensor, ...], p: torch.Tensor) -> None:
        nonlocal elements
        elements += inputs[0].numel() + 2 * p.numel()

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
        elif isinstance(layer, nn.MaxPool2d):
            layer.register_forward_hook(note_pool)
        elif type(layer).__name__.endswith(("Block", "Bottleneck")):
            layer.register_forward_hook(note_sum)
    network(images)
    return Work(networks * elements * element_bytes, networks * flops)


def least_ms(work: Work, rates: Rates) -> float:
    """Milliseconds below which no step can come: the slower of memory and arithmetic."""
    return 1e3 * max(work.bytes / rates.copy, work.flops / rates.matrix)


def measured_rates(device: torch.device, dtype: torch.dtype, repeats: int) -> Rates:
    """Of a GPU, by a copy of 1 GiB and a product of two square matrices of `MATRIX` rows in `dtype`.

    Float32 products are as exact as those of convolutions, which PyTorch lets use TF32: the bound is theirs.
    """
    a, b = (torch.randn(MATRIX, MATRIX, device=device, dtype=dtype) for _ in range(2))
    with float32_products(tf32=torch.backends.cudnn.allow_tf32):
        timing = measure_in_turn({"matrix": lambda: a @ b}, repeats=repeats, calls=5, warmup=3, device=device)["matrix"]
    return Rates(copy_rate(device, repeats), 2 * MATRIX**3 / (timing.median / 1e3))


def copy_rate(device: torch.device, repeats: int) -> float:
    """Measured bandwidth of a copy in bytes per second, read plus written: of 1 GiB, on a CPU 64 MiB."""
    source = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    timing = measure_in_turn({"copy": lambda: target.copy_(source)}, repeats=repeats, calls=5, warmup=3, device=device)
    return 2 * source.nbytes / (timing["copy"].median / 1e3)
