"""`fastfuse predict`: the classes of image files by an exported program; no network of this package is needed."""

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from fastfuse.errors import InputError

# Where an exported file keeps what must be known of images and classes.
DESCRIPTION = "fastfuse.json"
TOP = 5


class Prediction(NamedTuple):
    """One image: the best classes with their probabilities, best first; or what is wrong with the file."""

    image: str
    top: list[tuple[str, float]]
    error: str | None = None

    def plain(self) -> dict[str, Any]:
        """As JSON can hold it."""
        top = [{"class": name, "probability": share} for name, share in self.top]
        return {"image": self.image, "top": top, **({"error": self.error} if self.error else {})}


def predict(file: Path, images: Sequence[Path]) -> Iterator[Prediction]:
    """Classify image files one after another.

    Args:
        file: a .pt2 of `fastfuse export --format torch-export`.
        images: of any size; resized to cover the network's input, cropped at the centre, as training images are.

    Raises:
        InputError: the file is missing, damaged, or none of fastfuse.
    """
    program, facts = load_program(file)
    mean, std = (torch.tensor(facts[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for path in images:
        try:
            pixels = read_image(path, tuple(facts["image_size"]))
        except InputError as error:
            yield Prediction(str(path), [], str(error))
            continue
        with torch.no_grad():
            shares = program((pixels[None] / 255 - mean) / std).softmax(1)[0]
        best = shares.topk(min(TOP, len(shares)))
        names = [facts["classes"][i] for i in best.indices.tolist()]
        yield Prediction(str(path), list(zip(names, best.values.tolist(), strict=True)))


def load_program(file: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The program of an exported file and what it says of itself.

    Raises:
        InputError: see `predict`.
    """
    if file.is_dir():
        raise InputError(f"{file} is a folder, not an exported file: fastfuse export {file} --format torch-export")
    if not file.is_file():
        raise InputError(f"{file} does not exist; make it with: fastfuse export RUN --format torch-export")
    if file.suffix != ".pt2":
        raise InputError(f"{file} is no .pt2 file; make one with: fastfuse export RUN --format torch-export")
    try:
        program, text = read_program(file)
    except Exception as error:  # what the reader raises depends on where the damage is
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{file} cannot be read as an exported program, it is damaged or another kind of file ({reason})"
        ) from error
    try:
        facts = json.loads(text)
        lengths = [len(facts[key]) for key in ("mean", "std", "image_size")]
        if lengths != [3, 3, 2] or not facts["classes"]:
            raise ValueError("incomplete")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{file} does not say how images are normalised and what the classes are: export it with fastfuse export"
        ) from error
    return program, facts


def read_program(file: Path | BinaryIO) -> tuple[nn.Module, str]:
    """A program, images to logits, and its description; raises whatever torch does about a file that is none."""
    found = {DESCRIPTION: ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about buffers that torch's own reader makes
        return torch.export.load(file, extra_files=found).module(), found[DESCRIPTION]


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An image file as float32 [3, height, width], 0 to 255.

    Args:
        path: of any format that Pillow reads; made RGB.
        size: (height, width), which the image is resized to cover and cropped to at its centre.

    Raises:
        InputError: no such file, or no image.
    """
    from PIL import Image
    from torchvision.transforms import functional

    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "it does not exist" if isinstance(error, FileNotFoundError) else "it is damaged or no image"
        raise InputError(f"{path} cannot be read: {reason}") from error
    height, width = size
    scale = max(height / image.height, width / image.width)
    covering = [max(height, int(image.height * scale)), max(width, int(image.width * scale))]
    cropped = functional.center_crop(functional.resize(image, covering), [height, width])
    return functional.pil_to_tensor(cropped).float()
