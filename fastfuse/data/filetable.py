"""The files of one folder of classes: names, labels, sizes, and the image of each."""

import dataclasses
import os
import zlib
from pathlib import Path

import numpy as np
from torch import Tensor

from fastfuse.data import crops
from fastfuse.data.cache import Cache
from fastfuse.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class FileTable:
    """Image files below `root`, in a fixed order.

    Attributes:
        root: the folder.
        names: bytes [N], paths below it. An array, not a list: processes that share it never write to it.
        labels: int64 [N].
        sizes: int64 [N], bytes of each file.
        cache: the images decoded beforehand, or None.
    """

    root: Path
    names: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    cache: Cache | None = None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, row: int) -> str:
        """Of one file."""
        return os.path.join(self.root, os.fsdecode(self.names[row].item()))

    def checksum(self, value: int = 0) -> int:
        """CRC-32 of names, labels and sizes; `value` is that of what came before."""
        for array in (self.names, self.labels, self.sizes):
            value = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, value)
        return value

    def scaled(self, row: int, size: int) -> Tensor:
        """A whole image, see `crops.scaled`, from its file.

        Raises:
            DamagedImage: the file is none.
        """
        return crops.scaled(crops.read(self.path(row)), size)


def listed(root: Path, files: list[tuple[str, int]]) -> FileTable:
    """The table of paths below `root` with their labels.

    Raises:
        InputError: a file has gone.
    """
    try:
        sizes = [os.stat(path).st_size for path, _ in files]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror}): remove it, or start again") from error
    names = np.array([os.fsencode(os.path.relpath(path, root)) for path, _ in files])
    labels = np.array([label for _, label in files], dtype=np.int64)
    return FileTable(root, names, labels, np.array(sizes, dtype=np.int64))
