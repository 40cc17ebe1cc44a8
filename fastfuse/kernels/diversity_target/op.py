"""Public form of diversity_loss and diversity_target."""

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _numerics, _triton
from fastfuse.kernels.diversity_target import reference
from fastfuse.kernels.diversity_target.autograd import DiversityLossFunction

MODES = ("published", "normalized")
MAX_POSITIONS = 1024


def _why_not_triton(tensor: Tensor | None) -> str | None:
    reason = _triton.why_not(tensor)
    if reason is None and tensor is not None and tensor.dim() > 2:
        positions = tensor.shape[-1] * tensor.shape[-2]
        if positions > MAX_POSITIONS:
            reason = f"its kernels sort a map of at most {MAX_POSITIONS} positions, this one has {positions}"
    return reason


_dispatch.register("diversity_target", {"triton": _why_not_triton, "reference": None})


def diversity_loss(
    x: Tensor, y: Tensor, *, mode: str = "published", reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    """Distance of x's normalised attention map from the shifted attention of y.

    mean over B and N = H W of (xh - t)^2 with xh = nrm(att(x)), yh = nrm(att(y)), tau the (N // 3)-th smallest value of
    yh, and t = n - yh above tau, yh below, n / 2 at it. Source: FFSD (arXiv 2103.14473), diversity loss of its program.

    Args:
        x: [B, C, H, W], or an attention map [B, H, W].
        y: the reference student's map, the same B, H, W; its channels may differ. Detached.
        mode: "published": n = |att(y)|, the un-normalised norm, as the published program computes it;
            "normalized": n = 1, the consistent scaling.
        reduction: over samples: "mean", "sum" or "none".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        0-d, or [B] for "none".

    Raises:
        InputError, TypeError: maps of different B, H, W or device, H W < 3, an unknown mode.
    """
    _numerics.check_floating("x", x, (3, 4))
    _numerics.check_reduction(reduction)
    _check_reference(y, mode, (3, 4))
    _numerics.check_same_device("x", x, y=y)
    if (x.shape[0], *x.shape[-2:]) != (y.shape[0], *y.shape[-2:]):
        raise InputError(f"x {list(x.shape)} and y {list(y.shape)} must agree in batch, height and width")
    if "reference" in {_dispatch.resolve("diversity_target", backend, tensor) for tensor in (x, y)}:
        return reference.diversity_loss(x, y.detach(), mode, reduction)
    return DiversityLossFunction.apply(x, y.detach(), mode, reduction)


def diversity_target(y: Tensor, *, mode: str = "published", backend: str = "auto") -> Tensor:
    """The feature map y with its attention shifted: y + (t - yh) |att(y)| / C, broadcast over channels.

    Symbols and source as in `diversity_loss`.

    Args:
        y: [B, C, H, W] floating point, H W >= 3. Detached.
        mode: "published" or "normalized".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [B, C, H, W], the dtype of y; carries no gradient.

    Raises:
        InputError, TypeError: wrong dtype or dimensions, H W < 3, an unknown mode.
    """
    _check_reference(y, mode, (4,))
    if _dispatch.resolve("diversity_target", backend, y) == "reference":
        return reference.diversity_target(y.detach(), mode)
    return torch.ops.fastfuse.diversity_target_fwd(y.detach(), mode)


def _check_reference(y: Tensor, mode: str, dims: tuple[int, ...]) -> None:
    _numerics.check_floating("y", y, dims)
    if mode not in MODES:
        raise InputError(f"mode is {' or '.join(map(repr, MODES))}, not {mode!r}")
    if y.shape[-1] * y.shape[-2] < 3:
        raise InputError(
            f"y {list(y.shape)}: the diversity threshold needs maps of at least 3 positions; use larger images"
        )
