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
    root, image_size = checked(root, image_size)
    classes: list[str] = []
    splits = {name: _read(folder, classes, image_size) for name, folder in folders(root).items()}
    mean, std = channel_statistics(splits["train"].images)
    return Dataset(
        name="imagefolder",
        train=splits["train"],
        test=splits["test"],
        validation=splits.get("validation"),
        class_names=tuple(classes),
        mean=mean,
        std=std,
        padding=image_size // 8,
        flip=True,
    )


def checked(root: str | Path | None, image_size: int | None) -> tuple[Path, int]:
    """What was given, unless it names no images."""
    if root is None or image_size is None:
        raise InputError("--data imagefolder needs --data-root, the folder of train/ and test/, and --image-size")
    if image_size < 1:
        raise InputError(f"--image-size must be at least 1, not {image_size}")
    return Path(root), image_size


def folders(root: Path) -> dict[str, Path]:
    """The folders of `train`, `test` and, where there is one, `validation`."""
    held_out = next((root / name for name in ("val", "valid") if (root / name).is_dir()), None)
    test = root / "test" if (root / "test").is_dir() or held_out is None else held_out
    found = {"train": root / "train", "test": test}
    return found if held_out in (None, test) else found | {"validation": held_out}


def _read(folder: Path, classes: list[str], image_size: int) -> Split:
    """The images of one split; the first split fills the empty list of classes."""
    files = listed(folder, classes)
    from torchvision import transforms

    transform = transforms.Compose([transforms.Resize(image_size), transforms.CenterCrop(image_size)])
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


def listed(folder: Path, classes: list[str]) -> list[tuple[str, int]]:
    """Paths of the images below a folder with their labels, sorted; an empty list of classes is filled.

    Raises:
        InputError: it is no folder of classes, has other classes than those given, or torchvision is not there.
    """
    try:
        from torchvision.datasets import folder as torchvision_folder
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise InputError(
            f"image folders need torchvision, which cannot be imported ({error}): install the torchvision that "
            f"belongs to torch {torch.__version__}, or use --data npz"
        ) from error
    try:
        found, numbers = torchvision_folder.find_classes(folder)
        known = torchvision_folder.IMG_EXTENSIONS
        files = torchvision_folder.make_dataset(str(folder), numbers, extensions=known)
    except OSError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder} cannot be read as a folder of classes: {reason}; check --data-root") from error
    if classes and found != classes:
        differing = ", ".join(sorted(set(found) ^ set(classes))[:_NAMED])
        raise InputError(f"{folder} has other classes than the training images ({differing}): give both the same")
    classes[:] = found
    return files


def _decoded(path: str, transform: Callable[[Any], Any]) -> Tensor | None:
    """One image uint8 [N, N, 3], or None where the file is none."""
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms.functional import pil_to_tensor

    try:
        return pil_to_tensor(transform(default_loader(path))).permute(1, 2, 0).contiguous()
    except (OSError, ValueError, SyntaxError):  # what the decoders raise about damaged files
        return None
