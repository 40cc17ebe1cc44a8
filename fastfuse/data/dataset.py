"""What a data set is here: whole splits as uint8 tensors, small enough to live on the device."""

import dataclasses
import math
import zlib
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from fastfuse.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """Images uint8 [N, H, W, 3] and their labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.images.shape[0]

    def part(self, rows: Tensor | slice) -> "Split":
        """The images of a slice, or where a bool [N] is set."""
        return Split(self.images[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> "Split":
        """The same split with both tensors on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


class _AnySplit(Protocol):
    """What a data set asks of its splits, which hold their images or know where they are."""

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def part(self, rows: Tensor | slice) -> Self: ...

    def to(self, device: torch.device | str) -> Self: ...


S = TypeVar("S", bound=_AnySplit)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset(Generic[S]):
    """Splits of one size of image, with the statistics and the augmentation that training applies to them.

    `mean` and `std` are float32 [3] in units where white is 1; `padding` (pixels on each side) and `flip` describe
    the random crop and mirror of the training split. `validation` is None where there is none.
    """

    name: str
    train: S
    test: S
    validation: S | None
    class_names: tuple[str, ...]
    mean: Tensor
    std: Tensor
    padding: int
    flip: bool

    @property
    def num_classes(self) -> int:
        """K: labels are 0 .. K - 1."""
        return len(self.class_names)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        train: Any = self.train  # a `Split`; other data sets have sizes of their own
        height, width = train.images.shape[1:3]
        return height, width

    def fingerprint(self) -> str:
        """Sizes and checksum of training and test split; the tensors must be on the CPU."""
        checksum = 0
        splits: tuple[Any, ...] = self.train, self.test  # each a `Split`, as for `image_size`
        for split in splits:
            for x in (split.images, split.labels):
                checksum = zlib.crc32(x.contiguous().numpy().data, checksum)
        return f"{len(self.train)}+{len(self.test)} images, crc {checksum:08x}"

    def close(self) -> None:
        """End what works for it: nothing does for images that lie on the device."""

    def to(self, device: torch.device | str) -> Self:
        """The same data set with every tensor on `device`."""
        return dataclasses.replace(
            self,
            train=self.train.to(device),
            test=self.test.to(device),
            validation=None if self.validation is None else self.validation.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation of uint8 [N, H, W, C], each float32 [C], white = 1.

    A channel that never varies gets deviation 1, so that normalisation maps it to 0. Counting values keeps the sums
    exact for any number of images.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(-1):
        weights = torch.bincount(channel.flatten(), minlength=256) / channel.numel()
        mean = (weights * values).sum()
        variance = (weights * (values - mean) ** 2).sum()
        means.append(mean / 255)
        deviations.append(variance.sqrt() / 255 if (weights < 1).all() else torch.tensor(1.0, dtype=torch.float64))
    return torch.stack(means).float(), torch.stack(deviations).float()


def split_validation(dataset: Dataset, *, fraction: float, seed: int) -> Dataset:
    """Move a stratified `fraction` of the training images, drawn from `seed`, to a new validation split.

    Each class gives up its nearest whole number of images; both splits keep the original order. `mean` and `std` stay
    as they are, so that an evaluation with another fraction feeds a network the same input.

    Raises:
        InputError: the set has a validation split already, the fraction is too small to take any image or so large
            that a class would keep none.
    """
    if dataset.validation is not None:
        raise InputError(f"data set {dataset.name} has a validation split already: leave --val-fraction out")
    train = dataset.train
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(train), dtype=torch.bool)
    for label in train.labels.unique().tolist():
        members = (train.labels == label).nonzero().flatten()
        count = math.floor(fraction * len(members) + 0.5)
        if count == len(members):
            raise InputError(
                f"val_fraction {fraction} would leave class {label} ({dataset.class_names[label]!r}) of data set "
                f"{dataset.name} without training images, it has {len(members)}: lower --val-fraction"
            )
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not held_out.any():
        raise InputError(
            f"val_fraction {fraction} takes no image of any class of data set {dataset.name}: raise --val-fraction"
        )
    return dataclasses.replace(
        dataset,
        train=train.part(~held_out),
        validation=train.part(held_out),
    )
