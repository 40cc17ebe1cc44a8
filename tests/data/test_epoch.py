"""The draws of an epoch and the batches made from them: complete, reproducible, resumable at any step."""

import pytest
import torch

from fastfuse import data
from fastfuse.data.dataset import Dataset, Split
from fastfuse.errors import InputError

COUNT = 23


def make(flip=True, padding=2):
    """A set whose labels are the image numbers, so that a batch shows which images it holds."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (COUNT, 6, 5, 3), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(COUNT))
    names = tuple(map(str, range(COUNT)))
    return Dataset("toy", split, split, None, names, torch.full((3,), 0.5), torch.full((3,), 0.25), padding, flip)


def collect(dataset=None, seed=0, epoch=0, step=0, **form):
    batches = data.TrainingBatches(dataset or make(), **{"batch_size": 5, **form})
    batches.start(seed=seed, epoch=epoch, step=step)
    return [batches.draw(batches.count(s)) for s in range(step, batches.steps)]


def plan(n=4000, **options):
    return data.epoch_plan(n, **{"seed": 0, "epoch": 0, "padding": 4, "flip": True, "device": "cpu", **options})


def test_each_image_once_and_last_batch_smaller():
    batches = collect()
    assert [len(labels) for _, labels in batches] == [5, 5, 5, 5, 3]
    assert torch.cat([labels for _, labels in batches]).sort().values.tolist() == list(range(COUNT))
    assert data.steps_per_epoch(COUNT, 5) == 5


@pytest.mark.parametrize(
    ("n", "batch_size", "steps"),
    [(10, 5, 2), (11, 5, 3), (1, 128, 1), (128, 128, 1)],
    ids=["even", "a last batch of one image is kept", "set smaller than a batch", "one full batch"],
)
def test_steps_per_epoch(n, batch_size, steps):
    assert data.steps_per_epoch(n, batch_size) == steps


def test_images_belong_to_their_labels():
    """Without padding and mirror a batch is the normalised images in the order of its labels."""
    dataset = make(flip=False, padding=0)
    for images, labels in collect(dataset):
        wanted = (dataset.train.images[labels].permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
        torch.testing.assert_close(images.double(), wanted, rtol=1e-6, atol=1e-6)


def test_order_offsets_and_flips_cover_their_range_evenly():
    draws = plan()
    assert torch.equal(draws.order.sort().values, torch.arange(4000))
    for axis in range(2):
        counts = draws.offsets[:, axis].bincount(minlength=9)
        assert counts.shape == (9,)
        # 4000 / 9 = 444 of each with deviation 20: five deviations either side.
        assert (counts - 4000 / 9).abs().max() < 100
    assert abs(int(draws.flips.sum()) - 2000) < 160  # deviation 32
    rows, columns = draws.offsets.double().unbind(1)
    assert abs(float(torch.corrcoef(torch.stack((rows, columns, draws.flips.double())))[0, 1])) < 0.08
    assert (draws.order.dtype, draws.offsets.dtype, draws.flips.dtype) == (torch.int64, torch.int64, torch.bool)


def test_switching_flip_off_leaves_the_other_draws():
    with_flip, without = plan(), plan(flip=False)
    assert not without.flips.any()
    assert torch.equal(with_flip.order, without.order)
    assert torch.equal(with_flip.offsets, without.offsets)


def test_seed_and_epoch_decide_everything():
    first = plan(seed=1, epoch=2)
    torch.manual_seed(99)  # the global generator plays no part
    again = plan(seed=1, epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param((0, 0), (0, 1), id="next epoch"),
        pytest.param((1, 0), (0, 1), id="sum of seed and epoch equal"),
        pytest.param((1, 23), (12, 3), id="digits written together equal"),
        pytest.param((0, 0), (2**32, 0), id="differ in the upper half only"),
        pytest.param((-1, 0), (1, 0), id="negative seed"),
    ],
)
def test_pairs_of_seed_and_epoch_do_not_collide(one, other):
    first, second = (plan(seed=seed, epoch=epoch) for seed, epoch in (one, other))
    assert (first.order == second.order).float().mean() < 0.01
    assert not torch.equal(first.offsets, second.offsets)


def test_what_a_captured_step_reads_stays_at_its_address():
    batches = data.TrainingBatches(make(), batch_size=5)
    before = [x.data_ptr() for x in (batches._numbers, batches._flips, batches.step)]
    batches.start(seed=1, epoch=2)
    batches.draw(5)
    batches.start(seed=1, epoch=3)
    assert [x.data_ptr() for x in (batches._numbers, batches._flips, batches.step)] == before


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    collect()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5])
def test_start_step_gives_the_tail_bit_for_bit(start):
    whole, tail = collect(seed=7, epoch=3), collect(seed=7, epoch=3, step=start)
    assert len(tail) == 5 - start
    for (images, labels), (tail_images, tail_labels) in zip(whole[start:], tail, strict=True):
        assert torch.equal(images, tail_images)
        assert torch.equal(labels, tail_labels)


@pytest.mark.parametrize("start", [-1, 6])
def test_start_step_outside_the_epoch(start):
    with pytest.raises(InputError, match=rf"start step must be in 0\.\.5, .* got {start}"):
        data.TrainingBatches(make(), batch_size=5).start(seed=0, epoch=0, step=start)


@pytest.mark.parametrize("batch_size", [0, -3])
def test_batch_size_below_one_is_refused_before_iteration(batch_size):
    dataset = make()
    calls = [
        lambda: data.steps_per_epoch(10, batch_size),
        lambda: data.TrainingBatches(dataset, batch_size=batch_size),
        lambda: data.EvaluationBatches(dataset.test, mean=dataset.mean, std=dataset.std, batch_size=batch_size),
    ]
    for call in calls:
        with pytest.raises(InputError, match=f"batch size must be at least 1, got {batch_size}"):
            call()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_evaluation_shows_all_images_in_order(memory_format):
    dataset = make()
    options = {"mean": dataset.mean, "std": dataset.std, "batch_size": 10, "memory_format": memory_format}
    source = data.EvaluationBatches(dataset.test, dtype=torch.float64, **options)
    for _ in range(2):  # a second round is the first again
        source.start()
        batches = [source.draw(count) for count in source.counts]
    assert [len(labels) for _, labels in batches] == [10, 10, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(COUNT))
    wanted = (dataset.test.images.permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), wanted)
    assert all(images.is_contiguous(memory_format=memory_format) for images, _ in batches)


def test_training_batches_take_type_and_layout():
    images, labels = collect(dtype=torch.bfloat16, memory_format=torch.channels_last)[0]
    assert images.dtype == torch.bfloat16
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
