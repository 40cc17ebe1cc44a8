"""Batch norm whose statistics are those of all processes that train together.

Every process gathers counts, means and variances of all and joins them in the same way (Chan, Golub and LeVeque,
"Algorithms for Computing the Sample Variance", 1983), so that all find the same bits on devices of one kind. It
runs wherever the process group does: gloo on a CPU, NCCL on a GPU; torch's own SyncBatchNorm runs on GPUs alone. Maps
are read and written by torch's fused batch norm and by the last two passes of the backward; all else is [C].
"""

import dataclasses
from collections.abc import Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

from fastfuse.errors import BackendUnavailableError

if TYPE_CHECKING:
    from fastfuse.kernels._numerics import BatchNorm

T = TypeVar("T")


@dataclasses.dataclass
class Across:
    """What the norms of a method that take statistics of all processes have in common.

    Attributes:
        counted: whether this process's values enter the statistics; False while it only stands in, with images that
            count for nothing, because the batch has none for it.
    """

    counted: bool = True


def asks(norm: "BatchNorm") -> bool:
    """Whether a norm takes the statistics of all processes."""
    return norm.training and norm.across is not None


def backend_for(op: str, backend: str, norms: "list[BatchNorm]") -> str:
    """The backend to ask for, given an operator's norms: kernels take statistics of their own process alone.

    Raises:
        BackendUnavailableError: a kernel was asked for by name.
    """
    if not any(map(asks, norms)):
        return backend
    if backend not in ("auto", "reference"):
        raise BackendUnavailableError(
            f"{op} cannot run on backend {backend!r}: its batch norms take the statistics of all processes; use "
            "backend='auto', or leave --sync-batchnorm out"
        )
    return "reference"


def batch_norms(xs: Sequence[Tensor], norms: "Sequence[BatchNorm]") -> list[Tensor]:
    """Normalise each [B, C, ...] by its statistics of all processes, which exchange those of all norms at once.

    Every process must call it, with the same norms. Running statistics are updated as by one process that has all
    values. Gradients of x include those through the statistics of the other processes; those of weight and bias are
    this process's own part.

    Args:
        xs: norms that do not depend on one another have them at the same time.
        norms: one each, in training mode, of one `Across`.
    """
    flat = [(x, norm.weight, norm.bias) for x, norm in zip(xs, norms, strict=True)]
    return list(_BatchNorms.apply(list(norms), *(tensor for own in flat for tensor in own)))


def in_step(walks: "Iterable[Generator[tuple[Tensor, BatchNorm], Tensor, T]]") -> list[T]:
    """What several computations give that do not depend on one another.

    Each goes on to its next norm, where it waits for the others: one exchange then serves all of them.

    Args:
        walks: each yields a map and its norm, is sent the normalised map, and returns its result.
    """
    going = list(walks)
    sent: dict[int, Tensor | None] = dict.fromkeys(range(len(going)))
    results: dict[int, T] = {}
    while sent:
        met = {}
        for i, normalised in sent.items():
            try:
                met[i] = going[i].send(cast(Any, normalised))
            except StopIteration as end:
                results[i] = end.value
        asking = [i for i, (_, norm) in met.items() if asks(norm)]
        sent = {i: norm(x) for i, (x, norm) in met.items() if not asks(norm)}
        if asking:
            sent |= zip(asking, batch_norms(*zip(*(met[i] for i in asking), strict=True)), strict=True)
    return [results[i] for i in range(len(going))]


