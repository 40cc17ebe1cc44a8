"""Folders of small seeded JPEG files."""

from pathlib import Path

import numpy as np
import pytest

Image = pytest.importorskip("PIL.Image", reason="no Pillow, which comes with torchvision")

COUNTS = {"train/ant": 9, "train/bee": 8, "train/cow": 6, "val/ant": 3, "val/bee": 2, "val/cow": 2}


def picture(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    """Coarse random patches, so that crops of different places differ and JPEG keeps them."""
    coarse = generator.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def write(root: Path, counts: dict[str, int] = COUNTS, size: tuple[int, int] | None = None) -> Path:
    """JPEG files by split/class, of `size` or of sizes of their own between 30 and 60."""
    generator = np.random.default_rng(0)
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            height, width = size or generator.integers(30, 61, 2).tolist()
            picture(generator, height, width).save(root / folder / f"{i}.jpg", quality=90)
    return root
