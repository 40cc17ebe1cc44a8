"""Public form of diversity_loss, diversity_target and both at once, and which pairs share a launch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _extension, _limits, _numerics, _triton
from fastfuse.kernels.diversity_target import reference
from fastfuse.kernels.diversity_target.autograd import DiversityTarget

MODES = ("published", "normalized")
MAX_POSITIONS = 1024
# Addresses and strides travel as kernel parameters, of which there may be 4 KiB: about 80 bytes a pair.
MAX_PAIRS = 32


def _why_too_large(tensor: Tensor | None) -> str | None:
    if tensor is not None and tensor.dim() > 2 and (n := tensor.shape[-1] * tensor.shape[-2]) > MAX_POSITIONS:
        return f"its kernels sort a map of at most {MAX_POSITIONS} positions, this one has {n}"
    return None


def _why_not_triton(tensor: Tensor | None) -> str | None:
    return _triton.why_not(tensor) or _why_too_large(tensor)


def _why_not_cuda(tensor: Tensor | None) -> str | None:
    return _why_too_large(tensor) or _extension.why_not(tensor)


# Triton first as long as no measured row puts CUDA C++ before it.
_dispatch.register("diversity_target", {"triton": _why_not_triton, "cuda": _why_not_cuda, "reference": None})


def diversity(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    *,
    mode: str = "published",
    reduction: str = "mean",
    backend: str = "auto",
) -> tuple[Tensor, Tensor | list[Tensor]]:
    """`diversity_loss` and `diversity_target` of the same y, whose attention and threshold are computed once.

    Args:
        x, mode, reduction, backend: as in `diversity_loss`.
        y: as in `diversity_loss`, feature maps [B, C, H, W] only.

    Returns:
        What `diversity_loss(x, y)` and `diversity_target(y)` return.

    Raises:
        InputError, TypeError: as both.
    """
    single = isinstance(x, Tensor)
    losses, shifted = _run(_numerics.as_pairs(x, y), mode, reduction, backend, shift=True)
    return (losses.view(losses.shape[1:]), shifted[0]) if single else (losses, shifted)


def diversity_loss(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    *,
    mode: str = "published",
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Distance of x's normalised attention map from the shifted attention of y, for one pair or a list of pairs.

    mean over B and N = H W of (xh - t)^2 with xh = nrm(att(x)), yh = nrm(att(y)), tau the (N // 3)-th smallest value of
    yh, and t = n - yh above tau, yh below, n / 2 at it. Source: FFSD (arXiv 2103.14473), diversity loss of its program.

    Args:
        x: [B, C, H, W], or an attention map [B, H, W]; or a list of such maps of any shapes.
        y: the reference student's map, the same B, H, W; its channels may differ. One for each x. Detached.
        mode: "published": n = |att(y)|, the un-normalised norm, as the published program computes it;
            "normalized": n = 1, the consistent scaling.
        reduction: over the samples of a pair: "mean", "sum" or "none".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        For one pair 0-d (or [B] for "none"); for lists of P pairs [P] (or a stack [P, B] for "none",
            which needs equal B). float32 for half-precision input.

    Raises:
        InputError, TypeError: maps of different B, H, W or device, H W < 3, an unknown mode, lists of unequal length.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    single = isinstance(x, Tensor)
    losses, _ = _run(_numerics.as_pairs(x, y), mode, reduction, backend, shift=False)
    return losses.view(losses.shape[1:]) if single else losses


def diversity_target(
    y: Tensor | Sequence[Tensor], *, mode: str = "published", backend: str = "auto"
) -> Tensor | list[Tensor]:
    """The feature map y with its attention shifted: y + (t - yh) |att(y)| / C, broadcast over channels.

    Symbols and source as in `diversity_loss`.

    Args:
        y: [B, C, H, W] floating point, H W >= 3; or a list of such maps of any shapes. Detached.
        mode: "published" or "normalized".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        [B, C, H, W], the dtype of y, carries no gradient; for a list a list of them.

    Raises:
        InputError, TypeError: wrong dtype or dimensions, H W < 3, an unknown mode, an empty list.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    maps = [y] if isinstance(y, Tensor) else list(y)
    if not maps:
        raise InputError("y must hold at least one map")
    _, shifted = _run([(one,) for one in maps], mode, "none", backend, shift=True)
    return shifted[0] if isinstance(y, Tensor) else shifted


