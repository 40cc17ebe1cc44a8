"""Public form of normalized_lp and of its joint form with the attention distance."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _numerics, _triton
from fastfuse.kernels.normalized_lp import layout, reference
from fastfuse.kernels.normalized_lp.autograd import NormalizedLp, NormalizedLpJoint

_dispatch.register("normalized_lp", {"triton": _triton.why_not, "reference": None})

# Addresses and strides travel as kernel parameters, of which there may be 4 KiB: about 100 bytes a pair.
MAX_PAIRS = 32


class FeatureAttention(NamedTuple):
    """Two distances of the same pairs.

    Attributes:
        feature: what normalized_lp gives.
        attention: what attention_mse gives.
    """

    feature: Tensor
    attention: Tensor


def normalized_lp(
    inputs: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    p: int = 2,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Distance of L2-normalised feature maps, for one pair or a list of pairs of any shapes.

    mean over B and M of |x/|x| - y/|y||^p, norms per sample over all M = C H W elements, at least 1e-12.
    Sources: p = 2 FFSD (arXiv 2103.14473), training of the transforms; p = 1 Factor Transfer, FEED (arXiv 1909.10754).

    Args:
        inputs: [B, ...] floating point with two to five dimensions.
        targets: the same shapes; gradients flow wherever they are required.
        p: 1 or 2.
        reduction: over the samples of a pair: "mean", "sum" or "none".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        For one pair 0-d (or [B] for "none"); for lists of P pairs [P] (or a stack [P, B] for "none",
            which needs equal B). float32 for half-precision input.

    Raises:
        InputError, TypeError: pairs of different shape or device, wrong dtype, p that is neither 1 nor 2.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    single = isinstance(inputs, Tensor)
    pairs = _checked(inputs, targets, p, reduction, (2, 3, 4, 5))
    if _backend(pairs, backend) != "triton":
        losses = [reference.normalized_lp(x, y, p, reduction) for x, y in pairs]
        return losses[0] if single else torch.stack(losses)
    (losses,) = _launches(NormalizedLp, pairs, p, reduction)
    return losses.view(losses.shape[1:]) if single else losses


def normalized_lp_joint(
    inputs: Tensor | Sequence[Tensor],
    targets: Tensor | Sequence[Tensor],
    *,
    p: int = 2,
    reduction: str = "mean",
    backend: str = "auto",
) -> FeatureAttention:
    """normalized_lp and attention_mse of the same pairs, from one read of the maps (p = 1: two).

    Source: FFSD (arXiv 2103.14473), training of the transforms.

    Args:
        inputs: [B, C, H, W] floating point.
        targets: the same shapes; gradients flow wherever they are required.
        p: 1 or 2, of the feature distance; the attention distance is always the squared one.
        reduction: over the samples of a pair: "mean", "sum" or "none".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        Two distances, each 0-d for one pair (or [B] for "none"); for lists of P pairs [P] (or a stack [P, B] for
            "none", which needs equal B). float32 for half-precision input.

    Raises:
        InputError, TypeError: pairs of different shape or device, wrong dtype, p that is neither 1 nor 2, maps that
            have not four dimensions.
        BackendUnavailableError: the backend asked for cannot serve these maps.
    """
    single = isinstance(inputs, Tensor)
    pairs = _checked(inputs, targets, p, reduction, (4,))
    if _backend(pairs, backend) != "triton":
        both = [reference.normalized_lp_joint(x, y, p, reduction) for x, y in pairs]
        return FeatureAttention(*(both[0] if single else (torch.stack(x) for x in zip(*both, strict=True))))
    both = _launches(NormalizedLpJoint, pairs, p, reduction)
    return FeatureAttention(*(x.view(x.shape[1:]) if single else x for x in both))


def _checked(
    inputs: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], p: int, reduction: str, dims: tuple[int, ...]
) -> list[tuple[Tensor, Tensor]]:
    pairs = _numerics.as_pairs(inputs, targets)
    _numerics.check_reduction(reduction)
    if p not in (1, 2):
        raise InputError(f"p is 1 or 2, not {p!r}")
    for i, (x, y) in enumerate(pairs):
        _numerics.check_floating(f"inputs[{i}]", x, dims)
        _numerics.check_floating(f"targets[{i}]", y, dims)
        _numerics.check_same_device(f"inputs[{i}]", x, **{f"targets[{i}]": y})
        if x.shape != y.shape:
            raise InputError(f"targets[{i}] {list(y.shape)} must have the shape of inputs[{i}] {list(x.shape)}")
    _numerics.check_stackable(pairs, reduction)
    return pairs


def _backend(pairs: Sequence[tuple[Tensor, Tensor]], backend: str) -> str:
    """The backend that serves all the maps; the reference where they would not all take the same."""
    found = {_dispatch.resolve("normalized_lp", backend, x) for pair in pairs for x in pair}
    return found.pop() if len(found) == 1 else "reference"


def _launches(
    function: type[torch.autograd.Function], pairs: Sequence[tuple[Tensor, Tensor]], p: int, reduction: str
) -> tuple[Tensor, ...]:
    """One or two stacks of losses. Pairs of the same dtypes share their launches."""
    groups: dict[tuple[torch.dtype, torch.dtype, int], list[int]] = {}
    for i, (x, y) in enumerate(pairs):
        groups.setdefault((x.dtype, y.dtype, i // MAX_PAIRS), []).append(i)
    rows: list[tuple[Tensor, ...]] = [()] * len(pairs)
    for members in groups.values():
        maps = (layout.addressable(pairs[i][side]) for side in (0, 1) for i in members)
        found = function.apply(p, reduction, *maps)
        found = (found,) if isinstance(found, Tensor) else found
        if len(groups) == 1:
            return found
        for i, *row in zip(members, *(x.unbind(0) for x in found), strict=True):
            rows[i] = tuple(row)
    return tuple(torch.stack(losses) for losses in zip(*rows, strict=True))
