"""Streamed image folders: the same batches however they are made, resumable, damaged files passed over."""

import dataclasses
import logging
import multiprocessing
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch

from fastfuse import data
from fastfuse.data import crops, imagefolder, pool, streaming
from fastfuse.data.share import Share
from fastfuse.errors import FastfuseError, InputError
from tests.data import jpegs

SIZE, BATCH = 16, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jpegs.write(tmp_path_factory.mktemp("images"))


@pytest.fixture
def load(folder):
    made = []

    def load(root=folder, *, workers=0, **options):
        made.append(data.load("imagenet", root=root, image_size=SIZE, workers=workers, **options))
        return made[-1]

    yield load
    for dataset in made:
        dataset.close()


def collect(dataset, *, seed=3, epoch=2, step=0, batch_size=BATCH, **form):
    batches = data.training_batches(dataset, batch_size=batch_size, **form)
    batches.start(seed=seed, epoch=epoch, step=step)
    found = []
    for number in range(step, batches.steps):
        batches.fetch(number)
        found.append(tuple(x.clone() for x in batches.draw(batches.count(number))))
    return found


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for mine, others in zip(ours, theirs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))


def test_the_number_of_workers_changes_nothing(load):
    alone = collect(load(workers=0))
    assert [len(labels) for _, labels in alone] == [5, 5, 5, 5, 3]
    for workers in (1, 2):
        assert_same(collect(load(workers=workers)), alone)