def _run(
    pairs: Sequence[tuple[Tensor, ...]], mode: str, reduction: str, backend: str, *, shift: bool
) -> tuple[Tensor, list[Tensor]]:
    """Losses of pairs (x, y), none of mere (y,), and the shifted y if asked for."""
    _check(pairs, mode, reduction, shift)
    used = {_dispatch.resolve("diversity_target", backend, one) for pair in pairs for one in pair}
    pairs = [(*pair[:-1], pair[-1].detach()) for pair in pairs]
    if len(used) > 1 or used == {"reference"}:
        losses = [reference.diversity_loss(*pair, mode, reduction) for pair in pairs if len(pair) > 1]
        shifted = [reference.diversity_target(pair[-1], mode) for pair in pairs if shift]
        return torch.stack(losses) if losses else pairs[0][-1].new_empty(0), shifted
    return _launches(pairs, mode, reduction, shift, used.pop())


def _launches(
    pairs: Sequence[tuple[Tensor, ...]], mode: str, reduction: str, shift: bool, backend: str
) -> tuple[Tensor, list[Tensor]]:
    """Pairs of the same dtypes and kinds of map share their launches, whatever their shapes."""
    groups: dict[tuple, list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault((i // MAX_PAIRS, *((one.dtype, one.dim()) for one in pair)), []).append(i)
    losses: dict[int, Tensor] = {}
    shifted: dict[int, Tensor] = {}
    for members in groups.values():
        _check_counts([pairs[i] for i in members])
        maps = [
            _triton.map_strides(one, far=True)[0]
            for side in zip(*(pairs[i] for i in members), strict=True)
            for one in side
        ]
        found, *moved = DiversityTarget.apply(backend, mode, reduction, shift, len(maps) - len(members), *maps)
        if len(groups) == 1:
            return found, moved
        losses.update(zip(members, found.unbind(0), strict=False))
        shifted.update(zip(members, moved, strict=False))
    return torch.stack([losses[i] for i in sorted(losses)]) if losses else found, [shifted[i] for i in sorted(shifted)]


def _check_counts(pairs: Sequence[tuple[Tensor, ...]]) -> None:
    """Refuse what the kernels of a launch cannot count; of its tables the largest batch makes a row."""
    row = max(y.shape[0] for *_, y in pairs)
    _limits.check_count("y", pairs[0][-1], "samples", len(pairs) * row)
    for *own, y in pairs:
        for name, one in (("y", y), *(("x", x) for x in own)):
            _limits.check_count(name, one, "channels", one.shape[1] if one.dim() == 4 else 1)


def _check(pairs: Sequence[tuple[Tensor, ...]], mode: str, reduction: str, shift: bool) -> None:
    if mode not in MODES:
        raise InputError(f"mode is {' or '.join(map(repr, MODES))}, not {mode!r}")
    _numerics.check_reduction(reduction)
    for i, (*own, y) in enumerate(pairs):
        x_name, y_name = (name if len(pairs) == 1 else f"{name}[{i}]" for name in "xy")
        _numerics.check_floating(y_name, y, (4,) if shift else (3, 4))
        if y.shape[-1] * y.shape[-2] < 3:
            raise InputError(
                f"{y_name} {list(y.shape)}: the diversity threshold needs maps of at least 3 positions; "
                "use larger images"
            )
        for x in own:
            _numerics.check_floating(x_name, x, (3, 4))
            _numerics.check_same_device(x_name, x, **{y_name: y})
            if (x.shape[0], *x.shape[-2:]) != (y.shape[0], *y.shape[-2:]):
                raise InputError(
                    f"{x_name} {list(x.shape)} and {y_name} {list(y.shape)} must agree in batch, height and width"
                )
    if len(pairs[0]) > 1:
        _numerics.check_stackable(pairs, reduction)
