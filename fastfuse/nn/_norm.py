"""A batch norm as the operators take it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastfuse.errors import InputError
from fastfuse.functional import BatchNorm


def batch_norm(norm: _BatchNorm, *, training: bool | None = None, counters: list[Tensor] | None = None) -> BatchNorm:
    """The parameters of a norm; counts the batch in training mode, as the norm's own forward would.

    Args:
        norm: the module that holds them.
        training: mode to use; None takes the module's own, so that a norm that a user froze stays frozen.
        counters: takes the counter of a norm in training mode, for the caller to advance many at once.

    Raises:
        InputError: a norm without affine parameters, running statistics or momentum, or a SyncBatchNorm.
    """
    if isinstance(norm, nn.SyncBatchNorm):
        raise InputError("SyncBatchNorm would take local statistics here; leave this module out of its conversion")
    missing = [name for name in ("weight", "bias", "running_mean", "running_var") if getattr(norm, name) is None]
    if missing:
        raise InputError(f"the norm has no {', '.join(missing)}; make it with affine=True, track_running_stats=True")
    if norm.momentum is None:
        raise InputError("momentum=None, a cumulative average, would wait for the device; give the norm a number")
    training = norm.training if training is None else training
    held: Any = norm  # of which nothing is None, as was just looked at
    if training and counters is None:
        held.num_batches_tracked.add_(1)
    elif training and counters is not None:
        counters.append(held.num_batches_tracked)
    statistics = held.running_mean, held.running_var
    across = getattr(norm, "across", None)  # see sync_norm
    return BatchNorm(norm.weight, norm.bias, *statistics, training, float(norm.momentum), norm.eps, across)


def count(counters: list[Tensor]) -> None:
    """Count a batch in all of them, in one launch."""
    if counters:
        torch._foreach_add_(counters, 1)
