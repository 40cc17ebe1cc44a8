"""One image of a file: decoded to uint8, cropped at random or at its centre, resized. Runs in worker processes.

Decoding is torchvision's, straight to uint8 with the channels last in memory; what is not a sound JPEG goes through
Pillow. Every resizing is bilinear with antialiasing, on uint8, by torchvision: crop first, resize what is left.
"""

import math
from pathlib import Path

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
    """The image of a file, uint8 [3, H, W]; grey and CMYK images become RGB.

    Raises:
        DamagedImage: there is no such file, or it is no image or only a part of one.
    """
    from torchvision.io import ImageReadMode, decode_jpeg

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DamagedImage(str(error.strerror)) from error
    if content.startswith(_JPEG):
        try:
            return decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
        except RuntimeError:
            pass  # kinds of JPEG that only Pillow knows; what is damaged it refuses as well
    return _by_pillow(content)


def _by_pillow(content: bytes) -> Tensor:
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DamagedImage((str(error).splitlines() or [type(error).__name__])[0]) from error


def generator(key: int, position: int) -> np.random.Generator:
    """The random numbers of one image of an epoch: counter-based, so that no other image's draws come before.

    Args:
        key: 64 bits, of the epoch.
        position: place of the image in the epoch's order.
    """
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, position]))


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
    """A random part of an image [3, H, W] as uint8 [3, size, size]."""
    top, left, h, w = random_box(image.shape[1], image.shape[2], draws)
    return _resized(image[:, top : top + h, left : left + w], [size, size])


def shorter_side(size: int) -> int:
    """To what the shorter side of an image is brought before a centre crop of `size`: 256 for 224."""
    return max(size, size * 256 // 224)


def scaled(image: Tensor, size: int) -> Tensor:
    """The whole image [3, H, W] with `shorter_side(size)` pixels on its shorter side."""
    return _resized(image, [shorter_side(size)])


def centre_crop(image: Tensor, size: int) -> Tensor:
    """The centre of an image that `scaled` gave, uint8 [3, size, size]."""
    from torchvision.transforms.v2 import functional

    return functional.center_crop(image, [size, size])


def _resized(image: Tensor, size: list[int]) -> Tensor:
    from torchvision.transforms.v2 import functional

    # A part that lies as a whole image would takes 0.7 of the time to resize, and comes out with the channels last.
    whole = image[None].contiguous(memory_format=torch.channels_last)[0]
    return functional.resize(whole, size, antialias=True)
