"""Batches of one epoch. All its randomness is drawn at once from (seed, epoch), so any step can be resumed at."""

import hashlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfuse import functional
from fastfuse.data.dataset import Dataset, Split
from fastfuse.data.share import Share
from fastfuse.errors import InputError


class EpochPlan(NamedTuple):
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
    generator = torch.Generator(device=device).manual_seed(mixed_seed(seed, epoch))
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


def batch_counts(n: int, batch_size: int) -> list[int]:
    """Images in each of these batches."""
    return [min(batch_size, n - first) for first in range(0, steps_per_epoch(n, batch_size) * batch_size, batch_size)]


def drawn_batches(n: int, *, seed: int, batch_size: int, replicas: int, parts: int, **form: Any) -> EpochPlan:
    """The draws of `TrainingBatches` for an epoch: [R, shown] and [R, shown, 2]; `form` is that of `epoch_plan`."""
    plans = [epoch_plan(n, seed=seed + r, **form) for r in range(replicas)]
    if parts > 1:
        plans = [_divided(plan, seed=seed + r, batch_size=batch_size, parts=parts) for r, plan in enumerate(plans)]
    return EpochPlan(*(torch.stack(rows) for rows in zip(*plans, strict=True)))


def _divided(plan: EpochPlan, *, seed: int, batch_size: int, parts: int) -> EpochPlan:
    """The same draws, with the order such that every batch is one of equally many images of each part."""
    n, device, each = len(plan.order), plan.order.device, batch_size // parts
    shown = n // parts * parts
    # Epochs count from 0: no epoch draws from this seed.
    generator = torch.Generator(device=device).manual_seed(mixed_seed(seed, -1))
    part = torch.randperm(n, generator=generator, device=device) // (n // parts)  # left over: part P
    order = plan.order[part[plan.order].argsort(stable=True)][:shown].view(parts, -1)
    whole = order.shape[1] // each * each
    batches = order[:, :whole].unflatten(1, (-1, each)).transpose(0, 1).flatten()
    order = torch.cat((batches, order[:, whole:].flatten()))
    return EpochPlan(order, plan.offsets[:shown], plan.flips[:shown])


class TrainingBatches:
    """Augmented training batches, made on the device that holds the data set.

    What a batch is made of lies at fixed addresses and is found by a counter on the device: drawing one needs nothing
    of the host, so a captured training step draws its own.

    Args:
        dataset: its tensors stay where they are.
        batch_size: images of every batch but the last of an epoch, which holds what is left, if only one image: batch
            norm still has H x W values per channel as long as maps are larger than 1x1.
        replicas: R, batches drawn side by side, each with draws of its own.
        parts: P, equal parts into which the seed divides the training images for good; every batch takes as many images
            from each, those of the first part first. What is left over by the division, fewer than P images, is not
            shown. For searches that train two things on images of their own.
        share: of several processes that train together, this one's rows of every batch, of each part as many: only
            those are gathered and augmented. The draws are the whole batch's.
        dtype: of the images.
        memory_format: of the images.

    Attributes:
        steps: batches in an epoch.
        step: 0-d int64, the batch that is drawn next; for whoever else counts steps on the device.

    Raises:
        InputError: a batch size below 1 or not a multiple of the parts, or fewer images than parts.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        replicas: int = 1,
        parts: int = 1,
        share: Share = Share(),  # noqa: B008 - frozen
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.share = share
        check_parts(parts, batch_size, len(dataset.train))
        self._shown = len(dataset.train) // parts * parts
        self.steps = steps_per_epoch(self._shown, batch_size)
        self.dataset, self.batch_size, self.replicas, self.parts = dataset, batch_size, replicas, parts
        self.dtype, self.memory_format = dtype, memory_format
        device = dataset.train.images.device
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self._rows = torch.arange(batch_size, device=device)
        self._numbers, self._flips = self._drawn(seed=0, epoch=0)

    def start(self, *, seed: int, epoch: int, step: int = 0) -> None:
        """Draw an epoch, and stand before its batch number `step`; the batches that remain are the same, bit for bit.

        Replica r has the draws of `seed` + r.

        Raises:
            InputError: a step outside the epoch.
        """
        if not 0 <= step <= self.steps:
            raise InputError(f"start step must be in 0..{self.steps}, the steps of an epoch, got {step}")
        numbers, flips = self._drawn(seed=seed, epoch=epoch)
        self._numbers.copy_(numbers)
        self._flips.copy_(flips)
        self.step.fill_(step)

    def count(self, step: int) -> int:
        """Images in batch number `step` of an epoch."""
        return min(self.batch_size, self._shown - step * self.batch_size)

    def fetch(self, step: int) -> None:
        """Called by the host before each batch is drawn: these lie on the device already."""

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """The next batch: images [count, 3, H, W] and labels int64 [count]; of replicas [count, R 3, H, W], [R, count].

        Each image appears once in an epoch, but for what `parts` leave over, if `count` is what `self.count` gives for
        the batch that is next. Of several processes, those of `Share.drawn`.
        """
        rows = torch.add(self._own_rows(count), self.step, alpha=self.batch_size)
        numbers = self._numbers.index_select(2, rows).flatten(1)
        order, offsets, labels = numbers[0], numbers[1:3].T, numbers[3]
        flips = self._flips.index_select(1, rows).flatten()
        self.step += 1
        train = self.dataset.train
        form: dict[str, Any] = {"dtype": self.dtype, "memory_format": self.memory_format}
        mean, std, padding = self.dataset.mean, self.dataset.std, self.dataset.padding
        images = functional.augment(train.images, order, offsets, flips, mean=mean, std=std, padding=padding, **form)
        if self.replicas == 1:
            return images, labels
        side_by_side = images.unflatten(0, (self.replicas, len(rows))).transpose(0, 1).flatten(1, 2)
        return side_by_side.contiguous(memory_format=self.memory_format), labels.view(self.replicas, len(rows))

    def _own_rows(self, count: int) -> Tensor:
        if self.share.processes == 1:
            return self._rows[:count]
        each = self._rows[:count].view(self.parts, count // self.parts)
        return each[:, self.share.drawn(count // self.parts)].flatten()

    def _drawn(self, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Order, offsets down and to the right, and labels, int64 [4, R, shown]; mirrors, bool [R, shown]."""
        train, padding, flip = self.dataset.train, self.dataset.padding, self.dataset.flip
        form: dict[str, Any] = {"epoch": epoch, "padding": padding, "flip": flip, "device": train.images.device}
        batches = {"batch_size": self.batch_size, "replicas": self.replicas, "parts": self.parts}
        order, offsets, flips = drawn_batches(len(train), seed=seed, **batches, **form)
        return torch.stack((order, *offsets.unbind(-1), train.labels[order])), flips