@pytest.mark.parametrize("form", [{}, {"replicas": 2}, {"parts": 2, "batch_size": 6}])
def test_the_shares_of_several_processes_are_the_whole(load, form):
    whole = collect(load(), **form)
    shares = [collect(load(), share=Share(rank, 2), **form) for rank in range(2)]
    for step, (images, labels) in enumerate(whole):
        parts, replicas = form.get("parts", 1), form.get("replicas", 1)
        rows = [torch.arange(len(images)).view(parts, -1)[:, Share(r, 2).rows(len(images) // parts)] for r in range(2)]
        for own, (own_images, own_labels) in zip(rows, (share[step] for share in shares), strict=True):
            assert torch.equal(own_images, images[own.flatten()])
            assert torch.equal(own_labels, labels.view(replicas, -1)[:, own.flatten()].view(own_labels.shape))


def test_replicas_have_the_batches_of_their_own_seeds(load):
    together = collect(load(), seed=1, replicas=2)
    for r in range(2):
        for (images, labels), (own, own_labels) in zip(together, collect(load(), seed=1 + r), strict=True):
            assert torch.equal(images[:, 3 * r : 3 * r + 3], own) and torch.equal(labels[r], own_labels)


def test_every_image_is_shown_once_an_epoch_with_its_label(load):
    dataset = load()
    rows = []
    dataset.train.source.pool.function = lambda request: rows.append(request) or _blank(request)
    collect(dataset)
    shown = np.concatenate([request.rows[:, 0] for request in rows])
    assert sorted(shown) == list(range(23))
    following = np.concatenate([request.rows for request in rows])
    assert (following[:-1, 1] == shown[1:]).all(), "what takes an image's place is the next one of the epoch"
    labels = torch.cat([labels for _, labels in collect(load())])
    assert torch.equal(labels, dataset.train.labels[torch.from_numpy(shown)])


def _blank(request):
    count = len(request.rows)
    return torch.zeros(count, SIZE, SIZE, 3, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64), []


def test_pixels_are_the_crop_of_the_position_mirrored_and_normalised(load):
    dataset = load()
    order, _, flips = data.epoch_plan(23, seed=3, epoch=2, padding=0, flip=True, device="cpu")
    images = torch.cat([images for images, _ in collect(dataset)])
    table = dataset.train.source.tables["train"]
    from fastfuse.data.augment import mixed_seed

    assert flips.any() and not flips.all()
    for position in range(23):
        image = crops.read(table.path(int(order[position])))
        part = crops.random_crop(image, SIZE, crops.generator(mixed_seed(3, 2), position))
        wanted = part.permute(2, 0, 1).double() / 255
        wanted = wanted.flip(2) if flips[position] else wanted
        wanted = (wanted - dataset.mean.double()[:, None, None]) / dataset.std.double()[:, None, None]
        torch.testing.assert_close(images[position].double(), wanted, rtol=1e-6, atol=1e-6)


def test_epochs_and_seeds_differ_and_mirrors_can_be_off(load):
    first = collect(load())
    for other in ({"epoch": 3}, {"seed": 4}):
        assert not torch.equal(collect(load(), **other)[0][0], first[0][0])
    without = collect(load(flip=False))
    mirrored = [
        torch.equal(a, b.flip(3)) for (x, _), (y, _) in zip(first, without, strict=True) for a, b in _pairs(x, y)
    ]
    same = [torch.equal(a, b) for (x, _), (y, _) in zip(first, without, strict=True) for a, b in _pairs(x, y)]
    assert any(mirrored) and any(same) and all(a or b for a, b in zip(mirrored, same, strict=True))


def _pairs(x, y):
    return zip(x.split(1), y.split(1), strict=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_where_it_was(load, workers):
    whole = collect(load())
    for step in (1, 4):
        assert_same(collect(load(workers=workers), step=step), whole[step:])


def test_what_was_shown_is_not_decoded_again(load, monkeypatch):
    read, original = [], crops.read
    monkeypatch.setattr(crops, "read", lambda path: read.append(path) or original(path))
    collect(load(), step=3)
    assert len(read) == 23 - 3 * BATCH


def test_the_batch_lies_at_one_address_and_draw_reads_nothing_else(load):
    batches = data.training_batches(load(workers=1), batch_size=BATCH)
    batches.start(seed=0, epoch=0)
    places = set()
    for step in range(batches.steps):
        batches.fetch(step)
        places.add((batches.staging.images.data_ptr(), batches.staging.labels.data_ptr()))
        images, _ = batches.draw(batches.count(step))
        batches.staging.images.zero_()  # what was drawn is a copy of its own
        again, _ = batches.draw(batches.count(step))
        assert not torch.equal(images, again) and torch.equal(again[0, 0], again[0, 0, :1, :1].expand(SIZE, SIZE))
    assert len(places) == 1 and int(batches.step) == 2 * batches.steps
    with pytest.raises(RuntimeError, match="batch 5 is next, not 1"):
        batches.fetch(1)


def test_evaluation_shows_centre_crops_in_order(load):
    dataset = load(workers=1)
    batches = data.evaluation_batches(dataset.test, mean=dataset.mean, std=dataset.std, batch_size=3)
    assert batches.counts == [3, 3, 1]
    for _ in range(2):
        batches.start()
        found = []
        for step, count in enumerate(batches.counts):
            batches.fetch(step)
            found.append(batches.draw(count))
        images, labels = (torch.cat(x) for x in zip(*found, strict=True))
        assert labels.tolist() == [0, 0, 0, 1, 1, 2, 2]
        for row in range(7):
            path = dataset.test.source.tables["test"].path(row)
            image = crops.centre_crop(crops.scaled(crops.read(path), SIZE), SIZE).permute(2, 0, 1)
            wanted = (image.double() / 255 - dataset.mean[:, None, None]) / dataset.std[:, None, None]
            torch.testing.assert_close(images[row].double(), wanted, rtol=1e-6, atol=1e-6)


def test_reading_one_split_ends_reading_another(load):
    dataset = load()
    batches = data.training_batches(dataset, batch_size=BATCH)
    batches.start(seed=0, epoch=0)
    data.evaluation_batches(dataset.test, mean=dataset.mean, std=dataset.std, batch_size=3).start()
    with pytest.raises(RuntimeError, match="start again"):
        batches.fetch(0)


@pytest.mark.parametrize("workers", [0, 1])
def test_no_random_number_of_the_run_is_drawn(load, workers):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    collect(load(workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0]) and np.array_equal(np.random.get_state()[1], before[1])


def test_validation_images_are_drawn_from_the_list_of_files(load):
    dataset, whole = load(val_fraction=0.3, seed=1), load()
    assert (len(dataset.train), len(dataset.validation)) == (23 - 7, 7)
    together = torch.cat((dataset.train.rows, dataset.validation.rows))
    assert sorted(together.tolist()) == list(range(23)) and dataset.fingerprint() != whole.fingerprint()
    for split in (dataset.train, dataset.validation):
        assert torch.equal(split.labels, whole.train.labels[split.rows])
    labels = torch.cat([labels for _, labels in collect(dataset)])
    assert torch.equal(labels.sort().values, dataset.train.labels.sort().values)


def test_the_fingerprint_is_that_of_names_and_sizes(load, tmp_path):
    known = load().fingerprint()
    copy = shutil.copytree(load().train.source.tables["train"].root.parent, tmp_path / "copy")
    assert load(copy).fingerprint() == known
    os.truncate(copy / "train/ant/0.jpg", 500)
    changed = load(copy).fingerprint()
    (copy / "train/ant/0.jpg").rename(copy / "train/ant/z.jpg")
    assert len({known, changed, load(copy).fingerprint()}) == 3


@pytest.fixture
def damaged(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "damaged")
    whole = (copy / "train/ant/3.jpg").read_bytes()
    (copy / "train/ant/3.jpg").write_bytes(whole[: len(whole) // 2])
    return copy


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_counted_and_passed_over(load, damaged, workers, monkeypatch, caplog):
    monkeypatch.setattr(imagefolder, "MOST_DAMAGED", 0.05)
    dataset = load(damaged, workers=workers)
    order = data.epoch_plan(23, seed=3, epoch=2, padding=0, flip=True, device="cpu").order.tolist()
    position = order.index(3)
    with caplog.at_level(logging.WARNING):
        batches, again = collect(dataset), collect(dataset, epoch=3)
    assert caplog.text.count("ant/3.jpg (no image, or only a part of one), number 1 among the files below") == 1
    assert len(again) == 5
    for other, (place, row) in {n: (n, order[n]) for n in range(23) if n != position}.items():
        assert int(torch.cat([labels for _, labels in batches])[other]) == int(dataset.train.labels[row]), place
    following = order[(position + 1) % 23]
    assert int(torch.cat([labels for _, labels in batches])[position]) == int(dataset.train.labels[following])


def test_too_many_damaged_files_are_an_error_that_names_them(load, damaged, monkeypatch):
    monkeypatch.setattr(imagefolder, "MOST_DAMAGED", 0.05)
    (damaged / "train/bee/1.jpg").write_bytes(b"no image")
    said = r"2 of the 23 files below .*train are damaged \(.*ant/3\.jpg, .*bee/1\.jpg; the last: .+\): remove"
    with pytest.raises(InputError, match=said):
        collect(load(damaged, workers=1))


def test_a_disk_that_gives_nothing_is_an_error(load, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(imagefolder, "MOST_DAMAGED", 1.0)
    copy = shutil.copytree(folder, tmp_path / "gone")
    dataset = load(copy)
    shutil.rmtree(copy)
    with pytest.raises(
        FastfuseError, match=r"9 files in a row cannot be read, as .* \(No such file or directory\): check the disk"
    ):
        collect(dataset)


def test_workers_leave_ctrl_c_to_the_trainer_and_end_when_told(load):
    dataset = load(workers=2)
    batches = data.training_batches(dataset, batch_size=BATCH)
    batches.start(seed=0, epoch=0)
    batches.fetch(0)
    children = multiprocessing.active_children()
    assert len(children) == 2
    for child in children:
        os.kill(child.pid, signal.SIGINT)
    for step in range(1, batches.steps):
        batches.fetch(step)
    assert all(child.is_alive() for child in children)
    dataset.close()
    for child in children:
        child.join(300)
        assert not child.is_alive()


def test_a_lost_worker_is_one_line(load):
    batches = data.training_batches(load(workers=1), batch_size=1)
    batches.start(seed=0, epoch=0)
    batches.fetch(0)
    said = r"^a process that decodes images was lost \(.*--workers; .*--resume$"
    with pytest.raises(FastfuseError, match=said), pool.lost_workers_explained():
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        time.sleep(300)  # torch raises wherever this process is when it hears of it
    with pytest.raises(RuntimeError, match="something else"), pool.lost_workers_explained():
        raise RuntimeError("something else")


@pytest.mark.parametrize(("workers", "shared"), [(0, False), (1, True)])
def test_what_a_worker_decodes_lies_in_shared_memory_from_the_start(load, workers, shared):
    dataset = load(workers=workers)
    decoder, source = dataset.train.source.pool.function, dataset.train.source
    source.pool.function = lambda request: [x.is_shared() for x in decoder(request)[:2]]
    request = streaming.Request("test", dataset.test.candidates(np.arange(3), np.arange(7)))
    assert list(source.pool.begin([request])) == [[shared, shared]]


def test_shared_memory_that_has_run_out_is_one_line(load, monkeypatch):
    def full(size, *, device):
        raise RuntimeError(f"unable to allocate shared memory(shm) for file </torch_{size}>: No space left on device")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    said = (
        r"^a process that decodes images was lost \(RuntimeError: unable to allocate .* left on device\): .*--resume$"
    )
    with pytest.raises(FastfuseError, match=said), pool.lost_workers_explained():
        collect(load(workers=1))


def test_the_default_leaves_a_core_to_the_trainer(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for cores, processes, workers in ((1, 1, 1), (2, 1, 1), (8, 1, 7), (64, 1, 16), (64, 8, 7)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        assert pool.default_workers() == workers


def test_an_image_folder_is_streamed_when_asked_or_when_it_is_large(folder, monkeypatch):
    form = {"root": folder, "image_size": SIZE}
    assert not isinstance(data.load("imagefolder", **form), data.StreamedDataset)
    streamed = data.load("imagefolder", stream=True, **form)
    assert isinstance(streamed, data.StreamedDataset) and streamed.image_size == (SIZE, SIZE)
    monkeypatch.setattr(streaming, "DEVICE_LIMIT", 30 * SIZE * SIZE * 3 - 1)
    assert isinstance(data.load("imagefolder", **form), data.StreamedDataset)
    assert not isinstance(data.load("imagefolder", stream=False, **form), data.StreamedDataset)
    monkeypatch.setattr(streaming, "DEVICE_LIMIT", 30 * SIZE * SIZE * 3)
    assert not isinstance(data.load("imagefolder", **form), data.StreamedDataset)


def test_imagenet_has_its_own_size_and_statistics(folder):
    dataset = data.load("imagenet", root=folder)
    assert dataset.image_size == (224, 224) and dataset.class_names == ("ant", "bee", "cow")
    torch.testing.assert_close(dataset.mean, torch.tensor([0.485, 0.456, 0.406]))
    torch.testing.assert_close(dataset.std, torch.tensor([0.229, 0.224, 0.225]))
    assert dataset.validation is None and (len(dataset.train), len(dataset.test)) == (23, 7)
    moved = dataset.to("cpu")
    assert dataclasses.asdict(moved).keys() == dataclasses.asdict(dataset).keys() and moved.train is dataset.train


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("imagenet", {}, "--data imagenet needs --data-root, the folder of train/ and val/"),
        ("imagenet", {"root": "nowhere"}, "train cannot be read as a folder of classes"),
        ("imagenet", {"root": "here", "stream": False}, "imagenet is always streamed: leave --no-stream out"),
        ("imagenet", {"root": "here", "padding": 4}, "cropped at random without --crop-padding: leave 4 out"),
        ("imagenet", {"root": "here", "image_size": 0}, "--image-size must be at least 1"),
        ("digits", {"stream": True}, "digits lives on the device: leave --stream out"),
        ("digits", {"cache": "c"}, "digits is not streamed and takes no --data-cache"),
        ("imagefolder", {"root": "here", "image_size": 8, "cache": "c"}, "imagefolder is not streamed.*give --stream"),
    ],
)
def test_what_does_not_fit_is_said(folder, name, options, said):
    if options.get("root") == "here":
        options = options | {"root": folder}
    with pytest.raises(InputError, match=said):
        data.load(name, **options)
