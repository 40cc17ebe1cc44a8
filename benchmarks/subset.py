"""A small set of images out of a large one, so that many short runs end in minutes."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from fastfuse.data import Dataset, Split
from fastfuse.errors import InputError
from fastfuse.train.files import write_atomic


def write(dataset: Dataset, path: Path, *, classes: int | None, images: int | None, size: int | None) -> None:
    """Write the first training images of each class, and all test images of these classes, as an .npz of `--data npz`.

    Args:
        dataset: on the CPU.
        path: of the file.
        classes: the first so many; None: all.
        images: of each class for training; None: all.
        size: height and width, by means over squares of pixels; None: as they are.

    Raises:
        InputError: more classes or images than there are, or a size that is no whole part of theirs.
    """
    classes = classes or dataset.num_classes
    if not 2 <= classes <= dataset.num_classes:
        raise InputError(f"--classes must be 2 to {dataset.num_classes} of these data, not {classes}")
    arrays = {"class_names": np.array(dataset.class_names[:classes])}
    for name, split, count in (("train", dataset.train, images), ("test", dataset.test, None)):
        kept = torch.cat([_first(split, label, count) for label in range(classes)])
        arrays[f"{name}_images"] = _reduced(split.images[kept], size).numpy()
        arrays[f"{name}_labels"] = split.labels[kept].numpy()
    write_atomic(path, lambda file: np.savez(file, **arrays))


def _first(split: Split, label: int, count: int | None) -> Tensor:
    found = (split.labels == label).nonzero()[:, 0]
    if count is not None and len(found) < count:
        raise InputError(f"--images must be at most {len(found)}, which class {label} has for training, not {count}")
    return found[:count]


def _reduced(images: Tensor, size: int | None) -> Tensor:
    """[N, H, W, 3] uint8 to [N, size, size, 3]."""
    height, width = images.shape[1:3]
    if size is None:
        return images
    if height != width or height % size:
        raise InputError(f"--image-size {size} is no whole part of these images of {height}x{width}")
    means = avg_pool2d(images.permute(0, 3, 1, 2).float(), height // size)
    return means.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
