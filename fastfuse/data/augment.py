"""Batches of one epoch. All its randomness is drawn at once from (seed, epoch), so any step can be resumed at."""

import dataclasses
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastfuse import functional
from fastfuse.data.dataset import Dataset, Split
from fastfuse.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class EpochPlan:
    """The draws of one epoch, row i for the i-th image shown.

    `order` int64 [N], a permutation; `offsets` int64 [N, 2] in 0 .. 2 * padding; `flips` bool [N].
    """

    order: Tensor
    offsets: Tensor
    flips: Tensor


def epoch_plan(n: int, *, seed: int, epoch: int, padding: int, flip: bool, device: torch.device | str) -> EpochPlan:
    """Draw the order, crops and mirrors of `n` images on `device`, a function of (seed, epoch) alone.

    The same pair gives the same plan on the same kind of device; CPU and GPU generators differ. Without `flip` the
    mirrors are all off, and the other draws are the same.
    """
    generator = torch.Generator(device=device).manual_seed(_mixed_seed(seed, epoch))
    order = torch.randperm(n, generator=generator, device=device)
    offsets = torch.randint(0, 2 * padding + 1, (n, 2), generator=generator, device=device)
    if flip:
        flips = torch.randint(0, 2, (n,), generator=generator, device=device, dtype=torch.bool)
    else:
        flips = torch.zeros(n, dtype=torch.bool, device=device)
    return EpochPlan(order, offsets, flips)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Number of batches that show `n` images once, the last one possibly smaller."""
    _check_batch_size(batch_size)
    return -(-n // batch_size)


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    start_step: int = 0,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented training batches of one epoch: images [B, 3, H, W] of `dtype` and labels int64 [B].

    They are made on the device that holds the data set, without a host wait. Each image appears once. The last batch
    holds what is left, if only one image: batch norm still has H x W values per channel as long as maps are larger
    than 1x1. With `start_step` the first batches are left out and the others are the same, bit for bit.

    Raises:
        InputError: at once, for a batch size below 1 or a start step outside the epoch.
    """
    n = len(dataset.train)
    steps = steps_per_epoch(n, batch_size)
    if not 0 <= start_step <= steps:
        raise InputError(f"start step must be in 0..{steps}, the steps of an epoch, got {start_step}")
    plan = epoch_plan(
        n, seed=seed, epoch=epoch, padding=dataset.padding, flip=dataset.flip, device=dataset.train.images.device
    )
    return _augmented(dataset, plan, range(start_step * batch_size, n, batch_size), batch_size, dtype, memory_format)


def evaluation_batches(
    split: Split,
    *,
    mean: Tensor,
    std: Tensor,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images of a split in order, normalised and not augmented; batches as those of `batches`."""
    _check_batch_size(batch_size)
    return (
        (functional.normalize(images, mean=mean, std=std, dtype=dtype, memory_format=memory_format), labels)
        for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)
    )


def _augmented(
    dataset: Dataset,
    plan: EpochPlan,
    starts: range,
    batch_size: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Iterator[tuple[Tensor, Tensor]]:
    for start in starts:
        rows = slice(start, start + batch_size)
        images = functional.augment(
            dataset.train.images,
            plan.order[rows],
            plan.offsets[rows],
            plan.flips[rows],
            mean=dataset.mean,
            std=dataset.std,
            padding=dataset.padding,
            dtype=dtype,
            memory_format=memory_format,
        )
        yield images, dataset.train.labels[plan.order[rows]]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch size must be at least 1, got {batch_size}: correct --batch-size")


def _mixed_seed(seed: int, epoch: int) -> int:
    """One 64-bit seed for the pair; a hash, since sums and shifts of the two would collide."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8).digest())
