"""Batch norm whose statistics are those of all processes that train together.

Counts, means and sums of squared deviations are gathered and merged in the order of the ranks (Chan, Golub and LeVeque,
"Algorithms for Computing the Sample Variance", 1983), so that every process finds the same bits. It runs wherever the
process group does: gloo on a CPU, NCCL on a GPU; torch's own SyncBatchNorm runs on GPUs alone.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastfuse.errors import BackendUnavailableError

if TYPE_CHECKING:
    from fastfuse.kernels._numerics import BatchNorm


@dataclasses.dataclass
class Across:
    """What the norms of a method that take statistics of all processes have in common.

    Attributes:
        counted: whether this process's values enter the statistics; False while it only stands in, with images that
            count for nothing, because the batch has none for it.
    """

    counted: bool = True


def backend_for(op: str, backend: str, norms: "list[BatchNorm]") -> str:
    """The backend to ask for, given an operator's norms: kernels take statistics of their own process alone.

    Raises:
        BackendUnavailableError: a kernel was asked for by name.
    """
    if not any(norm.training and norm.across is not None for norm in norms):
        return backend
    if backend not in ("auto", "reference"):
        raise BackendUnavailableError(
            f"{op} cannot run on backend {backend!r}: its batch norms take the statistics of all processes; use "
            "backend='auto', or leave --sync-batchnorm out"
        )
    return "reference"


def batch_norm(x: Tensor, norm: "BatchNorm") -> Tensor:
    """Normalise [B, C, ...] by the statistics of all processes; every process must call it.

    Running statistics are updated as by one process that has all values. Gradients of x include those through the
    statistics of the other processes; those of weight and bias are this process's own part.
    """
    form = (norm.momentum, norm.eps, norm.across)
    return _BatchNorm.apply(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, *form)


def merged(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count (0-d), mean [C] and sum of squared deviations [C] of all values.

    Args:
        rows: [P, 2 C + 1], of each process its count, its means and its sums of squared deviations; a row of zeros
            is a process without values.
    """
    channels = (rows.shape[1] - 1) // 2
    count, mean, squares = rows[0].split((1, channels, channels))
    for row in rows[1:]:
        own, its_mean, its_squares = row.split((1, channels, channels))
        total = (count + own).clamp_min(1)
        apart = its_mean - mean
        mean = mean + apart * (own / total)
        squares = squares + its_squares + apart.square() * (count * own / total)
        count = count + own
    return count.squeeze(0), mean, squares


def gathered(row: Tensor) -> Tensor:
    """A row [N] of every process, [P, N], in the order of the ranks."""
    from torch import distributed

    rows = [torch.empty_like(row) for _ in range(distributed.get_world_size())]
    distributed.all_gather(rows, row.contiguous())
    return torch.stack(rows)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
        across: Across,
    ) -> Tensor:
        values = _accumulate(x)
        var, mean = torch.var_mean(values, _others(x), correction=0)
        own = x.numel() // x.shape[1]
        row = torch.cat((mean.new_full((1,), float(own)), mean, var * own))
        count, mean, squares = merged(gathered(row if across.counted else torch.zeros_like(row)))
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((squares / (count - 1).clamp_min(1)).to(running_var.dtype), momentum)
        var = squares / count
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.counted = across.counted
        return torch.nn.functional.batch_norm(x, mean, var, weight.to(mean), bias.to(mean), False, 0.0, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale, count = ctx.saved_tensors
        shape = (-1, *[1] * (x.dim() - 2))
        given, normal = _accumulate(given), (_accumulate(x) - mean.view(shape)) * scale.view(shape)
        own = torch.cat((given.sum(_others(x)), (given * normal).sum(_others(x))))
        of_bias, of_weight = own.chunk(2)
        total = _in_order(gathered(own))  # also by a process that stands in: every one must call
        if ctx.counted:  # its values are in the statistics
            shift, tilt = (total / count).chunk(2)
            given = given - shift.view(shape) - normal * tilt.view(shape)
        of_x = (given * (weight.to(scale) * scale).view(shape)).to(x.dtype)
        return of_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None, None, None, None


def _in_order(rows: Tensor) -> Tensor:
    """Added one after another: a sum of all at once may take another order on another device."""
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def _others(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.dim())]


def _accumulate(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
