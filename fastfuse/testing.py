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


def assert_within_budget(ours: Tensor, truth: Tensor, eager: Tensor, *, what: str = "result") -> None:
    """Hold a kernel's result to twice what eager of the same dtype gets wrong, plus one rounding of the output.

    Args:
        ours: the kernel's result.
        truth: the same computed in float64.
        eager: the same by the reference in the kernel's dtype.
        what: named in the message.

    Raises:
        AssertionError: shape or dtype differ from eager's, or the relative L2 error exceeds the budget.
    """
    assert ours.shape == eager.shape, f"{what}: shape {list(ours.shape)}, the reference gives {list(eager.shape)}"
    assert ours.dtype == eager.dtype, f"{what}: {ours.dtype}, the reference gives {eager.dtype}"
    budget = 2 * (relative_l2(eager, truth) + torch.finfo(ours.dtype).eps)
    error = relative_l2(ours, truth)
    assert error <= budget, f"{what}: relative error {error:.2e}, budget {budget:.2e}"
