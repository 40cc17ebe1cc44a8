"""Synthetic images of an epoch, all on the device, as the data set of which the trainer draws a network's batches."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from fastfuse.data import Dataset, Split, StreamedDataset, StreamedSplit
from fastfuse.data.streaming import MEAN, STD, Request, Source
from fastfuse.models import IMAGENET

# On a GPU CIFAR's training set; of ImageNet's networks 20 batches, 0.8 GB. On a CPU, where an epoch takes minutes, so
# many batches.
IMAGES, IMAGENET_IMAGES = 50_000, 5_120
CPU_BATCHES, CPU_IMAGENET_BATCHES = 8, 2


def count(case: Case) -> int:
    """Images of an epoch where nobody says how many."""
    large = case.model in IMAGENET
    if case.device.type == "cuda":
        return IMAGENET_IMAGES if large else IMAGES
    return case.batch_size * (CPU_IMAGENET_BATCHES if large else CPU_BATCHES)


def synthetic(images: int, case: Case) -> Dataset:
    """Random pixels and labels in the shapes of a case, on its device.

    Those of CIFAR's networks are augmented there. Those of ImageNet's are what the trainer's processes hand over,
    cropped and mirrored: only normalised.
    """
    generator = torch.Generator(case.device).manual_seed(0)
    drawn: dict[str, Any] = {"generator": generator, "device": case.device}
    pixels = torch.randint(256, (images, case.image_size, case.image_size, 3), dtype=torch.uint8, **drawn)
    labels = torch.randint(case.classes, (images,), **drawn)
    names = tuple(map(str, range(case.classes)))
    found: Dataset[Any]
    if case.model in IMAGENET:
        crops = StreamedSplit(Crops(pixels, labels), "train", torch.arange(images), labels.cpu())
        found = StreamedDataset("synthetic", crops, crops, None, names, torch.tensor(MEAN), torch.tensor(STD), 0, True)
    else:
        split, mean, std = Split(pixels, labels), torch.full((3,), 0.5), torch.full((3,), 0.29)
        found = Dataset("synthetic", split, split, None, names, mean, std, 4, True)
    return found.to(case.device)


class Crops(Source):
    """Stands for the processes that decode: the batches are there already, on the device.

    Args:
        images: uint8 [N, size, size, 3].
        labels: int64 [N].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:  # no processes: nothing of the other one
        self.images, self.labels, self.size = images, labels, images.shape[1]

    def begin(self, requests: Iterator[Request], *, pinned: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """As many images as each request is for, one after another: which ones, noise does not mind."""
        first = 0
        for request in requests:
            rows = slice(first, first := first + len(request.rows))
            yield self.images[rows], self.labels[rows]
