"""A batch norm as the operators take it."""

from torch import nn

from fastfuse.functional import BatchNorm


def batch_norm(norm: nn.BatchNorm2d, *, training: bool | None = None) -> BatchNorm:
    """The parameters of a norm; counts the batch in training mode, as the norm's own forward would.

    Args:
        norm: the module that holds them.
        training: mode to use; None takes the module's own, so that a norm that a user froze stays frozen.
    """
    training = norm.training if training is None else training
    if training:
        norm.num_batches_tracked.add_(1)
    return BatchNorm(
        norm.weight, norm.bias, norm.running_mean, norm.running_var, training, float(norm.momentum or 0.1), norm.eps
    )
