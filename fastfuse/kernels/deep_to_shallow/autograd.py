"""Schemas, fakes and autograd function of deep_to_shallow; torch only, kernels are loaded when first executed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfuse.kernels import _library
from fastfuse.kernels._autograd import first_derivatives_only
from fastfuse.kernels.deep_to_shallow import closed_form, outputs

# Lists of T tensors that go into a stage besides its map, and that it saves.
_PER_STAGE, _SAVED = 5, 7


class StageOptions(NamedTuple):
    """What a stage is told besides its tensors.

    Attributes:
        padding: output padding of (height, width).
        training: batch statistics (True) or running statistics (False).
        keep: whether backward will want what the norm took in.
        momentum, eps: the norm's.
        dtype: in which the map is computed and given.
    """

    padding: tuple[int, int]
    training: bool
    keep: bool
    momentum: float
    eps: float
    dtype: torch.dtype


Tensors = Sequence[Tensor]


def _fwd_fake(*arguments: Any) -> None:
    """The results are given."""


def _attention_fake(
    xs: Tensors,
    shifts: Tensors,
    weights: Tensors,
    gammas: Tensors,
    betas: Tensors,
    running_means: Tensors,
    running_vars: Tensors,
    padding: Sequence[int],
    last: bool,
    eps: float,
    dtype: torch.dtype,
) -> list[Tensor]:
    attentions, maps = outputs.attention_outputs(xs, weights, padding, last, dtype)
    return [*attentions, *maps]


def _bwd_fake(
    grads: Tensors,
    carried: Tensors,
    xs: Tensors,
    weights: Tensors,
    gammas: Tensors,
    betas: Tensors,
    kept: Tensors,
    means: Tensors,
    rstds: Tensors,
    training: bool,
    keep: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    return [g for own in outputs.stage_gradients((xs, weights, gammas, betas), needed) for g in own]


# Results are written into tensors that are given: a graph cannot hold an operator that changes tensors (the running
# statistics) and returns a list.
_library.define(
    "deep_to_shallow_fwd",
    "(Tensor[] xs, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor(a!)[] running_means,"
    " Tensor(b!)[] running_vars, Tensor(c!)[] out, Tensor(d!)[] normed, Tensor(e!)[] means, Tensor(f!)[] rstds,"
    " bool training, float momentum, float eps) -> ()",
    fake=_fwd_fake,
    closed_form=closed_form.stage_fwd,
    launcher="fastfuse.kernels.deep_to_shallow.triton_kernels:launch_fwd",
)
_library.define(
    "deep_to_shallow_attention_fwd",
    "(Tensor[] xs, Tensor[] shifts, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] running_means,"
    " Tensor[] running_vars, int[2] padding, bool last, float eps, ScalarType dtype) -> Tensor[]",
    fake=_attention_fake,
    closed_form=closed_form.stage_attention,
    launcher="fastfuse.kernels.deep_to_shallow.triton_kernels:launch_attention",
)
_library.define(
    "deep_to_shallow_bwd",
    "(Tensor[] grads, Tensor[] carried, Tensor[] xs, Tensor[] weights, Tensor[] gammas, Tensor[] betas, Tensor[] kept,"
    " Tensor[] means, Tensor[] rstds, bool training, bool keep, bool[4] needed) -> Tensor[]",
    fake=_bwd_fake,
    closed_form=closed_form.stage_bwd,
    launcher="fastfuse.kernels.deep_to_shallow.triton_backward:launch_bwd",
)


def attention_chain(
    options: Sequence[StageOptions], xs: Sequence[Tensor], shifts: Sequence[Tensor], tensors: Sequence[Tensors]
) -> list[list[Tensor]]:
    """Attention maps of T transforms on running statistics, per stage; `shifts` has T maps or none.

    `tensors` holds, stage after stage, the T weights, gammas, betas, running means and running variances.
    """
    found = []
    with torch.no_grad():
        for j, stage in enumerate(options):
            last = j == len(options) - 1
            made = torch.ops.fastfuse.deep_to_shallow_attention_fwd(
                xs, shifts, *tensors[_PER_STAGE * j : _PER_STAGE * (j + 1)], stage.padding, last, stage.eps, stage.dtype
            )
            found.append(list(made[: len(xs)]))
            xs, shifts = made[len(xs) :], []
    return found


class DeepToShallow(torch.autograd.Function):
    """The chains of T transforms; one function, so that a map's two gradients are added inside a kernel."""

    @staticmethod
    def forward(ctx: Any, options: tuple[StageOptions, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """T maps per stage, in the order of the stages.

        `tensors` holds the T deep maps, then, stage after stage, the T weights, gammas, betas, running means and
        running variances.
        """
        ctx.set_materialize_grads(False)
        ctx.options = options
        count = len(tensors) // (1 + _PER_STAGE * len(options))
        xs, *lists = _lists(tensors, count)
        maps, saved = [], []
        for j, stage in enumerate(options):
            own = lists[_PER_STAGE * j : _PER_STAGE * (j + 1)]
            found = outputs.stage_outputs(xs, own[0], stage.padding, stage.keep, stage.dtype)
            torch.ops.fastfuse.deep_to_shallow_fwd(xs, *own, *found, stage.training, stage.momentum, stage.eps)
            for group in (xs, *own[:3], found.normed if stage.keep else found.out, found.mean, found.rstd):
                saved += group
            maps += found.out
            xs = found.out
        ctx.save_for_backward(*saved)
        return tuple(maps)

    @staticmethod
    @first_derivatives_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the deep maps and of each stage's weights, gammas and betas, where needed."""
        count = len(grads) // len(ctx.options)
        saved, grads, asked = (_lists(values, count) for values in (ctx.saved_tensors, grads, ctx.needs_input_grad[1:]))
        found: list[list[Tensor | None]] = [[None] * count for _ in asked]
        carried: list[Tensor | None] = [None] * count
        for j, stage in reversed(list(enumerate(ctx.options))):
            first = 1 + _PER_STAGE * j
            own = saved[_SAVED * j : _SAVED * (j + 1)]
            kinds = [
                # Gradients that transform t needs, and gradients that it has got.
                ([any(a[t] for a in asked[:first]), *(a[t] for a in asked[first : first + 3])],
                 [g[t] is not None for g in (grads[j], carried)])
                for t in range(count)
            ]  # fmt: skip
            passed: list[Tensor | None] = [None] * count
            for members in outputs.alike(kinds):
                needed, got = kinds[members[0]]
                if not any(needed) or not any(got):
                    continue
                there = [g if given else [] for g, given in zip((grads[j], carried), got, strict=True)]
                lists = ([values[t] for t in members if values] for values in (*there, *own))
                gradients = iter(torch.ops.fastfuse.deep_to_shallow_bwd(*lists, stage.training, stage.keep, needed))
                for target, wanted in zip((passed, *found[first : first + 3]), needed, strict=True):
                    for t in members if wanted else ():
                        target[t] = next(gradients)
            carried = passed
        found[0] = carried
        return None, *(g for gradients in found for g in gradients)


def _lists(values: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """A flat sequence as lists of T."""
    return [list(values[i : i + count]) for i in range(0, len(values), count)]
