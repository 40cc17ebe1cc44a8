"""The data set that comes with the package: 1,797 handwritten digits, for first runs and tests without a download.

Source and credit: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, doi 10.24432/C50P49, licensed CC BY 4.0. `digits.npz` holds the 1,797 images of the original test
file as scikit-learn 1.9.1 (`load_digits`) ships them, values unchanged: `images` uint8 [1797, 8, 8] of 0 .. 16,
`labels` uint8 [1797], `is_test` bool [1797] (360 images, scikit-learn's `train_test_split` stratified by label,
random_state 0) and `meta`, this credit. Changes made here, on loading: scaled to 16x16 and to values 0 .. 255, three
equal channels.
"""

from importlib import resources

import numpy as np
import torch
from torch import Tensor

from fastfuse.data.dataset import Dataset, Split, channel_statistics


def load() -> Dataset:
    """The digits: 1,437 training and 360 test images [16, 16, 3], ten classes, crop padding 2, no mirroring."""
    with resources.files(__package__).joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        images = enlarge(torch.from_numpy(arrays["images"]))
        labels = torch.from_numpy(arrays["labels"]).long()
        is_test = torch.from_numpy(arrays["is_test"])
    images = images[..., None].repeat(1, 1, 1, 3)
    train = Split(images[~is_test], labels[~is_test])
    mean, std = channel_statistics(train.images)
    return Dataset(
        name="digits",
        train=train,
        test=Split(images[is_test], labels[is_test]),
        validation=None,
        class_names=tuple("0123456789"),
        mean=mean,
        std=std,
        padding=2,
        flip=False,
    )


def enlarge(images: Tensor) -> Tensor:
    """Double both sides of uint8 [N, H, W] with values 0 .. 16 and stretch the values to 0 .. 255.

    Bilinear with half-pixel centres, the border repeated. In integers, so that every machine sees the same bytes:
    doubling twice gives 16 times the interpolated value, 0 .. 256, which is rounded to 0 .. 255, halves upwards.
    """
    sixteenfold = _double(_double(images.int(), 1), 2)
    return ((sixteenfold * 255 + 128) // 256).to(torch.uint8)


def _double(images: Tensor, dim: int) -> Tensor:
    """Four times the linear interpolation at the quarter points of each pixel along `dim`: 3 own + 1 neighbour."""
    size = images.shape[dim]
    position = torch.arange(size)
    before = images.index_select(dim, (position - 1).clamp(min=0))
    after = images.index_select(dim, (position + 1).clamp(max=size - 1))
    halves = torch.stack((before + 3 * images, 3 * images + after), dim=dim + 1)
    return halves.flatten(dim, dim + 1)
