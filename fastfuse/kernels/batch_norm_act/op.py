"""Public form of batch_norm_act."""

from typing import NamedTuple

from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _across, _dispatch, _numerics, _triton
from fastfuse.kernels._numerics import BatchNorm
from fastfuse.kernels.batch_norm_act import autograd, reference

_dispatch.register("batch_norm_act", {"triton": _triton.why_not, "reference": None})


class BatchNormAct(NamedTuple):
    """`out` [N, C, H, W], and `attention` [S, N, H, W], the attention map of each network, None if not asked for."""

    out: Tensor
    attention: Tensor | None


def batch_norm_act(
    x: Tensor,
    norm: BatchNorm,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    attention_groups: int | None = None,
    backend: str = "auto",
) -> BatchNormAct:
    """relu(batch norm(x) + residual), as in a residual block, for all networks of a stacked map at once.

    A batch norm over S C channels is the batch norms of S networks of C channels.

    Args:
        x: [N, C, H, W]; of S stacked networks [N, S C, H, W]. Contiguous or channels-last, as the results will be.
        norm: batch norm over the channels of x. In training mode its running statistics are updated in place as
            torch.nn.BatchNorm2d does; its num_batches_tracked is the caller's.
        residual: shape and dtype of x, added before the ReLU.
        relu: whether a ReLU follows.
        attention_groups: the number S of networks in x, to give their attention maps (channel mean of squares of the
            result, float32 at least) as well; None: they are not computed.
        backend: "auto", "reference", "triton" or "cuda".

    Returns:
        BatchNormAct(out, attention); the result has the dtype of x, under autocast too. Gradients flow to x, residual,
        norm.weight and norm.bias.

    Raises:
        InputError, TypeError: a norm of another width, a residual of another shape, dtype or device, channels that
            attention_groups does not divide, batch statistics of a single value.
        BackendUnavailableError: the backend asked for cannot serve here.
    """
    _numerics.check_floating("x", x, (4,))
    batch, channels, height, width = x.shape
    _numerics.check_batch_norm("norm", norm, channels)
    _check_residual(x, residual)
    if attention_groups is not None and (attention_groups < 1 or channels % attention_groups):
        raise InputError(
            f"attention_groups must divide the {channels} channels of x, not be {attention_groups}; "
            "give the number of networks"
        )
    if norm.training and norm.across is None and batch * height * width == 1:
        raise InputError(
            f"norm takes batch statistics, which one value per channel does not have: x is {list(x.shape)}; "
            "give more samples or larger maps, or training=False"
        )
    backend = _across.backend_for("batch_norm_act", backend, [norm])
    if _dispatch.resolve("batch_norm_act", backend, x) == "reference":
        return BatchNormAct(*reference.batch_norm_act(x, norm, residual, relu, attention_groups))
    _check_vectors(x, norm)
    return BatchNormAct(*autograd.batch_norm_act(x, norm, residual, relu, attention_groups))


def _check_residual(x: Tensor, residual: Tensor | None) -> None:
    if residual is None:
        return
    _numerics.check_floating("residual", residual, (4,))
    _numerics.check_same_device("x", x, residual=residual)
    if residual.shape != x.shape:
        raise InputError(
            f"residual must have the shape of x, {list(x.shape)}, not {list(residual.shape)}; "
            "bring it there with a shortcut"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"residual is {residual.dtype}, x is {x.dtype}; convert one of them")


def _check_vectors(x: Tensor, norm: BatchNorm) -> None:
    """Refuse what the reference would take or refuse in its own words, and the kernels cannot."""
    for field in ("weight", "bias", "running_mean", "running_var"):
        vector = getattr(norm, field)
        _numerics.check_same_device("x", x, **{f"norm.{field}": vector})
        if not vector.is_contiguous():
            raise InputError(f"norm.{field} must be contiguous, not a strided view; give a tensor of its own")
