"""Image sets that live whole on the device, and the batches drawn from them."""

import dataclasses
from pathlib import Path

from fastfuse.data import arrays, cifar, digits, imagefolder
from fastfuse.data.augment import EpochPlan, EvaluationBatches, TrainingBatches, epoch_plan, steps_per_epoch
from fastfuse.data.dataset import Dataset, Split, split_validation
from fastfuse.errors import InputError, unknown_name

__all__ = [
    "NAMES",
    "Dataset",
    "EpochPlan",
    "EvaluationBatches",
    "Split",
    "TrainingBatches",
    "epoch_plan",
    "load",
    "steps_per_epoch",
]

NAMES = ("digits", "npz", "cifar10", "cifar100", "imagefolder")


def load(
    name: str,
    *,
    root: str | Path | None = None,
    path: str | Path | None = None,
    download: bool = False,
    val_fraction: float = 0.0,
    seed: int = 0,
    padding: int | None = None,
    flip: bool | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Load a data set by name, on the CPU.

    Args:
        name: one of `NAMES`.
        root: folder of the CIFAR sets (default `data`), or of `imagefolder`.
        path: the file of `npz`.
        download: fetch a CIFAR set that is not below `root`.
        val_fraction: share of the training images, 0 <= f < 1, to hold out as validation split, stratified by class.
        seed: draws that share.
        padding: pixels of the random crop; None for the data set's own.
        flip: random mirroring; None for the data set's own.
        image_size: height and width to which `imagefolder` brings its images.

    Raises:
        InputError: an unknown name, unusable files or an option that does not fit, in one line.
    """
    if name not in NAMES:
        raise unknown_name("data set", name, NAMES)
    if path is not None and name != "npz":
        raise InputError(f"data set {name} takes no file, got {str(path)!r}: leave --data-path out or use --data npz")
    if image_size is not None and name != "imagefolder":
        raise InputError(f"data set {name} takes no --image-size, its images have one: leave {image_size} out")
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction must be at least 0 and below 1, got {val_fraction}: correct --val-fraction")
    if name == "digits":
        dataset = digits.load()
    elif name == "npz":
        dataset = arrays.load(path)
    elif name == "imagefolder":
        dataset = imagefolder.load(root=root, image_size=image_size)
    else:
        dataset = cifar.load(name, root=root, download=download)
    dataset = dataclasses.replace(
        dataset,
        padding=dataset.padding if padding is None else padding,
        flip=dataset.flip if flip is None else flip,
    )
    _check_padding(dataset)
    return split_validation(dataset, fraction=val_fraction, seed=seed) if val_fraction > 0 else dataset


def _check_padding(dataset: Dataset) -> None:
    height, width = dataset.train.images.shape[1:3]
    if not 0 <= dataset.padding < min(height, width):
        raise InputError(
            f"crop padding {dataset.padding} does not fit the {height}x{width} images of data set {dataset.name}: "
            f"give --crop-padding 0..{min(height, width) - 1}"
        )
