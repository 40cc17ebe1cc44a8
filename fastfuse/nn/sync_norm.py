"""Batch norms that take the statistics of all processes that train together."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastfuse.errors import InputError
from fastfuse.functional import Across
from fastfuse.nn._norm import batch_norm
from fastfuse.nn._stacked_layers import StackedNorm
from fastfuse.nn.networks import Networks


class _Synchronised(_BatchNorm):
    """What a plain batch norm becomes: in training its statistics are those of all processes."""

    across: Across

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] to the same."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        return batch_norm(self)(x)


class SynchronisedNorm1d(_Synchronised, nn.BatchNorm1d):
    """`nn.BatchNorm1d` with the statistics of all processes."""


class SynchronisedNorm2d(_Synchronised, nn.BatchNorm2d):
    """`nn.BatchNorm2d` with the statistics of all processes."""


_KINDS: dict[type, type] = {nn.BatchNorm1d: SynchronisedNorm1d, nn.BatchNorm2d: SynchronisedNorm2d}


def synchronise(module: nn.Module) -> Across:
    """Let every batch norm of a module that is in training mode take the statistics of all processes.

    In place: parameters, buffers, their names and whoever holds them stay. Fused operators of such norms step aside for
    their references (`backend="auto"`). Frozen norms, and evaluation, are as they were.

    Args:
        module: networks, fusion head, transforms: whatever holds norms; arranged, see `fastfuse.nn.Networks`. Every
            process of the default process group must have the same, and call it as often.

    Returns:
        What all the norms share: set `counted` to False while this process only stands in.

    Raises:
        InputError: a norm of another class, whose forward is not known here, or one without running statistics, affine
            parameters or momentum; it is named, and nothing is changed.
    """
    norms = {name: norm for name, norm in module.named_modules() if isinstance(norm, _BatchNorm)}
    for name, norm in norms.items():
        kind = type(norm).__name__
        if type(norm) not in (*_KINDS, *_KINDS.values(), StackedNorm):
            raise InputError(f"layer {name} ({kind}) cannot be synchronised: leave --sync-batchnorm out")
        try:
            batch_norm(norm, training=False)
        except InputError as error:
            reason = str(error).partition(";")[0]
            raise InputError(
                f"layer {name} ({kind}) cannot be synchronised: {reason}; leave --sync-batchnorm out"
            ) from error
    for networks in module.modules():
        if isinstance(networks, Networks):
            networks.keep_in_step()
    across = Across()
    changed: list[Any] = list(norms.values())
    for norm in changed:
        norm.__class__ = _KINDS.get(type(norm), type(norm))
        norm.across = across
    return across
