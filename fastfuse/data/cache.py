"""Images decoded and resized once, in one memory-mapped file for each folder of classes, with a checksum for each.

    DIR/train-256.pixels   uint8, the images one after another, [h, w, 3] each, the shorter side 256
    DIR/train-256.npz      where each begins, its size and CRC-32, and of which files they are; written last

An image is compared with its checksum whenever it is read. What an evaluation sees is the same to the bit with and
without a cache; training crops are cut from the smaller image, so they are not.
"""

import dataclasses
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastfuse.data import crops
from fastfuse.data.crops import DamagedImage
from fastfuse.data.pool import Pool, handed_over, lost_workers_explained
from fastfuse.errors import InputError

if TYPE_CHECKING:
    from fastfuse.data.filetable import FileTable

_FORMAT = 1
# Images that a process hands over at a time.
_PART = 32


class Cache:
    """The images of one table of files.

    Args:
        pixels: path of the uint8 file.
        starts: int64 [N + 1], where each image begins.
        shapes: int64 [N, 2], height and width; 0 where the file is no image.
        checksums: uint32 [N].
    """

    def __init__(self, pixels: Path, starts: np.ndarray, shapes: np.ndarray, checksums: np.ndarray) -> None:
        self.pixels, self._starts, self._shapes, self._checksums = pixels, starts, shapes, checksums
        # Copy-on-write, so that torch takes it as writable; nothing writes to it.
        self._bytes = np.memmap(pixels, np.uint8, mode="c") if starts[-1] else np.zeros(0, np.uint8)

    def image(self, row: int) -> Tensor | None:
        """uint8 [h, w, 3]; None where its bytes do not fit their checksum.

        Raises:
            DamagedImage: its file is no image.
        """
        height, width = self._shapes[row]
        if not height:
            raise DamagedImage("no image when the cache was made")
        own = self._bytes[self._starts[row] : self._starts[row + 1]]
        if zlib.crc32(own.data) != self._checksums[row]:
            return None
        return torch.from_numpy(own.reshape(height, width, 3))


def opened(table: "FileTable", folder: Path, name: str, size: int, *, workers: int) -> Cache:
    """The cache of a table in a folder; it is made if it is not there, damaged, or was not finished.

    Only one process makes it, others wait. Where the folder cannot be written to, a finished one is read.

    Args:
        table: the files.
        folder: where caches lie.
        name: of the split, which names the files.
        size: of the crops, which decides the shorter side.
        workers: processes that decode.

    Raises:
        InputError: the folder cannot be written to, has no room, or holds the cache of other files.
    """
    stem = folder / f"{name}-{crops.shorter_side(size)}"
    key = f"format {_FORMAT}, {len(table)} files, crc {table.checksum():08x}"
    if folder.is_dir() and not os.access(folder, os.W_OK) and (found := _read(stem, key)) is not None:
        return found
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(stem):
            found = _read(stem, key)
            if found is None:
                _make(table, stem, key, size, workers)
                found = _read(stem, key)
    except OSError as error:
        raise InputError(
            f"--data-cache {folder} cannot be written ({error.strerror or error}): make room, name another folder, or "
            "leave it out"
        ) from error
    if found is None:
        raise InputError(f"--data-cache {folder}: {stem.name} cannot be read back after it was written: check the disk")
    return found


def _read(stem: Path, key: str) -> Cache | None:
    """What is there, or None if there is nothing, or with a warning if it is damaged."""
    index, pixels = stem.with_suffix(".npz"), stem.with_suffix(".pixels")
    if not index.exists():
        return None
    try:
        with np.load(index, allow_pickle=False) as arrays:  # a zip file, whose parts have checksums
            own, parts = str(arrays["key"]), [arrays[part] for part in ("starts", "shapes", "checksums")]
        if own == key and pixels.stat().st_size != parts[0][-1]:
            raise ValueError(f"{pixels.name} has {pixels.stat().st_size} bytes, not {parts[0][-1]}")
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _log().warning("%s is damaged (%s) and made anew", stem, error)
        return None
    if own != key:
        raise InputError(
            f"{stem}.* was made of other files than those given now ({own}; now {key}): give another --data-cache, or "
            "delete it to make it anew"
        )
    return Cache(pixels, *parts)


def _make(table: "FileTable", stem: Path, key: str, size: int, workers: int) -> None:
    side = crops.shorter_side(size)
    least = len(table) * side * side * 3
    if shutil.disk_usage(stem.parent).free < least:
        raise InputError(f"--data-cache {stem.parent} needs more than {least / 1e6:,.0f} MB, which are not free there")
    _log().warning("%s: %d images are decoded for it, once", stem, len(table))
    unfinished = stem.with_suffix(".pixels.tmp")
    stem.with_suffix(".npz").unlink(missing_ok=True)
    pool = Pool(_Scale(table, size), workers=workers)
    try:
        with unfinished.open("wb") as file, lost_workers_explained():
            shapes, checksums = np.zeros((len(table), 2), np.int64), np.zeros(len(table), np.uint32)
            parts = [range(first, min(first + _PART, len(table))) for first in range(0, len(table), _PART)]
            for rows, (images, *found) in zip(parts, pool.begin(parts), strict=True):
                shapes[rows.start : rows.stop], checksums[rows.start : rows.stop] = found
                file.write(images.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(stem.with_suffix(".pixels"))
    finally:
        pool.close()
        unfinished.unlink(missing_ok=True)
    starts = np.concatenate(([0], np.cumsum(shapes.prod(1) * 3)))
    index = stem.with_suffix(".npz.tmp")
    with index.open("wb") as file:
        np.savez(file, key=np.array(key), starts=starts, shapes=shapes, checksums=checksums)
        file.flush()
        os.fsync(file.fileno())
    index.replace(stem.with_suffix(".npz"))


@dataclasses.dataclass(frozen=True)
class _Scale:
    """What the processes do: images uint8, one after another, their shapes [n, 2] and checksums [n]; 0 for no image."""

    table: "FileTable"
    size: int

    def __call__(self, rows: range) -> tuple[Tensor, np.ndarray, np.ndarray]:
        images = []
        shapes, checksums = np.zeros((len(rows), 2), np.int64), np.zeros(len(rows), np.uint32)
        for i, row in enumerate(rows):
            try:
                image = self.table.scaled(row, self.size).contiguous()
            except DamagedImage:
                continue
            shapes[i], checksums[i] = image.shape[:2], zlib.crc32(image.numpy().data)
            images.append(image.flatten())
        pixels = handed_over(int(shapes.prod(1).sum()) * 3) if images else torch.empty(0, dtype=torch.uint8)
        return torch.cat(images or [pixels], out=pixels), shapes, checksums


@contextmanager
def _alone(stem: Path) -> Iterator[None]:
    """While this process makes a cache, others wait for it."""
    import fcntl

    with stem.with_suffix(".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log().warning("%s: another process makes or reads it; this one waits", stem)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _log() -> logging.Logger:
    return logging.getLogger(__name__)
