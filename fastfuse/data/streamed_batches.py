"""Batches of a streamed data set, drawn like those of one that lives on the device (`fastfuse.data.augment`)."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastfuse import functional
from fastfuse.data.augment import batch_counts, check_parts, drawn_batches, mixed_seed, steps_per_epoch
from fastfuse.data.share import Share
from fastfuse.data.streaming import Request, Source, StreamedDataset, StreamedSplit
from fastfuse.errors import InputError

# Batches that the host may be ahead of the device: more would only fill page-locked memory.
AHEAD = 3


class Staging:
    """The images and labels of one batch after the other at fixed addresses, filled while the device is at work.

    On a GPU a copy goes from page-locked memory to a second buffer on a stream of its own, beside the step before;
    the step's stream waits for it by an event, not the host, and moves it to its place. The host waits only for the
    copy of `AHEAD` batches before.

    Args:
        source: decodes them.
        rows: of the largest batch.
        device: where they are brought.

    Attributes:
        images: uint8 [rows, size, size, 3].
        labels: int64 [rows].
    """

    def __init__(self, source: Source, rows: int, device: torch.device) -> None:
        self.images = torch.zeros(rows, source.size, source.size, 3, dtype=torch.uint8, device=device)
        self.labels = torch.zeros(rows, dtype=torch.int64, device=device)
        self._source = source
        self._batches: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._next = -1
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._landing = torch.empty_like(self.images), torch.empty_like(self.labels)
            self._stream = torch.cuda.Stream(device)
            self._taken = torch.cuda.current_stream(device).record_event()
            self._copied: deque[torch.cuda.Event] = deque()

    def begin(self, requests: Iterator[Request], step: int = 0) -> None:
        """Let the processes begin with these batches, whose first is number `step`."""
        self._batches = self._source.begin(requests, pinned=self._on_gpu)
        self._next = step

    def fetch(self, step: int) -> None:
        """Bring batch number `step`, the next one, to the first rows.

        Raises:
            FastfuseError: too many files are damaged.
        """
        if step != self._next:  # a fault of the caller: every batch is fetched once, in order
            raise RuntimeError(f"batch {self._next} is next, not {step}")
        self._next += 1
        self._fill(*next(self._batches))

    def _fill(self, images: Tensor, labels: Tensor) -> None:
        places = [buffer[: len(labels)] for buffer in (self.images, self.labels)]
        if self._on_gpu:
            images, labels = self._landed(images, labels)
        for place, values in zip(places, (images, labels), strict=True):
            place.copy_(values)
        if self._on_gpu:
            self._taken.record()

    def _landed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(self._copied) == AHEAD:
            self._copied.popleft().synchronize()
        landing = self._landing[0][: len(labels)], self._landing[1][: len(labels)]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._taken)
            for place, values in zip(landing, (images, labels), strict=True):
                place.copy_(values, non_blocking=True)
            self._copied.append(self._stream.record_event())
        torch.cuda.current_stream(self.images.device).wait_event(self._copied[-1])
        return landing


class StreamedTrainingBatches:
    """Training batches whose images are decoded, cropped at random and mirrored by worker processes.

    `fetch` brings a batch to the device, `draw` normalises it there and reads nothing of the host, so a captured step
    draws its own. Order, crops and mirrors are a function of (seed, epoch, place in the epoch) alone.

    Args:
        dataset: on the device where the batches are wanted (`dataset.to`).
        batch_size, replicas, parts, dtype, memory_format: see `TrainingBatches`.
        share: the rows of every batch that this process decodes and shows.

    Attributes:
        steps: batches in an epoch.
        step: 0-d int64, the batch that is drawn next; for whoever else counts steps on the device.

    Raises:
        InputError: a batch size below 1 or not a multiple of the parts, or fewer images than parts.
    """

    def __init__(
        self,
        dataset: StreamedDataset,
        *,
        batch_size: int,
        replicas: int = 1,
        parts: int = 1,
        share: Share = Share(),  # noqa: B008 (frozen)
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        check_parts(parts, batch_size, len(dataset.train))
        self._shown = len(dataset.train) // parts * parts
        self.steps = steps_per_epoch(self._shown, batch_size)
        self.dataset, self.batch_size, self.replicas, self.parts = dataset, batch_size, replicas, parts
        self.share = share
        self._form: dict[str, Any] = {"mean": dataset.mean, "std": dataset.std}
        self._form |= {"dtype": dtype, "memory_format": memory_format}
        self.memory_format = memory_format
        device = dataset.mean.device
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        rows = max(len(self._own(self.count(step))) for step in {0, self.steps - 1})
        self.staging = Staging(dataset.train.source, replicas * rows, device)

    def start(self, *, seed: int, epoch: int, step: int = 0) -> None:
        """Draw an epoch, and let the processes begin at its batch number `step`; see `TrainingBatches.start`.

        Raises:
            InputError: a step outside the epoch.
        """
        if not 0 <= step <= self.steps:
            raise InputError(f"start step must be in 0..{self.steps}, the steps of an epoch, got {step}")
        self.staging.begin(self._requests(seed, epoch, step), step)
        self.step.fill_(step)

    def count(self, step: int) -> int:
        """Images in batch number `step` of an epoch, those of all processes."""
        return min(self.batch_size, self._shown - step * self.batch_size)

    def fetch(self, step: int) -> None:
        """Bring batch number `step`, the next one, to the place from which `draw` takes it; see `Staging.fetch`."""
        self.staging.fetch(step)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """The batch that was fetched: images [count, 3, H, W], labels [count]; see `TrainingBatches.draw`."""
        self.step += 1
        own = len(self._own(count))
        rows = self.replicas * own
        images = functional.normalize(self.staging.images[:rows], **self._form)
        labels = self.staging.labels[:rows].clone()
        if self.replicas == 1:
            return images, labels
        side_by_side = images.unflatten(0, (self.replicas, own)).transpose(0, 1).flatten(1, 2)
        return side_by_side.contiguous(memory_format=self.memory_format), labels.view(self.replicas, own)

    def _own(self, count: int) -> np.ndarray:
        """Which rows of a batch of `count` this process shows, as `TrainingBatches` does."""
        return np.arange(count).reshape(self.parts, -1)[:, self.share.drawn(count // self.parts)].flatten()

    def _requests(self, seed: int, epoch: int, first: int) -> Iterator[Request]:
        train = self.dataset.train
        form: dict[str, Any] = {"batch_size": self.batch_size, "replicas": self.replicas, "parts": self.parts}
        form |= {"padding": 0, "flip": self.dataset.flip, "device": "cpu"}
        plan = drawn_batches(len(train), seed=seed, epoch=epoch, **form)
        order, flips = plan.order.numpy(), plan.flips.numpy()
        keys = np.array([mixed_seed(seed + r, epoch) for r in range(self.replicas)], dtype=np.uint64)
        for step in range(first, self.steps):
            places = step * self.batch_size + self._own(self.count(step))
            yield Request(
                train.table,
                np.concatenate([train.candidates(places, one) for one in order]),
                keys.repeat(len(places)),
                np.tile(places, self.replicas),
                np.concatenate([one[places] for one in flips]),
            )


class StreamedEvaluationBatches:
    """The centre crops of a split in order, normalised; drawn as `StreamedTrainingBatches` are.

    Args:
        split: of a streamed data set.
        mean, std: float32 [3] in units where white is 1, on the device where the batches are wanted.
        batch_size: images of every batch but the last.
        dtype, memory_format: of the images.

    Attributes:
        counts: images in each batch.

    Raises:
        InputError: a batch size below 1.
    """

    def __init__(
        self,
        split: StreamedSplit,
        *,
        mean: Tensor,
        std: Tensor,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.counts = batch_counts(len(split), batch_size)
        self.split, self.batch_size = split, batch_size
        self._form: dict[str, Any] = {"mean": mean, "std": std, "dtype": dtype, "memory_format": memory_format}
        self.staging = Staging(split.source, min(batch_size, len(split)), mean.device)

    def start(self) -> None:
        """Let the processes begin at the first batch."""
        self.staging.begin(self._requests())

    def fetch(self, step: int) -> None:
        """See `StreamedTrainingBatches.fetch`."""
        self.staging.fetch(step)

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """The batch that was fetched: images [count, 3, H, W] and labels int64 [count]."""
        return functional.normalize(self.staging.images[:count], **self._form), self.staging.labels[:count].clone()

    def tensors(self) -> list[Tensor]:
        """What drawing changes: nothing."""
        return []

    def _requests(self) -> Iterator[Request]:
        order = np.arange(len(self.split))
        for step, count in enumerate(self.counts):
            places = step * self.batch_size + np.arange(count)
            yield Request(self.split.table, self.split.candidates(places, order))
