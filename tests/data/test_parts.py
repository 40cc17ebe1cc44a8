"""Training images divided once into equal parts, of which every batch takes as many: fixed, complete, resumable."""

import pytest
import torch

from fastfuse import data
from fastfuse.errors import InputError
from tests.data.test_epoch import COUNT, collect, make


def halves(batches):
    """The images of the first and of the second half of every batch."""
    pairs = [labels.chunk(2) for _, labels in batches]
    return [torch.cat(half).tolist() for half in zip(*pairs, strict=True)]


def test_halves_are_disjoint_complete_and_the_same_in_every_epoch():
    epochs = [halves(collect(batch_size=4, parts=2, epoch=epoch)) for epoch in range(3)]
    first, second = (sorted(half) for half in epochs[0])
    assert len(set(first) | set(second)) == len(first) + len(second) == COUNT - 1
    assert len(first) == len(second)
    for train, validation in epochs[1:]:
        assert (sorted(train), sorted(validation)) == (first, second)
    assert epochs[0] != epochs[1], "each epoch has an order of its own"


def test_the_seed_draws_the_halves():
    halves_of = [set(halves(collect(batch_size=4, parts=2, seed=seed))[0]) for seed in range(4)]
    assert all(a != b for i, a in enumerate(halves_of) for b in halves_of[:i])
    # 11 of 22 images: of independent halves 5.5 are shared on average, and hardly ever all but one.
    assert all(len(a & b) < 10 for i, a in enumerate(halves_of) for b in halves_of[:i])


def test_the_last_batch_has_halves_too_and_the_odd_image_is_left_out():
    batches = collect(batch_size=6, parts=2)
    assert [len(labels) for _, labels in batches] == [6, 6, 6, 4]
    train, validation = halves(batches)
    assert len(train) == len(validation) == 11 and not set(train) & set(validation)


def test_three_parts_lie_in_their_order():
    batches = [[labels.chunk(3) for _, labels in collect(batch_size=9, parts=3, epoch=e)] for e in (0, 5)]
    members = [[set(torch.cat(part).tolist()) for part in zip(*epoch, strict=True)] for epoch in batches]
    assert members[0] == members[1]
    assert [len(part) for part in members[0]] == [7, 7, 7]


def test_images_belong_to_their_labels_and_crops_are_drawn_for_each():
    dataset = make(flip=False, padding=0)
    for images, labels in collect(dataset, batch_size=4, parts=2):
        wanted = (dataset.train.images[labels].permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
        torch.testing.assert_close(images.double(), wanted, rtol=1e-6, atol=1e-6)


def test_one_part_is_what_it_was():
    """Bit for bit the plan of the epoch, in its order."""
    for (images, labels), (same, again) in zip(collect(seed=3), collect(seed=3, parts=1), strict=True):
        assert torch.equal(images, same) and torch.equal(labels, again)
    order = data.epoch_plan(COUNT, seed=3, epoch=0, padding=2, flip=True, device="cpu").order
    assert torch.equal(torch.cat([labels for _, labels in collect(seed=3, parts=1)]), order)


@pytest.mark.parametrize("start", [1, 4, 6])
def test_start_step_gives_the_tail_bit_for_bit(start):
    whole, tail = (collect(batch_size=4, parts=2, seed=7, epoch=3, step=step) for step in (0, start))
    assert len(tail) == 6 - start
    for (images, labels), (tail_images, tail_labels) in zip(whole[start:], tail, strict=True):
        assert torch.equal(images, tail_images) and torch.equal(labels, tail_labels)


def test_replicas_have_the_halves_of_their_own_seeds():
    together = collect(batch_size=4, parts=2, seed=1, replicas=2)
    for r in range(2):
        alone = collect(batch_size=4, parts=2, seed=1 + r)
        for (images, labels), (own_images, own) in zip(together, alone, strict=True):
            assert torch.equal(labels[r], own)
            assert torch.equal(images[:, 3 * r : 3 * r + 3], own_images)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"batch_size": 5, "parts": 2}, "batch size 5 must be a multiple of 2.*--batch-size"),
        ({"batch_size": 4, "parts": 0}, "23 training images cannot be divided into 0 parts"),
        ({"batch_size": 24, "parts": 24}, "23 training images cannot be divided into 24 parts: give 1 to 23"),
    ],
)
def test_what_cannot_be_divided_is_refused(form, said):
    with pytest.raises(InputError, match=said):
        data.TrainingBatches(make(), **form)