def joined(counts: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, means and variances [P, C] of P processes as those of all values, [C] each.

    Deviations are from the joint mean: sums of squares would cancel. Variances are divided by the count, not by one
    less. A process without values has zeros.
    """
    count = counts.sum(0)
    shares = counts / count
    mean = (shares * means).sum(0)
    apart = means - mean
    return count, mean, (shares * torch.addcmul(variances, apart, apart)).sum(0)


def gathered(row: Tensor) -> Tensor:
    """A row [N] of every process, [P, N], in the order of the ranks."""
    from torch import distributed

    rows = row.new_empty(distributed.get_world_size() * row.numel())
    distributed.all_gather_into_tensor(rows, row)
    return rows.view(-1, row.numel())


class _BatchNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norms: "Sequence[BatchNorm]", *flat: Tensor) -> tuple[Tensor, ...]:
        xs, weights, biases = flat[::3], flat[1::3], flat[2::3]
        sizes, eps, counted = [x.shape[1] for x in xs], [norm.eps for norm in norms], norms[0].across.counted
        row = _row(_statistics(x) for x in xs)
        rows = gathered(row if counted else torch.zeros_like(row))
        count, mean, var = joined(*rows.unflatten(1, (3, -1)).unbind(1))
        means, variances = mean.split(sizes), var.split(sizes)
        unbiased = var * (count / (count - 1).clamp_min(1))
        _follow([norm.running_mean for norm in norms], means, norms)
        _follow([norm.running_var for norm in norms], unbiased.split(sizes), norms)
        scale = torch.cat([v + e for v, e in zip(variances, eps, strict=True)]).rsqrt()
        ctx.save_for_backward(count, mean, scale, *xs, *weights)
        ctx.eps, ctx.counted = eps, counted
        each = zip(xs, means, variances, weights, biases, eps, strict=True)
        return tuple(
            torch.nn.functional.batch_norm(x, m, v, weight.to(m), bias.to(m), False, 0.0, e)
            for x, m, v, weight, bias, e in each
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        count, mean, scale, *flat = ctx.saved_tensors
        xs, weights = flat[: len(given)], flat[len(given) :]
        sizes = [x.shape[1] for x in xs]
        each = zip(given, xs, weights, mean.split(sizes), scale.split(sizes), ctx.eps, strict=True)
        own = [_sums(*one) for one in each]
        total = gathered(_row(own)).sum(0)  # also by a process that stands in: every one must call
        tilt, shift = (total if ctx.counted else torch.zeros_like(total)).view(2, -1) / count
        # weight scale (given - shift - tilt (x - mean) scale) = of_x x + constant - of_given given
        of_given, tilt = -torch.cat(weights).to(scale) * scale, tilt * scale
        of_x, constant = of_given * tilt, of_given * torch.addcmul(shift, tilt, mean, value=-1)
        factors = zip(*(vector.split(sizes) for vector in (of_x, constant, of_given)), strict=True)
        found: list[Tensor | None] = [None]
        for one, x, weight, (of_weight, of_bias), its in zip(given, xs, weights, own, factors, strict=True):
            by_x, added, by_given = (vector.view(-1, *[1] * (x.dim() - 2)) for vector in its)
            of_map = torch.addcmul(added, x, by_x).addcmul_(one, by_given, value=-1)
            found += [of_map.to(x.dtype), of_weight.to(weight.dtype), of_bias.to(weight.dtype)]
        return tuple(found)


def _row(vectors: Iterable[tuple[Tensor, ...]]) -> Tensor:
    """What is to be gathered of several norms: the first vector of each, then the second of each."""
    return torch.cat([vector for kind in zip(*vectors, strict=True) for vector in kind])


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and variance of every channel, [C] each, float32 at least."""
    unread = None
    if x.dtype in (torch.float16, torch.bfloat16):
        unread = x.new_zeros(x.shape[1], dtype=torch.float32)  # running statistics: the results have their dtype
    mean, var = torch.batch_norm_update_stats(x, unread, unread, 0.0)
    return torch.full_like(mean, x.numel() // x.shape[1]), mean, var


def _sums(given: Tensor, x: Tensor, weight: Tensor, mean: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Sums of `given` times the normalised x, and of `given`, [C] each: the gradients of weight and bias."""
    form = weight.to(mean), None, None, mean, scale, True, eps
    _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward.default(given, x, *form, [False, True, True])
    return of_weight, of_bias


def _follow(running: Sequence[Tensor], found: Sequence[Tensor], norms: "Sequence[BatchNorm]") -> None:
    for its, new, norm in zip(running, found, norms, strict=True):
        its.lerp_(new.to(its.dtype), norm.momentum)
