"""What `FusionLoss` refuses, at construction and per batch; none of it looks at values on the device."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfuse.errors import InputError, unknown_name
from fastfuse.nn.connectors import smallest

Maps = Tensor | Sequence[Tensor]


class Batch(NamedTuple):
    """One checked batch: maps per student and stage, logits per student, labels, and the leader's if there is one.

    Attributes:
        copy_logits: of each student's frozen copy, detached, if the regularisation reads them.
    """

    features: list[list[Tensor]]
    logits: list[Tensor]
    labels: Tensor
    leader_features: list[Tensor] | None
    leader_logits: Tensor | None
    copy_logits: list[Tensor] | None = None


class Expected(NamedTuple):
    """What a loss was built for: channels per student and stage, the leader's or None, K, and one of its parameters.

    Attributes:
        sizes: (height, width) of each student's last map, if they differ.
        goal: the one that the fused map has then.
        shallower: the same as `sizes` of each further stage that is fused, the second deepest first.
    """

    feature_channels: list[list[int]]
    leader_channels: list[int] | None
    num_classes: int
    parameter: Tensor
    sizes: list[tuple[int, int]] | None = None
    goal: tuple[int, int] | None = None
    shallower: Sequence[list[tuple[int, int]] | None] = ()


def channel_list(channels: int | Sequence[int]) -> list[int]:
    """Channels of one network's tapped maps, shallow to deep; a single number is its last map's."""
    found = list(channels) if isinstance(channels, Sequence) else [channels]
    if not found or any(not isinstance(c, int) or c < 1 for c in found):
        raise InputError(f"channels must be positive integers, shallow to deep, not {channels!r}")
    return found


def check_networks(method: str, feature_channels: list[list[int]], leader_channels: list[int] | None) -> None:
    """Refuse too few students, a leader where there is none, and networks tapped at different numbers of stages."""
    minimum = 2
    if len(feature_channels) < minimum:
        raise InputError(f"{method} needs at least {minimum} students, {len(feature_channels)} given")
    if method != "ffsd" and leader_channels is not None:
        raise InputError(f"{method} has no leader: leave leader_channels out, or use method='ffsd'")
    stages = [len(channels) for channels in [*feature_channels, *([leader_channels] if leader_channels else [])]]
    if len(set(stages)) > 1:
        raise InputError(f"all networks must be tapped at equally many stages, not {stages}")


def check_fused_stages(count: Any, stages: int) -> int:
    """Refuse what is no number of stages, and more of them than there are maps of."""
    if not isinstance(count, int) or count < 1:
        raise InputError(f"fused_stages must be a whole number of at least 1, not {count}")
    if count > stages:
        raise InputError(f"fused_stages {count} needs the maps of {count} stages of every network, and has {stages}")
    return count


def sizes_by_depth(sizes: Sequence[Any] | None, stages: int) -> list[Sequence[Any] | None]:
    """What `feature_sizes` says of each stage that is fused, the deepest first: an entry for each student.

    Raises:
        InputError: an entry that is not one size for each of several stages.
    """
    if sizes is None or stages == 1:
        return [sizes, *[None] * (stages - 1)]
    if any(not isinstance(own, Sequence) or len(own) != stages for own in sizes):
        raise InputError(
            f"feature_sizes must have the sizes of the {stages} fused stages of each student, shallow to deep, not "
            f"{list(sizes)}"
        )
    return [[own[-depth] for own in sizes] for depth in range(1, stages + 1)]


def checked_sizes(
    sizes: Sequence[int | tuple[int, int]] | None, leader_size: int | tuple[int, int] | None, count: int
) -> tuple[list[tuple[int, int]], tuple[int, int]] | None:
    """(height, width) of each student's last map and the one to bring them to, or None where all have one size.

    The goal is the leader's, which reads the fused map, or the smallest height and width.

    Raises:
        InputError: not one per student, no sizes, or a student's map that is smaller than the leader's.
    """
    if sizes is None:
        return None
    found: list[Any] = [tuple(size) if isinstance(size, Sequence) else (size, size) for size in sizes]
    leads: Any = tuple(leader_size) if isinstance(leader_size, Sequence) else (leader_size, leader_size)
    every = found if leader_size is None else [*found, leads]
    if any(len(size) != 2 or any(not isinstance(n, int) or n < 1 for n in size) for size in every):
        raise InputError(f"feature_sizes are (height, width) or one number for both, at least 1, not {list(sizes)}")
    if len(found) != count:
        raise InputError(f"feature_sizes has {len(found)} sizes for {count} students; give one for each")
    goal = smallest(found) if leader_size is None else leads
    for i, size in enumerate(found):
        if size[0] < goal[0] or size[1] < goal[1]:
            raise InputError(
                f"the last map of student {i} is {size[0]}x{size[1]}, smaller than the leader's {goal[0]}x{goal[1]}: "
                "maps are only brought to smaller ones; choose a leader with the smallest last map"
            )
    return None if set(found) == {goal} else (found, goal)


def check_number(name: str, value: float, *, positive: bool = False) -> None:
    """Refuse what is not finite, or below 0, or 0 where it must be positive."""
    if not (math.isfinite(value) and value >= 0) or (positive and value == 0):
        raise InputError(f"{name} must be a finite number {'above' if positive else 'of at least'} 0, not {value}")


def resolve_hyperparameters(
    method: str, defaults: Mapping[str, Any], choices: Mapping[str, Sequence[str]], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The method's defaults with what was given (None: not given).

    Args:
        method: its name, for the text of errors.
        defaults: all that it has.
        choices: what those that are no numbers can be, by name.
        given: by name.
    """
    resolved = dict(defaults)
    for name, value in given.items():
        if value is None:
            continue
        if name not in resolved:
            raise InputError(f"{method} has no {name}; it has {', '.join(resolved)}")
        if name in choices:
            if value not in choices[name]:
                raise unknown_name(name, value, choices[name])
        else:
            check_number(name, value, positive=name.endswith("temperature"))
            if name == "regularization_weight" and value > 1:  # cross-entropy has what is left to 1
                raise InputError(f"{name} must be between 0 and 1, not {value}")
        resolved[name] = value
    return resolved


