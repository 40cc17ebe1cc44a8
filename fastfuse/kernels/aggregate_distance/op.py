"""Public form of aggregate_distance."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _numerics, _triton
from fastfuse.kernels.aggregate_distance import reference
from fastfuse.kernels.aggregate_distance.autograd import AggregateDistance

_dispatch.register("aggregate_distance", {"triton": _triton.why_not, "reference": None})

# A block keeps a sum for each map; with more of them in mixed layouts it would spill registers.
MAX_MAPS = 24


def aggregate_distance(
    maps: Tensor | Sequence[Tensor], weights: Tensor, target: Tensor, *, reduction: str = "mean", backend: str = "auto"
) -> Tensor:
    """Squared distance of a weighted sum of maps from another map; the sum is never written.

    mean or sum over all elements of (sum_n w_n F_n - G)^2. Source: DFA (arXiv 2008.00506), where the F_n are a group's
    teacher maps, w = softmax(beta) and G the student's last map behind its connector. The paper says "L2"; the mean
    over elements is this project's choice, and "sum" leaves any other scale to the caller.

    Args:
        maps: N maps [B, C, H, W] of one shape, or one stack [N, B, C, H, W]; at most 24. Floating point.
        weights: [N], floating point, on the maps' device.
        target: [B, C, H, W]. Gradients flow to weights, target and maps wherever they are required.
        reduction: "mean" or "sum".
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        0-d, float32 for half-precision maps.

    Raises:
        InputError, TypeError: no map or too many, maps and target of different shape or device, wrong dtype, weights of
            another shape, another reduction.
        BackendUnavailableError: the backend asked for cannot serve these tensors.
    """
    maps = list(maps.unbind(0)) if isinstance(maps, Tensor) else list(maps)
    _check(maps, weights, target, reduction)
    if {_dispatch.resolve("aggregate_distance", backend, x) for x in (*maps, weights, target)} != {"triton"}:
        return reference.aggregate_distance(maps, weights, target, reduction)
    target, *maps = (_triton.map_strides(x, far=True)[0] for x in (target, *maps))
    return AggregateDistance.apply(reduction, weights, target, *maps)


def _check(maps: Sequence[Tensor], weights: Tensor, target: Tensor, reduction: str) -> None:
    if not 1 <= len(maps) <= MAX_MAPS:
        raise InputError(f"maps must hold 1 to {MAX_MAPS} maps, not {len(maps)}; add up the others beforehand")
    _numerics.check_floating("target", target, (4,))
    for n, x in enumerate(maps):
        _numerics.check_floating(f"maps[{n}]", x, (4,))
        _numerics.check_same_device("target", target, **{f"maps[{n}]": x})
        if x.shape != target.shape:
            raise InputError(
                f"maps[{n}] {list(x.shape)} must have the shape of the target {list(target.shape)}; "
                "bring channels together with a 1x1 connector"
            )
    _numerics.check_floating("weights", weights, (1,))
    _numerics.check_same_device("target", target, weights=weights)
    if weights.shape != (len(maps),):
        raise InputError(f"weights must have shape [{len(maps)}], one for each map, not {list(weights.shape)}")
    if reduction not in ("mean", "sum"):
        raise InputError(f"reduction is 'mean' or 'sum', not {reduction!r}")
