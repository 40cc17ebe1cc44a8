"""A batch norm as the operators take it."""

from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.functional import BatchNorm


def batch_norm(
    norm: nn.BatchNorm2d, *, training: bool | None = None, counters: list[Tensor] | None = None
) -> BatchNorm:
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
    if training and counters is None:
        norm.num_batches_tracked.add_(1)
    elif training:
        counters.append(norm.num_batches_tracked)
    return BatchNorm(
        norm.weight, norm.bias, norm.running_mean, norm.running_var, training, float(norm.momentum), norm.eps
    )
