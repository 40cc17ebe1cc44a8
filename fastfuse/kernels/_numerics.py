"""What the references of several ops share: accumulation dtype, batch-norm parameters, argument checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.errors import InputError
from fastfuse.kernels import _across


class BatchNorm(NamedTuple):
    """Parameters and mode of one batch norm over C channels, as the ops take them.

    Attributes:
        weight, bias: [C], affine part.
        running_mean, running_var: [C]; updated in place in training mode.
        training: batch statistics (True) or running statistics (False).
        momentum: PyTorch's, running = (1 - momentum) running + momentum batch.
        eps: added to the variance.
        across: batch statistics are those of all processes; None: of this one.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    training: bool
    momentum: float = 0.1
    eps: float = 1e-5
    across: _across.Across | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise [B, C, H, W]."""
        if _across.asks(self):
            return _across.batch_norms([x], [self])[0]
        return torch.nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


def accumulate(x: Tensor) -> Tensor:
    """Half-precision tensors in float32, others as they are: losses are summed in float32 at least."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def attention(feature: Tensor) -> Tensor:
    """[B, C, H, W] to its attention map [B, H, W]: the channel mean of squares; a ready map [B, H, W] is passed on."""
    feature = accumulate(feature)
    return feature if feature.dim() == 3 else feature.square().mean(1)


def normalize(x: Tensor) -> Tensor:
    """Each sample flattened and divided by max(its L2 norm, 1e-12): [B, ...] to [B, M]."""
    return torch.nn.functional.normalize(accumulate(x).flatten(1), eps=1e-12)


def reduce(per_sample: Tensor, reduction: str) -> Tensor:
    """[B] to its mean, its sum, or itself."""
    if reduction == "none":
        return per_sample
    return per_sample.mean() if reduction == "mean" else per_sample.sum()


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that does not exist."""
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"reduction is 'mean', 'sum' or 'none', not {reduction!r}")


def check_stackable(pairs: Sequence[tuple[Tensor, Tensor]], reduction: str) -> None:
    """Refuse losses per sample of pairs whose batches differ: they have no common shape."""
    batches = [x.shape[0] for x, _ in pairs]
    if reduction == "none" and len(set(batches)) > 1:
        raise InputError(f"reduction='none' needs inputs of one batch size, not {batches}; use 'mean' or 'sum'")


def check_floating(name: str, x: Tensor, dims: tuple[int, ...]) -> None:
    """Refuse anything but a floating-point tensor of one of the given numbers of dimensions."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, not {x.dtype}; convert it first")
    if x.dim() not in dims:
        raise InputError(f"{name} must have {' or '.join(map(str, dims))} dimensions, not shape {list(x.shape)}")


def check_batch_norm(name: str, norm: BatchNorm, channels: int) -> None:
    """Refuse a batch norm whose tensors are not [channels]."""
    for field in ("weight", "bias", "running_mean", "running_var"):
        shape = list(getattr(norm, field).shape)
        if shape != [channels]:
            raise InputError(f"{name}.{field} must have shape [{channels}] for these features, not {shape}")


def check_same_device(reference_name: str, reference: Tensor, **others: Tensor) -> None:
    """Refuse tensors that live on another device than the first one."""
    for name, x in others.items():
        if x.device != reference.device:
            raise InputError(f"{name} is on {x.device}, {reference_name} on {reference.device}; move one of them")


def as_pairs(inputs: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """One pair, or two equally long lists of tensors, as a list of pairs."""
    inputs = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    targets = [targets] if isinstance(targets, Tensor) else list(targets)
    if not inputs or len(inputs) != len(targets):
        raise InputError(
            f"as many targets as inputs are needed, and at least one: {len(inputs)} and {len(targets)} given"
        )
    return list(zip(inputs, targets, strict=True))