class EvaluationBatches:
    """The images of a split in order, normalised and not augmented; drawn as `TrainingBatches` are.

    Args:
        split: its tensors stay where they are.
        mean, std: float32 [3] in units where white is 1.
        batch_size: images of every batch but the last.
        dtype: of the images.
        memory_format: of the images.

    Attributes:
        counts: images in each batch.

    Raises:
        InputError: a batch size below 1.
    """

    def __init__(
        self,
        split: Split,
        *,
        mean: Tensor,
        std: Tensor,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.counts = batch_counts(len(split), batch_size)
        self.split = split
        self._form: dict[str, Any] = {"mean": mean, "std": std, "dtype": dtype, "memory_format": memory_format}
        self._next = torch.zeros((), dtype=torch.int64, device=split.labels.device)
        self._rows = torch.arange(batch_size, device=split.labels.device)

    def start(self) -> None:
        """Stand before the first batch."""
        self._next.zero_()

    def fetch(self, step: int) -> None:
        """See `TrainingBatches.fetch`."""

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` images [count, 3, H, W] and their labels int64 [count]."""
        rows = self._rows[:count] + self._next
        self._next += count
        images, labels = (x.index_select(0, rows) for x in (self.split.images, self.split.labels))
        return functional.normalize(images, **self._form), labels

    def tensors(self) -> list[Tensor]:
        """What drawing changes."""
        return [self._next]


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise InputError(f"batch size must be at least 1, got {batch_size}: correct --batch-size")


def check_parts(parts: int, batch_size: int, n: int) -> None:
    """Refuse parts into which `n` images or a batch cannot be divided."""
    _check_batch_size(batch_size)
    if not 1 <= parts <= n:
        raise InputError(f"{n} training images cannot be divided into {parts} parts: give 1 to {n}")
    if batch_size % parts:
        raise InputError(
            f"batch size {batch_size} must be a multiple of {parts}, the parts of the training images that a batch "
            "takes equally many from: correct --batch-size"
        )


def mixed_seed(seed: int, epoch: int) -> int:
    """One 64-bit seed for the pair; a hash, since sums and shifts of the two would collide."""
    return int.from_bytes(hashlib.blake2b(f"{seed},{epoch}".encode(), digest_size=8).digest())
