"""Image sets in one .npz file, under the key names of the MedMNIST collection.

`train_images`, `train_labels`, `test_images`, `test_labels`; optional `val_images` with `val_labels`, `class_names`.
Images are uint8, [N, H, W] or [N, H, W, 1] grey or [N, H, W, 3] RGB, all splits of one size; labels are integers [N]
or [N, 1]; names are strings [K]. Files are untrusted: nothing in them is unpickled.
"""

import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from fastfuse.data.dataset import Dataset, Split, channel_statistics
from fastfuse.errors import InputError

REQUIRED = ("train_images", "train_labels", "test_images", "test_labels")
OPTIONAL = ("val_images", "val_labels", "class_names")
MAX_CLASSES = 100_000  # a label beyond is an identifier, not a class number, and would size the network's last layer


def load(path: str | Path | None) -> Dataset:
    """Read an .npz file; crop padding 4, mirroring on, statistics from its training images.

    The number of classes is that of `class_names`, else 1 + the largest training label.

    Raises:
        InputError: one line that names file and key, what was found, what is expected and how to mend it.
    """
    if path is None:
        raise InputError("data set npz needs a file: give its path with --data-path FILE.npz")
    arrays = _read(Path(path))
    where = str(path)
    if ("val_images" in arrays) != ("val_labels" in arrays):
        present, absent = ("images", "labels") if "val_images" in arrays else ("labels", "images")
        raise InputError(f"{where}: val_{present} without val_{absent}: add val_{absent} or remove val_{present}")
    names = ["train", "test"] + (["val"] if "val_images" in arrays else [])
    images = {name: _images(arrays, f"{name}_images", where) for name in names}
    labels = {name: _labels(arrays, f"{name}_labels", where, len(images[name])) for name in names}
    _check_same_size(images, where)
    class_names = _class_names(arrays, where, labels["train"])
    splits = {}
    for name in names:
        _check_range(labels[name], f"{name}_labels", where, len(class_names), named="class_names" in arrays)
        splits[name] = _split(images[name], labels[name])
    mean, std = channel_statistics(splits["train"].images)
    return Dataset(
        name="npz",
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("val"),
        class_names=class_names,
        mean=mean,
        std=std,
        padding=4,
        flip=True,
    )


def _read(path: Path) -> dict[str, np.ndarray]:
    """The known keys of the file as arrays; other keys are left alone."""
    try:
        stream = path.open("rb")  # opened here, since numpy.load leaks the handle of a broken zip file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file: check --data-path") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}): check --data-path") from None
    with stream, _open(stream, path) as file:
        for key in REQUIRED:
            if key not in file:
                raise InputError(f"{path}: key {key} is missing, found {sorted(file.files)}: add it with numpy.savez")
        return {key: _array(file, key, path) for key in REQUIRED + OPTIONAL if key in file}


def _open(stream: BinaryIO, path: Path) -> np.lib.npyio.NpzFile:
    try:
        file = np.load(stream, allow_pickle=False)
    except (ValueError, EOFError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an .npz file ({_first_line(error)}): write it with numpy.savez") from None
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise InputError(f"{path}: one bare array, expected an .npz file: write it with numpy.savez")
    return file


def _array(file: np.lib.npyio.NpzFile, key: str, path: Path) -> np.ndarray:
    try:
        array = file[key]
    except ValueError as error:
        raise InputError(
            f"{path}: {key} cannot be read ({_first_line(error)}): expected a plain array of numbers or strings, "
            "never pickled objects; convert it before numpy.savez"
        ) from None
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: {key} is damaged ({_first_line(error)}): make the file again") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: {key} is not an array but raw bytes: write the file with numpy.savez")
    return array


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _images(arrays: dict[str, np.ndarray], key: str, where: str) -> np.ndarray:
    """The array under `key` as uint8 [N, H, W, 1 or 3]."""
    array = arrays[key]
    if array.dtype != np.uint8:
        raise InputError(f"{where}: {key} has type {array.dtype}, expected uint8: scale to 0..255 and convert")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or array.shape[3] not in (1, 3) or 0 in array.shape:
        raise InputError(
            f"{where}: {key} has shape {list(arrays[key].shape)}, expected [N, H, W], [N, H, W, 1] or [N, H, W, 3] "
            "with at least one image: transpose or convert"
        )
    return array


def _labels(arrays: dict[str, np.ndarray], key: str, where: str, count: int) -> np.ndarray:
    """The array under `key` as integers [N]."""
    array = arrays[key]
    if array.dtype.kind not in "iu":
        raise InputError(f"{where}: {key} has type {array.dtype}, expected integers: convert to class numbers 0..K-1")
    if array.shape not in ((count,), (count, 1)):
        raise InputError(
            f"{where}: {key} has shape {list(array.shape)}, expected [{count}] or [{count}, 1], "
            f"one label for each of the {count} images: make both the same length"
        )
    return array.reshape(count)


def _check_same_size(images: dict[str, np.ndarray], where: str) -> None:
    expected = list(images["train"].shape[1:])
    for name, array in images.items():
        if list(array.shape[1:]) != expected:
            raise InputError(
                f"{where}: {name}_images are {list(array.shape[1:])} (H, W, C), train_images {expected}: "
                "bring all splits to one size"
            )


def _class_names(arrays: dict[str, np.ndarray], where: str, train_labels: np.ndarray) -> tuple[str, ...]:
    """The stored names, else the numbers up to the largest training label."""
    if "class_names" not in arrays:
        largest = int(train_labels.max())
        if largest >= MAX_CLASSES:
            raise InputError(
                f"{where}: train_labels holds {largest}, expected class numbers below {MAX_CLASSES}: "
                "renumber the classes 0..K-1"
            )
        return tuple(str(label) for label in range(largest + 1))
    names = arrays["class_names"]
    if names.dtype.kind != "U" or names.ndim != 1 or len(names) == 0:
        raise InputError(
            f"{where}: class_names has type {names.dtype} and shape {list(names.shape)}, expected strings [K]: "
            "store numpy.array of a list of str"
        )
    return tuple(names.tolist())


def _check_range(labels: np.ndarray, key: str, where: str, classes: int, *, named: bool) -> None:
    reason = "the length of class_names" if named else "1 + the largest training label"
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < classes:
            raise InputError(
                f"{where}: {key} holds {label}, expected 0..{classes - 1} ({classes} classes, {reason}): "
                "renumber the labels or correct class_names"
            )


def _split(images: np.ndarray, labels: np.ndarray) -> Split:
    """Tensors of a checked pair of arrays; grey becomes three equal channels."""
    rgb = images if images.shape[3] == 3 else images.repeat(3, axis=3)
    return Split(torch.from_numpy(np.ascontiguousarray(rgb)), torch.from_numpy(labels.astype(np.int64)))
