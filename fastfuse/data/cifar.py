"""CIFAR-10 and CIFAR-100 through torchvision, which checks the files' md5 sums and is imported only here."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastfuse.data.dataset import Dataset, Split
from fastfuse.errors import InputError

# The values that the published recipes normalise with; not recomputed, so that results stay comparable.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def load(name: str, *, root: str | Path | None = None, download: bool = False) -> Dataset:
    """Read `cifar10` or `cifar100` below `root` (default `data`); crop padding 4, mirroring on.

    Raises:
        InputError: the files are absent or damaged, the download failed, or torchvision cannot be imported.
    """
    root = Path("data" if root is None else root)
    kind = _torchvision_class(name)
    try:
        train, test = (kind(root, train=is_train, download=download) for is_train in (True, False))
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, pickle.UnpicklingError) as error:
        hint = "check the connection, or put the unpacked files there" if download else "fetch it with --download"
        raise InputError(
            f"{name} cannot be read below {str(root)!r} ({(str(error).splitlines() or [type(error).__name__])[0]}): "
            f"{hint}, or name the folder that holds {kind.base_folder} with --data-root"
        ) from error
    mean, std = (torch.tensor(values) for values in STATISTICS[name])
    return Dataset(
        name=name,
        train=_split(train),
        test=_split(test),
        validation=None,
        class_names=tuple(train.classes),
        mean=mean,
        std=std,
        padding=4,
        flip=True,
    )


def _torchvision_class(name: str) -> Any:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise InputError(
            f"{name} needs torchvision, which cannot be imported ({error}): install the torchvision that belongs to "
            f"torch {torch.__version__}, or use --data npz"
        ) from error
    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _split(source: Any) -> Split:
    return Split(torch.from_numpy(np.ascontiguousarray(source.data)), torch.tensor(source.targets, dtype=torch.int64))
