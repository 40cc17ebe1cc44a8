"""Choosing a data set by name: options that apply to all of them, and the validation split."""

import pytest
import torch

from fastfuse import data
from fastfuse.errors import InputError


def test_unknown_name_suggests_near_ones():
    with pytest.raises(InputError, match="unknown data set 'cifar-10': did you mean cifar10"):
        data.load("cifar-10")


def test_padding_and_flip_override_the_defaults():
    dataset = data.load("digits", padding=0, flip=True)
    assert (dataset.padding, dataset.flip) == (0, True)


@pytest.mark.parametrize("padding", [-1, 16])
def test_padding_that_does_not_fit_names_the_option(padding):
    with pytest.raises(InputError, match=rf"crop padding {padding} does not fit the 16x16 .* --crop-padding 0\.\.15"):
        data.load("digits", padding=padding)


def test_file_for_a_set_without_one():
    with pytest.raises(InputError, match=r"data set digits takes no file, got 'x\.npz'"):
        data.load("digits", path="x.npz")


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_val_fraction_out_of_range(fraction):
    with pytest.raises(InputError, match="val_fraction must be at least 0 and below 1"):
        data.load("digits", val_fraction=fraction)


def test_validation_split_is_stratified_and_disjoint():
    whole = data.load("digits")
    parted = data.load("digits", val_fraction=0.1, seed=3)
    counts = whole.train.labels.bincount()
    assert ((parted.validation.labels.bincount() - 0.1 * counts).abs() <= 0.5).all()
    assert len(parted.train) + len(parted.validation) == 1437
    together = torch.cat((parted.train.images, parted.validation.images)).flatten(1)
    # The digits are all different, so equal sets of rows mean that nothing was lost or doubled.
    assert torch.equal(together.unique(dim=0), whole.train.images.flatten(1).unique(dim=0))
    labels = {image.numpy().tobytes(): int(label) for image, label in zip(*vars(whole.train).values(), strict=True)}
    for image, label in zip(parted.validation.images, parted.validation.labels.tolist(), strict=True):
        assert labels[image.numpy().tobytes()] == label
    assert torch.equal(parted.test.images, whole.test.images)
    assert torch.equal(parted.mean, whole.mean)


def test_validation_split_depends_on_the_seed_alone():
    first, again, other = (data.load("digits", val_fraction=0.2, seed=seed).validation.images for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_class_left_without_training_images():
    with pytest.raises(InputError, match=r"would leave class 0 \('0'\) .* without training images"):
        data.load("digits", val_fraction=0.999)


def test_fraction_that_takes_nothing():
    with pytest.raises(InputError, match=r"takes no image of any class .* raise --val-fraction"):
        data.load("digits", val_fraction=0.001)


def test_to_moves_every_tensor():
    moved = data.load("digits", val_fraction=0.1).to("meta")
    tensors = [moved.mean, moved.std]
    for split in (moved.train, moved.test, moved.validation):
        tensors += [split.images, split.labels]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert data.load("digits").to("meta").validation is None