def checked_batch(
    expected: Expected,
    features: Sequence[Maps],
    logits: Sequence[Tensor],
    labels: Tensor,
    leader_features: Maps | None,
    leader_logits: Tensor | None,
) -> Batch:
    """The arguments of `FusionLoss.forward` as a `Batch`.

    Raises:
        InputError, TypeError: something does not fit the loss or the rest of the batch; the text names the argument.
    """
    count = len(expected.feature_channels)
    if len(features) != count or len(logits) != count:
        raise InputError(
            f"this loss was built for {count} students: {len(features)} entries of features and "
            f"{len(logits)} of logits given"
        )
    _check_leader(expected, leader_features, leader_logits)
    students = [
        _maps(f"features[{i}]", maps, channels, expected.parameter)
        for i, (maps, channels) in enumerate(zip(features, expected.feature_channels, strict=True))
    ]
    first = students[0][-1]
    for i, maps in enumerate(students):
        _check_grids(f"features[{i}]", maps, first, expected.sizes[i] if expected.sizes else None)
    for depth, sizes in enumerate(expected.shallower, start=2):
        _check_stage(depth, [maps[-depth] for maps in students], sizes)
    leader = None
    if leader_features is not None and expected.leader_channels is not None:
        leader = _maps("leader_features", leader_features, expected.leader_channels, expected.parameter)
        _check_grids("leader_features", leader, first, expected.goal)
    rows = list(logits)
    for i, row in enumerate(rows):
        _check_logits(f"logits[{i}]", row, expected.num_classes, first)
        _check_same_dtype(f"logits[{i}]", row, rows[0])
    if leader_logits is not None:
        _check_logits("leader_logits", leader_logits, expected.num_classes, first)
        _check_same_dtype("leader_logits", leader_logits, rows[0])
    _check_beside("labels", labels, first)
    return Batch(students, rows, labels, leader, leader_logits)


def with_copies(batch: Batch, copy_logits: Sequence[Tensor] | None, *, needed: bool) -> Batch:
    """The batch with the logits of each student's frozen copy, where the regularisation reads them."""
    if needed != (copy_logits is not None):
        raise InputError(
            "regularization='self' needs copy_logits, those of each student's trained copy"
            if needed
            else "copy_logits are read with regularization='self' alone: leave them out"
        )
    if copy_logits is None:
        return batch
    if len(copy_logits) != len(batch.logits):
        raise InputError(f"copy_logits has {len(copy_logits)} entries for {len(batch.logits)} students")
    for i, (row, own) in enumerate(zip(copy_logits, batch.logits, strict=True)):
        _check_logits(f"copy_logits[{i}]", row, own.shape[1], batch.features[0][-1])
    return batch._replace(copy_logits=[row.detach() for row in copy_logits])


