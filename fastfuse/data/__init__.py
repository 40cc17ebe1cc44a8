"""Image sets, whole on the device or decoded while training, and the batches drawn from them."""

import dataclasses
from pathlib import Path
from typing import Any

from fastfuse.data import arrays, cifar, digits, imagefolder, streaming
from fastfuse.data.augment import EpochPlan, EvaluationBatches, TrainingBatches, epoch_plan, steps_per_epoch
from fastfuse.data.dataset import Dataset, Split, split_validation
from fastfuse.data.pool import lost_workers_explained
from fastfuse.data.streamed_batches import StreamedEvaluationBatches, StreamedTrainingBatches
from fastfuse.data.streaming import StreamedDataset, StreamedSplit
from fastfuse.errors import InputError, unknown_name

__all__ = [
    "NAMES",
    "Dataset",
    "EpochPlan",
    "EvaluationBatches",
    "Split",
    "StreamedDataset",
    "StreamedEvaluationBatches",
    "StreamedSplit",
    "StreamedTrainingBatches",
    "TrainingBatches",
    "epoch_plan",
    "evaluation_batches",
    "load",
    "lost_workers_explained",
    "steps_per_epoch",
    "training_batches",
]

NAMES = ("digits", "npz", "cifar10", "cifar100", "imagefolder", "imagenet")


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
    stream: bool | None = None,
    cache: str | Path | None = None,
    workers: int | None = None,
) -> Dataset:
    """Load a data set by name, on the CPU; a streamed one stays in its files.

    Args:
        name: one of `NAMES`.
        root: folder of the CIFAR sets (default `data`), or of `imagefolder` and `imagenet`.
        path: the file of `npz`.
        download: fetch a CIFAR set that is not below `root`.
        val_fraction: share of the training images, 0 <= f < 1, to hold out as validation split, stratified by class.
        seed: draws that share.
        padding: pixels of the random crop; None for the data set's own.
        flip: random mirroring; None for the data set's own.
        image_size: height and width to which `imagefolder` and `imagenet` (default 224) bring their images.
        stream: decode an `imagefolder` while training; None: from `streaming.DEVICE_LIMIT` bytes on. `imagenet` always
            is.
        cache, workers: of streamed data, see `streaming.load`.

    Raises:
        InputError: an unknown name, unusable files or an option that does not fit, in one line.
    """
    if name not in NAMES:
        raise unknown_name("data set", name, NAMES)
    if path is not None and name != "npz":
        raise InputError(f"data set {name} takes no file, got {str(path)!r}: leave --data-path out or use --data npz")
    if image_size is not None and name not in ("imagefolder", "imagenet"):
        raise InputError(f"data set {name} takes no --image-size, its images have one: leave {image_size} out")
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction must be at least 0 and below 1, got {val_fraction}: correct --val-fraction")
    streamed = _is_streamed(name, root, image_size, stream)
    if not streamed and cache is not None:
        raise InputError(f"data set {name} is not streamed and takes no --data-cache: leave it out, or give --stream")
    if streamed and padding is not None:
        raise InputError(f"streamed images are cropped at random without --crop-padding: leave {padding} out")
    if streamed:
        form: dict[str, Any] = {"root": root, "image_size": image_size, "cache_folder": cache, "workers": workers}
        dataset: Dataset = streaming.load(name, **form)
    elif name == "digits":
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


def training_batches(dataset: Dataset, **form: Any) -> TrainingBatches | StreamedTrainingBatches:
    """Training batches of a data set, see `TrainingBatches`."""
    if isinstance(dataset, StreamedDataset):
        return StreamedTrainingBatches(dataset, **form)
    return TrainingBatches(dataset, **form)


def evaluation_batches(split: Split | StreamedSplit, **form: Any) -> EvaluationBatches | StreamedEvaluationBatches:
    """The images of a split in order, see `EvaluationBatches`."""
    if isinstance(split, StreamedSplit):
        return StreamedEvaluationBatches(split, **form)
    return EvaluationBatches(split, **form)


def _is_streamed(name: str, root: str | Path | None, image_size: int | None, stream: bool | None) -> bool:
    if name == "imagenet":
        if stream is False:
            raise InputError("data set imagenet is always streamed: leave --no-stream out, or give --data imagefolder")
        return True
    if name != "imagefolder":
        if stream:
            raise InputError(f"data set {name} lives on the device: leave --stream out")
        return False
    return streaming.is_large(root, image_size) if stream is None else stream


def _check_padding(dataset: Dataset) -> None:
    height, width = dataset.image_size
    if not 0 <= dataset.padding < min(height, width):
        raise InputError(
            f"crop padding {dataset.padding} does not fit the {height}x{width} images of data set {dataset.name}: "
            f"give --crop-padding 0..{min(height, width) - 1}"
        )
