"""Image folders too large for the device: files are decoded by worker processes while the step before runs."""

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastfuse.data import cache, crops, filetable, imagefolder
from fastfuse.data.crops import DamagedImage
from fastfuse.data.dataset import Dataset
from fastfuse.data.filetable import FileTable
from fastfuse.data.pool import Pool, default_workers, handed_over
from fastfuse.errors import FastfuseError, InputError

# Of ImageNet's training images, as torchvision's documentation of its pretrained networks gives them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
IMAGE_SIZE = 224
# From so many bytes of decoded images on, an image folder is streamed unless --stream says otherwise.
DEVICE_LIMIT = 4 << 30
# Images that may take the place of a damaged one, one after another.
SPARES = 8
_NAMED = 3


class Request(NamedTuple):
    """Images to be shown together, n of them.

    Attributes:
        table: name of the table of files.
        rows: int64 [n, 1 + SPARES]: of each image, and what takes its place if it is damaged, in this order.
        keys: uint64 [n], of the random numbers; None: the centre crop of an evaluation.
        positions: int64 [n], places in the epoch's order.
        flips: bool [n].
    """

    table: str
    rows: np.ndarray
    keys: np.ndarray | None = None
    positions: np.ndarray | None = None
    flips: np.ndarray | None = None


class Damage(NamedTuple):
    """A file, or an image of a cache, that cannot be read.

    Attributes:
        where: among what it is counted.
        path: of the file.
        reason: what is wrong with it.
    """

    where: str
    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What the worker processes do.

    Attributes:
        tables: of files, by name.
        size: height and width of what is cut out.
    """

    tables: dict[str, FileTable]
    size: int

    @torch.inference_mode()  # views that autograd need not follow: 40 us of an image
    def __call__(self, request: Request) -> tuple[Tensor, Tensor, list[Damage]]:
        """Images uint8 [n, size, size, 3], labels int64 [n] (-1: no image), and what was found damaged."""
        table = self.tables[request.table]
        damaged: list[Damage] = []
        images = handed_over(len(request.rows), self.size, self.size, 3)
        labels = handed_over(len(request.rows), dtype=torch.int64)
        shown = labels.numpy()  # quicker to set one by one
        for i, candidates in enumerate(request.rows.tolist()):
            for row in candidates:
                try:
                    image = self._cut(table, row, request, i, damaged)
                except DamagedImage as error:
                    damaged.append(Damage(f"files below {table.root}", table.path(row), str(error)))
                    continue
                images[i], shown[i] = image, table.labels[row]
                break
            else:
                shown[i] = -1
        return images, labels, damaged

    def _cut(self, table: FileTable, row: int, request: Request, i: int, damaged: list[Damage]) -> Tensor:
        image = table.cache.image(row) if table.cache is not None else None
        if table.cache is not None and image is None:
            where = f"images of the cache {table.cache.pixels}"
            damaged.append(Damage(where, table.path(row), "its bytes do not fit its checksum"))
            image = table.scaled(row, self.size)
        if request.keys is None:
            return crops.centre_crop(table.scaled(row, self.size) if image is None else image, self.size)
        assert request.positions is not None and request.flips is not None  # as are the keys
        draws = crops.generator(int(request.keys[i]), int(request.positions[i]))
        image = crops.random_crop(crops.read(table.path(row)) if image is None else image, self.size, draws)
        return image.flip(1) if request.flips[i] else image


class Source:
    """The processes that decode a data set, and the account of what they find damaged.

    Args:
        tables: of files, by name.
        size: height and width of the images that come out.
        workers: processes; 0 is this one.
    """

    def __init__(self, tables: dict[str, FileTable], *, size: int, workers: int) -> None:
        self.tables, self.size = tables, size
        self.pool = Pool(Decoder(tables, size), workers=workers)
        self._damaged: dict[str, set[str]] = defaultdict(set)

    def begin(self, requests: Iterator[Request], *, pinned: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Start decoding; images and labels as they are asked for, see `Decoder` and `Pool.begin`.

        Raises:
            InputError: when asked, more than `imagefolder.MOST_DAMAGED` of the files of a folder are damaged.
        """
        return self._counted(self.pool.begin(requests, pinned=pinned))

    def _counted(self, results: Iterator[tuple[Tensor, Tensor, list[Damage]]]) -> Iterator:
        for images, labels, damaged in results:
            for found in damaged:
                self._count(*found)
            if labels.min() < 0:
                last = f"{found.path} ({found.reason})"
                raise FastfuseError(f"{1 + SPARES} files in a row cannot be read, as {last}: check the disk")
            yield images, labels

    def _count(self, where: str, path: str, reason: str) -> None:
        known = self._damaged[where]
        if path in known:
            return
        known.add(path)
        log = logging.getLogger(__name__)
        log.warning("damaged and passed over: %s (%s), number %d among the %s", path, reason, len(known), where)
        files = sum(len(table) for table in self.tables.values() if _names(table, where))
        if len(known) > imagefolder.MOST_DAMAGED * files:
            first = ", ".join(sorted(known)[:_NAMED]) + (" ..." if len(known) > _NAMED else "")
            raise InputError(
                f"{len(known)} of the {files} {where} are damaged ({first}; the last: {reason}): remove or replace them"
            )