def _check_leader(expected: Expected, leader_features: Maps | None, leader_logits: Tensor | None) -> None:
    has_leader = expected.leader_channels is not None
    if has_leader != (leader_features is not None) or has_leader != (leader_logits is not None):
        needed = "leader_features and leader_logits are needed" if has_leader else "it takes no leader's tensors"
        raise InputError(
            f"this loss was built with leader_channels={expected.leader_channels}: {needed}; "
            "build it with the leader's channels or without"
        )


def _maps(name: str, maps: Maps, channels: list[int], parameter: Tensor) -> list[Tensor]:
    maps = [maps] if isinstance(maps, Tensor) else list(maps)
    if len(maps) != len(channels):
        raise InputError(f"{name} must hold {len(channels)} maps, one per tapped stage, not {len(maps)}")
    for stage, (feature, expected) in enumerate(zip(maps, channels, strict=True)):
        _check_tensor(f"{name}, stage {stage}", feature)
        if feature.dim() != 4 or feature.shape[1] != expected:
            raise InputError(f"{name}, stage {stage}: expected [B, {expected}, H, W], not {list(feature.shape)}")
        if feature.dtype != parameter.dtype and not torch.is_autocast_enabled(feature.device.type):
            raise TypeError(
                f"{name}, stage {stage} is {feature.dtype}, the loss's parameters are {parameter.dtype}: "
                "convert one of them, or run under torch.autocast"
            )
        if feature.device != parameter.device:
            raise InputError(
                f"{name} is on {feature.device}, the loss's parameters on {parameter.device}; move one of them"
            )
    return maps


def _check_grids(name: str, maps: list[Tensor], first: Tensor, size: tuple[int, int] | None = None) -> None:
    """All maps have the batch of the first student's last map; the last ones, which are fused, also its resolution.

    Where a regressor brings them together, the last one has the size that the loss was built for.
    """
    for feature in maps:
        _check_beside(name, feature, first)
    if size is not None:
        if tuple(maps[-1].shape[2:]) != size:
            raise InputError(
                f"the last map of {name} is {list(maps[-1].shape)}; feature_sizes says {size[0]}x{size[1]} for it"
            )
    elif maps[-1].shape[2:] != first.shape[2:]:
        raise InputError(
            f"the last map of {name} {list(maps[-1].shape)} must have the height and width of that of features[0] "
            f"{list(first.shape)}; give the loss the feature_sizes, or resize it first"
        )


def _check_stage(depth: int, maps: list[Tensor], sizes: list[tuple[int, int]] | None) -> None:
    """The maps of one stage have one height and width, or those that the loss was built for."""
    first = maps[0].shape[2], maps[0].shape[3]
    for i, (feature, wanted) in enumerate(zip(maps, sizes or [first] * len(maps), strict=True)):
        if tuple(feature.shape[2:]) != wanted:
            raise InputError(
                f"the map of features[{i}], stage {-depth}, is {list(feature.shape)}; {wanted[0]}x{wanted[1]} was "
                "expected, as feature_sizes says or features[0] has: give the feature_sizes of all fused stages"
            )


def _check_logits(name: str, row: Tensor, num_classes: int, first: Tensor) -> None:
    _check_tensor(name, row)
    _check_beside(name, row, first)
    if row.dim() != 2 or row.shape[1] != num_classes:
        raise InputError(f"{name} must be [B, {num_classes}], not {list(row.shape)}")


def _check_same_dtype(name: str, row: Tensor, first: Tensor) -> None:
    if row.dtype != first.dtype and not torch.is_autocast_enabled(row.device.type):
        raise TypeError(f"{name} is {row.dtype}, logits[0] {first.dtype}: convert one of them")


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, not {x.dtype}; convert it first")


def _check_beside(name: str, x: Tensor, first: Tensor) -> None:
    if x.device != first.device:
        raise InputError(f"{name} is on {x.device}, features[0] on {first.device}; move one of them")
    if x.dim() == 0 or x.shape[0] != first.shape[0]:
        raise InputError(f"{name} {list(x.shape)} must have the batch of features[0], {first.shape[0]}")
