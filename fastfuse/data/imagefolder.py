"""A folder of small images, a folder for each class, such as CINIC-10's; decoded once and kept whole on the device."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastfuse.data.dataset import Dataset, Split, channel_statistics
from fastfuse.errors import InputError

# More of a split's files than this share cannot be a few damaged ones.
MOST_DAMAGED = 0.01
_NAMED = 3


def load(*, root: str | Path | None = None, image_size: int | None = None) -> Dataset:
    """Read `root`/train and `root`/test, each with a folder of image files for each class.

    Without `test` the folder `val` (or `valid`) takes its place; beside it, it holds the validation images. An image of
    another size is resized to `image_size` on its shorter side and cropped at its centre. Crop padding is an eighth of
    the size, mirroring on; mean and deviation are those of the training images.

    Args:
        root: the folder.
        image_size: height and width, at least 1.

    Raises:
        InputError: a folder that is missing or empty, classes that differ between splits, too many files that are no
            images, or torchvision, which reads them, cannot be imported.
    """
    if root is None or image_size is None:
        raise InputError("--data imagefolder needs --data-root, the folder of train/ and test/, and --image-size")
    if image_size < 1:
        raise InputError(f"--image-size must be at least 1, not {image_size}")
    root = Path(root)
    held_out = next((root / name for name in ("val", "valid") if (root / name).is_dir()), None)
    test = root / "test" if (root / "test").is_dir() or held_out is None else held_out
    classes: list[str] = []
    train_split = _read(root / "train", classes, image_size)
    test_split = _read(test, classes, image_size)
    mean, std = channel_statistics(train_split.images)
    return Dataset(
        name="imagefolder",
        train=train_split,
        test=test_split,
        validation=None if held_out in (None, test) else _read(held_out, classes, image_size),
        class_names=tuple(classes),
        mean=mean,
        std=std,
        padding=image_size // 8,
        flip=True,
    )


def _read(folder: Path, classes: list[str], image_size: int) -> Split:
    """The images of one split; the first split fills the empty list of classes."""
    files, transform = _listed(folder, classes, image_size)
    with ThreadPoolExecutor() as pool:
        images = list(pool.map(lambda file: _decoded(file[0], transform), files))
    damaged = [path for (path, _), image in zip(files, images, strict=True) if image is None]
    if damaged:
        first = ", ".join(damaged[:_NAMED]) + (" ..." if len(damaged) > _NAMED else "")
        if len(damaged) > MOST_DAMAGED * len(files):
            raise InputError(
                f"{len(damaged)} of {len(files)} files below {folder} are damaged or no images ({first}): remove them"
            )
        logging.getLogger(__name__).warning("%d damaged files below %s are left out: %s", len(damaged), folder, first)
    whole = [(image, label) for image, (_, label) in zip(images, files, strict=True) if image is not None]
    return Split(torch.stack([image for image, _ in whole]), torch.tensor([label for _, label in whole]))


def _listed(folder: Path, classes: list[str], image_size: int) -> tuple[list[tuple[str, int]], Callable[[Any], Any]]:
    """Files with their labels, sorted, and what brings an image to its size."""
    try:
        from torchvision import transforms
        from torchvision.datasets import folder as folders
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise InputError(
            f"--data imagefolder needs torchvision, which cannot be imported ({error}): install the torchvision that "
            f"belongs to torch {torch.__version__}, or use --data npz"
        ) from error
    try:
        found, numbers = folders.find_classes(folder)
        files = folders.make_dataset(str(folder), numbers, extensions=folders.IMG_EXTENSIONS)
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder} cannot be read as a folder of classes: {reason}; check --data-root") from error
    if classes and found != classes:
        differing = ", ".join(sorted(set(found) ^ set(classes))[:_NAMED])
        raise InputError(f"{folder} has other classes than the training images ({differing}): give both the same")
    classes[:] = found
    return files, transforms.Compose([transforms.Resize(image_size), transforms.CenterCrop(image_size)])


def _decoded(path: str, transform: Callable[[Any], Any]) -> Tensor | None:
    """One image uint8 [N, N, 3], or None where the file is none."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.functional import pil_to_tensor

    try:
        return pil_to_tensor(transform(default_loader(path))).permute(1, 2, 0).contiguous()
    except (OSError, ValueError, SyntaxError):  # what the decoders raise about damaged files
        return None
