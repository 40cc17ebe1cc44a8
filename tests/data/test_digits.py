"""The digits that come with the package: counts, split, scaling from first principles, and their credit."""

from importlib import resources

import numpy as np
import pytest
import torch

from fastfuse import data
from fastfuse.data import digits
from fastfuse.data.dataset import channel_statistics


@pytest.fixture(scope="module")
def dataset():
    return data.load("digits")


def test_shapes_types_and_defaults(dataset):
    assert (len(dataset.train), len(dataset.test), dataset.validation) == (1437, 360, None)
    for split in (dataset.train, dataset.test):
        assert split.images.shape == (len(split), 16, 16, 3)
        assert split.labels.shape == (len(split),)
        assert (split.images.dtype, split.labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(split.images[..., 0], split.images[..., 2])
    assert (dataset.name, dataset.padding, dataset.flip) == ("digits", 2, False)
    assert dataset.class_names == tuple("0123456789")
    assert dataset.num_classes == 10
    assert (dataset.train.images.min(), dataset.train.images.max()) == (0, 255)


def test_split_is_stratified_and_disjoint(dataset):
    train, test = (split.labels.bincount(minlength=10) for split in (dataset.train, dataset.test))
    share = test / (train + test)
    assert (share - 360 / 1797).abs().max() * (train + test).max() <= 1  # within one image per class
    images = torch.cat((dataset.train.images, dataset.test.images)).flatten(1)
    assert len(images.unique(dim=0)) == 1797  # all different, so none is in both splits


def test_statistics_are_those_of_the_training_images(dataset):
    pixels = dataset.train.images.double() / 255
    torch.testing.assert_close(dataset.mean.double(), pixels.mean((0, 1, 2)), rtol=1e-6, atol=0)
    torch.testing.assert_close(dataset.std.double(), pixels.std((0, 1, 2), correction=0), rtol=1e-6, atol=0)


def test_loading_twice_gives_the_same_bytes(dataset):
    again = data.load("digits")
    assert torch.equal(again.train.images, dataset.train.images)
    assert torch.equal(again.test.labels, dataset.test.labels)


def test_enlarge_is_bilinear_interpolation():
    """Against torch's float64 interpolation with half-pixel centres, rounded; every pair of neighbours occurs."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randint(0, 17, (200, 8, 8), generator=generator, dtype=torch.uint8)
    wanted = torch.nn.functional.interpolate(small[:, None].double(), scale_factor=2, mode="bilinear")[:, 0]
    wanted = (wanted * 255 / 16 + 0.5).floor()
    assert torch.equal(digits.enlarge(small).double(), wanted)


@pytest.mark.parametrize(("value", "byte"), [(0, 0), (8, 128), (16, 255)])
def test_enlarge_keeps_flat_images_flat(value, byte):
    flat = torch.full((1, 8, 8), value, dtype=torch.uint8)
    assert torch.equal(digits.enlarge(flat), torch.full((1, 16, 16), byte, dtype=torch.uint8))


def test_credit_stands_in_file_and_docstring():
    path = resources.files("fastfuse.data").joinpath("digits.npz")
    with path.open("rb") as file, np.load(file) as arrays:
        meta = str(arrays["meta"])
        assert arrays["images"].max() == 16
        assert arrays["images"].shape == (1797, 8, 8)
    for text in (meta, digits.__doc__):
        for word in ("Alpaydin", "Kaynak", "Optical Recognition of Handwritten Digits", "CC BY 4.0", "10.24432/C50P49"):
            assert word in text
    assert path.stat().st_size < 100_000


def test_flat_channel_has_deviation_one():
    images = torch.randint(0, 256, (4, 5, 5, 3), dtype=torch.uint8)
    images[..., 1] = 51
    mean, std = channel_statistics(images)
    torch.testing.assert_close(mean[1], torch.tensor(0.2))
    assert std[1] == 1
    assert 0 < std[0] < 1
