"""Measures of agreement that the tests and the benchmarks share."""

import torch
from torch import Tensor


def relative_l2(ours: Tensor, truth: Tensor) -> float:
    """L2 norm of the difference as a share of the truth's norm, computed in float64.

    Args:
        ours: any shape and dtype.
        truth: the same shape; its dtype may differ.

    Returns:
        0 where both are zero (or empty), infinity where only the truth is zero or either holds a non-finite value.

    Raises:
        ValueError: the shapes differ; nothing is broadcast.
    """
    if ours.shape != truth.shape:
        raise ValueError(f"shapes {list(ours.shape)} and {list(truth.shape)} differ")
    ours, truth = ours.detach().double().cpu(), truth.detach().double().cpu()
    if not bool(torch.isfinite(ours).all() and torch.isfinite(truth).all()):
        return float("inf")
    error, norm = (ours - truth).norm().item(), truth.norm().item()
    return error / norm if norm else (0.0 if error == 0 else float("inf"))
