"""One image of a file: decoded to uint8, cropped at random or at its centre, resized. Runs in worker processes.

Images are uint8 [H, W, 3]. JPEG is decoded by simplejpeg where it is installed, else by torchvision, to the same
pixels. What is not a sound JPEG goes through Pillow. Every resizing is bilinear with antialiasing, on uint8, by torch,
the same on every CPU: crop first, resize what is left.
"""

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Szegedy et al., 2015, as torchvision's RandomResizedCrop has it: share of the area, width over height, attempts.
AREA = (0.08, 1.0)
ASPECT = (3 / 4, 4 / 3)
ATTEMPTS = 10
_JPEG = b"\xff\xd8\xff"


class DamagedImage(Exception):
    """A file that cannot be read as an image."""


def read(path: str | Path) -> Tensor:
    """The image of a file, uint8 [H, W, 3]; grey and CMYK images become RGB.

    Raises:
        DamagedImage: there is no such file, or it is no image or only a part of one.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            content = bytearray(file.read())  # a Tensor's bytes must be writable
    except OSError as error:
        raise DamagedImage(str(error.strerror)) from error
    return decoded(content)


def decoded(content: bytearray) -> Tensor:
    """The image of a file's bytes, see `read`."""
    if content.startswith(_JPEG):
        if (image := _by_simplejpeg(content)) is not None:
            return image
        try:
            return _by_torchvision(content)
        except (RuntimeError, AttributeError):
            pass  # kinds of JPEG that only Pillow knows, or no decoder built in; what is damaged it refuses as well
    return _by_pillow(content)


def _by_simplejpeg(content: bytearray) -> Tensor | None:
    """A JPEG file as torchvision decodes it, in 0.9 of the time; None: torchvision is to be asked."""
    if (simplejpeg := _simplejpeg()) is None:
        return None
    try:
        if simplejpeg.decode_jpeg_header(content)[2] not in ("YCbCr", "Gray"):
            return None  # it mixes RGB from CMYK in another way
        return torch.from_numpy(simplejpeg.decode_jpeg(content))
    except ValueError:  # also about what torchvision's decoder passes over
        return None


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def _by_torchvision(content: bytearray) -> Tensor:
    """A JPEG file decoded straight to uint8, which is most of the time that an image takes."""
    from torchvision.io import ImageReadMode  # loads the operator

    # Not through torchvision.io.decode_jpeg, which takes 40 us for a warning each time that TorchCodec will follow.
    decode = torch.ops.image.decode_jpeg
    return decode(torch.frombuffer(content, dtype=torch.uint8), ImageReadMode.RGB.value, False).permute(1, 2, 0)


def _by_pillow(content: bytearray) -> Tensor:
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except UnidentifiedImageError as error:  # which says where in memory
        raise DamagedImage("no image, or only a part of one") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DamagedImage((str(error).splitlines() or [type(error).__name__])[0]) from error


class _Key(np.random.bit_generator.ISeedSequence):
    """The key itself in the place of a seed: without one, Philox first asks the system for a seed it never uses."""

    def __init__(self, key: int) -> None:
        self.key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return np.array([self.key, 0], np.uint64)


def generator(key: int, position: int) -> np.random.Generator:
    """The random numbers of one image of an epoch: counter-based, so that no other image's draws come before.

    Args:
        key: 64 bits, of the epoch.
        position: place of the image in the epoch's order.
    """
    seed: Any = _Key(key)  # numpy's types know only its own
    return np.random.Generator(np.random.Philox(seed, counter=[0, 0, 0, position]))


def random_box(height: int, width: int, draws: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a part of an image of `height` x `width`: (top, left, height, width).

    Its area is a uniform share in `AREA`, the logarithm of its aspect uniform in that of `ASPECT`, its place uniform.
    After ten draws that do not fit, the largest part at the centre whose aspect is in `ASPECT`.
    """
    for _ in range(ATTEMPTS):
        area = height * width * draws.uniform(*AREA)
        aspect = math.exp(draws.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return int(draws.integers(height - h + 1)), int(draws.integers(width - w + 1)), h, w
    w = min(width, max(round(height * ASPECT[1]), 1))
    h = min(height, max(round(width / ASPECT[0]), 1))
    return (height - h) // 2, (width - w) // 2, h, w


def random_crop(image: Tensor, size: int, draws: np.random.Generator) -> Tensor:
    """A random part of an image [H, W, 3] as uint8 [size, size, 3]."""
    top, left, h, w = random_box(image.shape[0], image.shape[1], draws)
    return _resized(image[top : top + h, left : left + w], size, size)


def shorter_side(size: int) -> int:
    """To what the shorter side of an image is brought before a centre crop of `size`: 256 for 224."""
    return max(size, size * 256 // 224)


def scaled(image: Tensor, size: int) -> Tensor:
    """The whole image [H, W, 3] with `shorter_side(size)` pixels on its shorter side, as torchvision's `Resize`."""
    height, width = image.shape[:2]
    side = shorter_side(size)
    if height <= width:
        return _resized(image, side, int(side * width / height))
    return _resized(image, int(side * height / width), side)


def centre_crop(image: Tensor, size: int) -> Tensor:
    """The centre of an image that `scaled` gave, uint8 [size, size, 3], as torchvision's `CenterCrop`."""
    top, left = (round((extent - size) / 2) for extent in image.shape[:2])
    return image[top : top + size, left : left + size]


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    # A part that lies as a whole image would takes 0.7 of the time to resize; its kernel wants NCHW in shape alone.
    whole = image.contiguous()[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(whole, (height, width), mode="bilinear", antialias=True)
    return resized[0].permute(1, 2, 0)
