"""The first part of concat_fuse in CUDA C++: depthwise 3x3, batch norm, ReLU. See csrc/concat_fuse.cuh."""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastfuse.errors import BackendUnavailableError
from fastfuse.kernels.concat_fuse.layout import PARAMETERS, Module

# What describes a launch travels as kernel parameters, of which there may be 4 KiB (csrc/concat_fuse.cuh).
MOST_MAPS = 20
MOST_MODULES = 8


def forward(call: Any, modules: Sequence[Module], hidden: Sequence[Tensor], statistics: Sequence[Tensor]) -> None:
    """Fills the ReLUs' outputs and the batch's statistics, and updates the running ones."""
    for group in _groups(modules):
        torch.ops.fastfuse_cuda.concat_fuse_fwd_first(*_described(modules[group]), hidden[group], statistics[group])


def backward(
    call: Any, modules: Sequence[Module], of_hidden: Sequence[Tensor], found: Sequence[Sequence[Tensor | None]]
) -> list[tuple]:
    """Fills the gradients of the 3x3 weights, the norms' parameters and the maps, where there are any."""
    for group in _groups(modules):
        own = [x for gradients in found[group] for x in (*gradients[:3], *gradients[PARAMETERS:])]
        wanted, needs = [x for x in own if x is not None], [x is not None for x in own]
        torch.ops.fastfuse_cuda.concat_fuse_bwd_first(*_described(modules[group]), of_hidden[group], wanted, needs)
    return []


def _groups(modules: Sequence[Module]) -> Iterator[slice]:
    """Consecutive modules that one launch can describe."""
    start = maps = 0
    for end, module in enumerate(modules):
        count = len(module.features)
        if count > MOST_MAPS:
            raise BackendUnavailableError(
                f"concat_fuse cannot run on backend 'cuda': its kernels take at most {MOST_MAPS} maps of a module, "
                f"this one has {count}; use backend='auto'"
            )
        if maps + count > MOST_MAPS or end - start == MOST_MODULES:
            yield slice(start, end)
            start, maps = end, 0
        maps += count
    yield slice(start, len(modules))


def _described(modules: Sequence[Module]) -> tuple:
    """Maps, their counts, parameters and statistics of the first norms, their mode, momentum and epsilon."""
    norms = [module.norm1 for module in modules]
    return (
        list(chain.from_iterable(module.features for module in modules)),
        [len(module.features) for module in modules],
        list(chain.from_iterable((m.depthwise, m.norm1.weight, m.norm1.bias) for m in modules)),
        list(chain.from_iterable((norm.mean, norm.var) for norm in norms)),
        norms[0].training,
        list(chain.from_iterable((norm.momentum, norm.eps) for norm in norms)),
    )
