"""Arguments of the ops that hold several students' maps against one target or one target each."""

from collections.abc import Sequence

from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _numerics


def students_and_targets(
    features: Tensor | Sequence[Tensor], target: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """S maps [B, C, H, W] (or one stack [S, B, C, H, W]) and as many targets, a single one repeated.

    Raises:
        InputError, TypeError: no map, another number of targets, shapes or devices that differ, a map that is not
            floating point.
    """
    features = list(features.unbind(0)) if isinstance(features, Tensor) else list(features)
    if not features:
        raise InputError("features must hold at least one student's map")
    targets = [target] * len(features) if isinstance(target, Tensor) else list(target)
    if len(targets) != len(features):
        raise InputError(f"one target, or one for each of {len(features)} students, is needed: {len(targets)} given")
    for s, (feature, goal) in enumerate(zip(features, targets, strict=True)):
        _numerics.check_floating(f"features[{s}]", feature, (4,))
        _numerics.check_floating(f"target of student {s}", goal, (4,))
        _numerics.check_same_device(f"features[{s}]", feature, **{f"target of student {s}": goal})
        if feature.shape != goal.shape:
            raise InputError(
                f"features[{s}] {list(feature.shape)} and its target {list(goal.shape)} must have the same shape; "
                "bring channels together with a 1x1 connector"
            )
    return features, targets
