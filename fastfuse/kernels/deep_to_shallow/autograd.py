"""Schemas, fakes and autograd function of deep_to_shallow; torch only, kernels are loaded when first executed."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastfuse.kernels import _library
from fastfuse.kernels.deep_to_shallow import closed_form, outputs

# Tensors of a stage that go into the function, and that it saves.
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


def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    padding: Sequence[int],
    training: bool,
    keep: bool,
    momentum: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    return outputs.stage_outputs(x, weight, padding, keep, dtype)


def _bwd_fake(
    grad: Tensor | None,
    carried: Tensor | None,
    x: Tensor,
    weight: Tensor,
    gamma: Tensor,
    beta: Tensor,
    kept: Tensor,
    mean: Tensor,
    rstd: Tensor,
    training: bool,
    keep: bool,
    needed: Sequence[bool],
) -> list[Tensor]:
    return [g for g in outputs.stage_gradients(x, weight, gamma, beta, needed) if g is not None]


_library.define(
    "deep_to_shallow_fwd",
    "(Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor(a!) running_mean, Tensor(b!) running_var,"
    " int[2] padding, bool training, bool keep, float momentum, float eps, ScalarType dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
    closed_form=closed_form.stage_fwd,
    launcher="fastfuse.kernels.deep_to_shallow.triton_kernels:launch_fwd",
)
_library.define(
    "deep_to_shallow_bwd",
    "(Tensor? grad, Tensor? carried, Tensor x, Tensor weight, Tensor gamma, Tensor beta, Tensor kept, Tensor mean,"
    " Tensor rstd, bool training, bool keep, bool[4] needed) -> Tensor[]",
    fake=_bwd_fake,
    closed_form=closed_form.stage_bwd,
    launcher="fastfuse.kernels.deep_to_shallow.triton_kernels:launch_bwd",
)


class DeepToShallow(torch.autograd.Function):
    """The chain of stages; one function, so that a map's two gradients are added inside a kernel."""

    @staticmethod
    def forward(ctx: Any, options: tuple[StageOptions, ...], x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Maps in the order of the stages; `tensors` holds weight, gamma, beta, running mean and variance of each."""
        ctx.set_materialize_grads(False)
        ctx.options = options
        maps, saved = [], []
        for j, stage in enumerate(options):
            weight, gamma, beta, *running = tensors[_PER_STAGE * j : _PER_STAGE * (j + 1)]
            out, normed, mean, rstd = torch.ops.fastfuse.deep_to_shallow_fwd(x, weight, gamma, beta, *running, *stage)
            saved += [x, weight, gamma, beta, normed if stage.keep else out, mean, rstd]
            maps.append(out)
            x = out
        ctx.save_for_backward(*saved)
        return tuple(maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x and of each stage's weight, gamma and beta, where needed; running statistics have none."""
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        saved = ctx.saved_tensors
        carried = None
        for j, stage in reversed(list(enumerate(ctx.options))):
            first = 2 + _PER_STAGE * j
            needed = [any(ctx.needs_input_grad[1:first]), *ctx.needs_input_grad[first : first + 3]]
            if not any(needed) or (grads[j] is None and carried is None):
                continue
            gradients = iter(
                torch.ops.fastfuse.deep_to_shallow_bwd(
                    grads[j], carried, *saved[_SAVED * j : _SAVED * (j + 1)], stage.training, stage.keep, needed
                )
            )
            carried, *found[first : first + 3] = [next(gradients) if need else None for need in needed]
        found[1] = carried
        return tuple(found)
