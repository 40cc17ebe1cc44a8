"""Weights cast together are those that autocast casts one by one, and take two launches instead of two for each."""

import collections

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.nn import Networks, Teachers, stack

# How many weights and biases of a ResNet-8 autocast casts.
CAST = 11


class Counted(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def networks(strategy):
    torch.manual_seed(0)
    found = Networks(models.build("resnet8", 5) for _ in range(3)).to(memory_format=torch.channels_last)
    found.arrange(strategy)
    return found


def run(peers):
    """Outputs and gradients, in bfloat16 autocast, and the operators of the last step."""
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    for _ in range(2):  # the first one looks at the networks
        peers.zero_grad()
        with Counted() as seen:
            with torch.autocast("cpu", torch.bfloat16):
                outputs = peers(images)
            found = [x for own in outputs for x in (own.logits, *own.features)]
            sum(x.float().square().mean() for x in found).backward()
    return [*found, *(p.grad for p in peers.parameters())], seen.calls


@pytest.mark.parametrize("strategy", ["loop", "grouped"])
def test_values_and_gradients_are_those_of_autocast_to_the_bit(strategy):
    together, apart = networks(strategy), networks(strategy)
    apart.casts_together = False
    parameters = list(together.parameters())
    (ours, calls), (theirs, alone) = run(together), run(apart)
    assert all(torch.equal(x, y) and x.stride() == y.stride() for x, y in zip(ours, theirs, strict=True))
    assert calls["_foreach_copy_"] == 2 and alone["_foreach_copy_"] == 0
    each = CAST * (1 if strategy == "grouped" else 3)
    assert alone["_to_copy"] - calls["_to_copy"] == 2 * each
    assert [id(p) for p in together.parameters()] == [id(p) for p in parameters]
    assert calls["clone"] == alone["clone"], "a gradient was copied where it is given to its parameter"


def test_teachers_cast_once():
    teachers = Teachers([models.build("resnet8", 5) for _ in range(2)])
    teachers.arrange("loop")
    for _ in range(2):  # the first one looks at the networks
        with Counted() as seen, torch.autocast("cpu", torch.bfloat16):
            teachers(torch.randn(2, 3, 16, 16))
    assert (seen.calls["_foreach_copy_"], seen.calls["_to_copy"]) == (1, 2)  # each casts the images


class Careful(nn.Module):
    """One layer keeps its precision."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            x = self.first(x)
        return self.second(x)


def test_a_network_that_leaves_autocast_is_left_alone_and_cannot_be_stacked():
    peers = Networks([Careful(), Careful()])
    with torch.autocast("cpu", torch.bfloat16):
        first, _ = peers(torch.randn(2, 3, 8, 8))
    assert first.dtype == torch.bfloat16
    with pytest.raises(InputError, match="autocast"):
        stack(list(peers))


def test_without_autocast_and_in_float64_nothing_is_cast():
    peers = networks("grouped")
    with Counted() as seen:
        peers(torch.randn(2, 3, 16, 16))
    assert seen.calls["_foreach_copy_"] == 0