def _names(table: FileTable, where: str) -> bool:
    return where.endswith((f" {table.root}", f" {table.cache.pixels}" if table.cache is not None else "\0"))


@dataclasses.dataclass(frozen=True, eq=False)
class StreamedSplit:
    """Images of a table of files, decoded when they are needed.

    Attributes:
        source: decodes them.
        table: name of the table.
        rows: int64 [N], places in the table.
        labels: int64 [N].
    """

    source: Source
    table: str
    rows: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, rows: Tensor | slice) -> "StreamedSplit":
        """The images of a slice, or where a bool [N] is set."""
        return dataclasses.replace(self, rows=self.rows[rows], labels=self.labels[rows])

    def to(self, device: torch.device | str) -> "StreamedSplit":
        """The split itself: its images go to the device batch by batch."""
        return self

    def candidates(self, places: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Rows of the table for `Request`: those at `places` of an `order` of this split, and those that follow."""
        following = (places[:, None] + np.arange(1 + SPARES)) % len(order)
        return self.rows.numpy()[order[following]]


class StreamedDataset(Dataset[StreamedSplit]):
    """A data set of `StreamedSplit`s; it has no crop padding, its training crops are `crops.random_crop`."""

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.train.source.size, self.train.source.size

    def fingerprint(self) -> str:
        """Counts and checksum of the files' names, labels and sizes."""
        value = 0
        for split in (self.train, self.test):
            value = split.source.tables[split.table].checksum(value)
        return f"{len(self.train)}+{len(self.test)} image files, crc {value:08x}"

    def close(self) -> None:
        """End the worker processes."""
        self.train.source.pool.close()


def load(
    name: str,
    *,
    root: str | Path | None,
    image_size: int | None,
    cache_folder: str | Path | None = None,
    workers: int | None = None,
) -> StreamedDataset:
    """Find the files of a data set; nothing is decoded, unless it is for a cache.

    Args:
        name: `imagenet` (folders train and val, on which it is tested) or `imagefolder` (see `imagefolder.folders`).
        root: the folder.
        image_size: height and width of the crops; `imagenet`: 224 by default.
        cache_folder: decode and resize all images once, see `fastfuse.data.cache`.
        workers: processes that decode, 0 for none; by default `pool.default_workers`.

    Raises:
        InputError: a folder that is missing or empty, classes that differ between splits, or no torchvision.
    """
    if name == "imagenet":
        if root is None:
            raise InputError("--data imagenet needs --data-root, the folder of train/ and val/")
        image_size = IMAGE_SIZE if image_size is None else image_size
    root, image_size = imagefolder.checked(root, image_size)
    workers = default_workers() if workers is None else workers
    classes: list[str] = []
    tables = {}
    folders = {"train": root / "train", "test": root / "val"}
    for split, folder in (folders if name == "imagenet" else imagefolder.folders(root)).items():
        tables[split] = filetable.listed(folder, imagefolder.listed(folder, classes))
        if cache_folder is not None:
            made = cache.opened(tables[split], Path(cache_folder), split, image_size, workers=workers)
            tables[split] = dataclasses.replace(tables[split], cache=made)
    source = Source(tables, size=image_size, workers=workers)
    splits = {
        split: StreamedSplit(source, split, torch.arange(len(table)), torch.from_numpy(table.labels))
        for split, table in tables.items()
    }
    return StreamedDataset(
        name=name,
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("validation"),
        class_names=tuple(classes),
        mean=torch.tensor(MEAN),
        std=torch.tensor(STD),
        padding=0,
        flip=True,
    )


def is_large(root: str | Path | None, image_size: int | None) -> bool:
    """Whether the images of an image folder, decoded to uint8, exceed `DEVICE_LIMIT`.

    Raises:
        InputError: as `load`.
    """
    root, image_size = imagefolder.checked(root, image_size)
    classes: list[str] = []
    files = sum(len(imagefolder.listed(folder, classes)) for folder in imagefolder.folders(root).values())
    return files * image_size**2 * 3 > DEVICE_LIMIT
