"""Measures of agreement that the tests and the benchmarks share."""

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor


def relative_l2(ours: Tensor, truth: Tensor) -> float:
    """L2 norm of the difference as a share of the truth's norm, computed in float64, on the device if both are there.

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
    ours, truth = ours.detach().double(), truth.detach().double()
    if ours.device != truth.device:
        ours, truth = ours.cpu(), truth.cpu()
    if not bool(torch.isfinite(ours).all() and torch.isfinite(truth).all()):
        return float("inf")
    error, norm = (ours - truth).norm().item(), truth.norm().item()
    return error / norm if norm else (0.0 if error == 0 else float("inf"))


def assert_within_budget(
    ours: Tensor, truth: Tensor, eager: Tensor | Sequence[Tensor], *, what: str = "result"
) -> None:
    """Hold a kernel's result to twice what eager of the same dtype gets wrong, plus one rounding of the output.

    Args:
        ours: the kernel's result.
        truth: the same computed in float64.
        eager: the same by the reference in the kernel's dtype; of several, summed in other orders, the worst counts.
        what: named in the message.

    Raises:
        AssertionError: shape or dtype differ from eager's, or the relative L2 error exceeds the budget.
    """
    eager = [eager] if isinstance(eager, Tensor) else list(eager)
    shape, dtype = eager[0].shape, eager[0].dtype
    assert ours.shape == shape, f"{what}: shape {list(ours.shape)}, the reference gives {list(shape)}"
    assert ours.dtype == dtype, f"{what}: {ours.dtype}, the reference gives {dtype}"
    budget = 2 * (max(relative_l2(x, truth) for x in eager) + torch.finfo(ours.dtype).eps)
    error = relative_l2(ours, truth)
    assert error <= budget, f"{what}: relative error {error:.2e}, budget {budget:.2e}"


def in_other_orders(compute: Callable[[], list[Tensor]]) -> Iterator[list[Tensor]]:
    """Results of eager code as several CPUs would round them: on one thread and on two, with and without oneDNN.

    The error of one order of summation on small tensors is a matter of luck, and no budget to hold a kernel to.

    Args:
        compute: gives the results; is called anew for each order.
    """
    threads, onednn = torch.get_num_threads(), torch.backends.mkldnn.enabled
    try:
        for count, enabled in product((1, 2), (True, False)):
            torch.set_num_threads(count)
            setattr(torch.backends.mkldnn, "enabled", enabled)  # noqa: B010 (a property of the module, which its types do not know)
            yield compute()
    finally:
        torch.set_num_threads(threads)
        torch.backends.mkldnn.enabled = onednn
