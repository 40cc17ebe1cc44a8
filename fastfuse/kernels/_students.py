"""What the ops share that hold several students' maps against one target or one target each.

Such an op has one loss, the sum over students. Its schemas are `<op>_fwd(features, targets, *form)` and
`<op>_bwd(gradient, features, targets, *form, wanted)` with one target for all or one each; `form` is what is no tensor.
"""

from collections.abc import Sequence
from itertools import compress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _dispatch, _library, _numerics, _triton
from fastfuse.kernels._autograd import first_derivatives_only


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


def define(op: str, form: str, closed_form: ModuleType) -> None:
    """Register an op, its backends and its schemas; `form` are the schemas' arguments that are no tensors."""
    _dispatch.register(op, {"triton": _triton.why_not, "reference": None})
    _library.define(
        f"{op}_fwd",
        f"(Tensor[] features, Tensor[] targets{form}) -> Tensor",
        fake=_empty_loss,
        closed_form=closed_form.forward,
        launcher=f"fastfuse.kernels.{op}.triton_kernels:forward",
    )
    _library.define(
        f"{op}_bwd",
        f"(Tensor gradient, Tensor[] features, Tensor[] targets{form}, bool[] wanted) -> Tensor[]",
        fake=_empty_gradients,
        closed_form=closed_form.backward,
        launcher=f"fastfuse.kernels.{op}.triton_kernels:backward",
    )


def usable(op: str, backend: str, maps: Sequence[Tensor]) -> bool:
    """Whether the kernels serve all the maps; otherwise the reference does."""
    return {_dispatch.resolve(op, backend, x) for x in maps} == {"triton"}


def loss(op: str, features: Sequence[Tensor], target: Tensor | Sequence[Tensor], *form: Any) -> Tensor:
    """The loss of checked maps through the kernels."""
    targets = [target] if isinstance(target, Tensor) else target
    return StudentsLoss.apply(
        op, len(features), form, *(_triton.map_strides(x, far=True)[0] for x in (*features, *targets))
    )


class StudentsLoss(torch.autograd.Function):
    """An op's loss of the first `students` maps against the other maps, one for all or one each."""

    @staticmethod
    def forward(ctx: Any, op: str, students: int, form: tuple, *maps: Tensor) -> Tensor:
        """Saves the maps alone."""
        ctx.op, ctx.students, ctx.form = op, students, form
        ctx.save_for_backward(*maps)
        return getattr(torch.ops.fastfuse, f"{op}_fwd")(maps[:students], maps[students:], *form)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """One launch for all the maps that need it."""
        maps, wanted = ctx.saved_tensors, ctx.needs_input_grad[3:]
        backward = getattr(torch.ops.fastfuse, f"{ctx.op}_bwd")
        found = iter(backward(gradient, maps[: ctx.students], maps[ctx.students :], *ctx.form, wanted))
        return None, None, None, *(next(found) if asked else None for asked in wanted)


def _empty_loss(features: Sequence[Tensor], targets: Sequence[Tensor], *form: Any) -> Tensor:
    dtype = torch.promote_types(features[0].dtype, targets[0].dtype)
    return features[0].new_empty((), dtype=torch.promote_types(dtype, torch.float32))


def _empty_gradients(
    gradient: Tensor, features: Sequence[Tensor], targets: Sequence[Tensor], *form_and_wanted: Any
) -> list[Tensor]:
    return [torch.empty_like(x) for x in compress((*features, *targets), form_and_wanted[-1])]


def one_each(features: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """A target for every student."""
    return list(targets) * len(features) if len(targets) == 1 else list(targets)


def closed_gradients(
    features: Sequence[Tensor],
    targets: Sequence[Tensor],
    own: Sequence[Tensor],
    goals: Sequence[Tensor],
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of (*features, *targets) that are wanted, each in its map's dtype and strides.

    Args:
        own, goals: for every student the gradient of its map and of its target; those of one target are added.
    """
    goals = [sum(goals)] if len(targets) == 1 else goals
    every = zip((*features, *targets), (*own, *goals), strict=True)
    return [torch.empty_like(x).copy_(g) for x, g in compress(every, wanted)]


class Places:
    """The maps of a backward launch and where their gradients go, as bit sets and tables of the kernels have them.

    Attributes:
        maps: (*features, *targets).
        gradients: memory for each wanted gradient; in place of an unwanted one stands its map, not written to.
        wanted: bit i asks for the gradient of map i.
    """

    def __init__(self, features: Sequence[Tensor], targets: Sequence[Tensor], wanted: Sequence[bool]) -> None:
        self.maps = (*features, *targets)
        pairs = zip(self.maps, wanted, strict=True)
        self.gradients = tuple(torch.empty_like(x) if asked else x for x, asked in pairs)
        self.wanted = sum(asked << i for i, asked in enumerate(wanted))
        self.found = list(compress(self.gradients, wanted))
