"""Batches that the norms of several networks have seen, counted in one launch.

PyTorch's norms count each for itself, a launch for every norm of every network in every step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.nn._stacked_checks import hooked

# Exactly these, and what `fastfuse.nn.sync_norm` makes of them: a norm derived from one may do else with its counter.
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_COUNTER = "num_batches_tracked"


def norms_of(network: nn.Module) -> list[nn.Module]:
    """The norms whose counter their own forward alone touches; none of a network that a compiler has taken in part."""
    modules = list(network.modules())
    # By name: importing the compiler for this would take seconds.
    if any(type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None for module in modules):
        return []
    norms = [m for m in modules if type(m) in _NORMS or (isinstance(m, _NORMS) and hasattr(m, "across"))]
    return [norm for norm in norms if not hooked(norm)]


@contextmanager
def counted_together(norms: Callable[[], Sequence[nn.Module]]) -> Iterator[None]:
    """A block in which norms in training count on the host; at its end all their counters advance in one launch.

    Every counter then holds what it would without. Norms that read theirs (momentum=None) keep it, and so does a
    compiler, which arranges launches by itself.

    Args:
        norms: gives those of `norms_of`; asked only if they are needed.
    """
    if torch.compiler.is_compiling():
        yield
        return
    counting: Any = [norm for norm in norms() if norm.training and norm.momentum is not None]
    places = [(norm._buffers, norm._buffers[_COUNTER]) for norm in counting]
    places = [(own, counter) for own, counter in places if counter is not None]
    tallies = {id(counter): _Tally(counter) for _, counter in places}
    for own, counter in places:
        own[_COUNTER] = tallies[id(counter)]
    try:
        yield
    finally:
        for own, counter in places:
            own[_COUNTER] = counter
    _advance(list(tallies.values()))


class _Tally:
    """Stands in a norm for its counter."""

    def __init__(self, counter: Tensor) -> None:
        self.counter, self.batches = counter, 0

    def add_(self, batches: int) -> None:
        """What a norm does with its counter."""
        self.batches += batches


def _advance(tallies: Sequence[_Tally]) -> None:
    for batches in sorted({tally.batches for tally in tallies} - {0}):  # one for all as a rule
        torch._foreach_add_([tally.counter for tally in tallies if tally.batches == batches], batches)
