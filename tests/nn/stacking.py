"""What the tests of stacked networks share: networks with untidy values, one training step, comparisons by name."""

import copy

import torch
from torch import Tensor, nn

from fastfuse import models
from fastfuse.nn import Networks
from tests.losses.batches import differing

CLASSES = 5
BOUND = 1e-10


def untidy(network: nn.Module, seen: int = 0) -> nn.Module:
    """In float64, with norms and statistics that are not their initial ones, after a number of batches."""
    for layer in network.double().modules():
        if isinstance(layer, nn.BatchNorm2d):
            with torch.no_grad():
                for x in (layer.weight, layer.bias, layer.running_mean):
                    x.normal_()
                layer.running_var.uniform_(0.5, 2.0)
                layer.num_batches_tracked.fill_(seen)
    return network


def members(model: str, count: int, **options: object) -> Networks:
    return Networks(untidy(models.build(model, CLASSES, **options), 7 * i) for i in range(count))


def tensors(outputs: list) -> list[Tensor]:
    """All tensors that networks gave, network by network."""
    return [x for logits, features in outputs for x in (logits, *features)]


def cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """The same for outputs of one shape, whichever network they come from."""
    return [torch.arange(x.numel(), dtype=x.dtype).mul(1.7).cos().view(x.shape) for x in outputs]


def gradients(networks: Networks) -> dict[str, Tensor]:
    """Of all parameters, by network, whatever the strategy."""
    found = {}
    for name, p in networks.named_parameters():
        found |= networks.split(name, p.grad)
    return found


def same(found: dict[str, Tensor] | list[Tensor], wanted: dict[str, Tensor] | list[Tensor]) -> None:
    """Equal up to the bound relative to each tensor's largest element."""
    found, wanted = (x if isinstance(x, dict) else dict(enumerate(x)) for x in (found, wanted))
    assert set(found) == set(wanted)
    assert differing({n: x.double() for n, x in found.items()}, {n: x.double() for n, x in wanted.items()}, BOUND) == {}


def step(networks: Networks, images: Tensor) -> list[Tensor]:
    """One training step on a loss that reads every output; gives the outputs."""
    optimizer = torch.optim.SGD(networks.parameters(), 0.01, 0.9, weight_decay=1e-2, nesterov=True)
    optimizer.zero_grad()
    found = tensors(networks(images))
    torch.autograd.backward(found, cotangents(found))
    optimizer.step()
    return [x.detach() for x in found]


def check_equal(loop: Networks, images: Tensor, *, replicas: int = 1) -> Networks:
    """Grouped networks against the loop: outputs, gradients, statistics, counts, one step, and evaluation after it."""
    grouped = copy.deepcopy(loop)
    assert loop.arrange("loop", replicas=replicas) == "loop"
    assert grouped.arrange("grouped", replicas=replicas) == "grouped"
    same(step(grouped, images), step(loop, images))
    same(gradients(grouped), gradients(loop))
    same(dict(grouped.state_dict()), dict(loop.state_dict()))
    loop.eval(), grouped.eval()
    same(tensors(grouped(images)), tensors(loop(images)))
    return grouped
