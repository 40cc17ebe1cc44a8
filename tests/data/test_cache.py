"""Images decoded once: the same pixels for evaluation, damage found, other files refused, nothing half-made."""

import fcntl
import logging
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch

from fastfuse import data
from fastfuse.data import cache as shared
from fastfuse.data import crops, filetable, imagefolder
from fastfuse.data.augment import mixed_seed
from fastfuse.errors import InputError
from tests.data import jpegs
from tests.data.test_streaming import SIZE, assert_same, collect


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jpegs.write(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A finished cache, to be copied."""
    path = tmp_path_factory.mktemp("cache") / "cache"
    load(folder, path)
    return path


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


def load(folder, cache=None, *, workers=0, **options):
    return data.load("imagenet", root=folder, image_size=SIZE, workers=workers, cache=cache, **options)


def evaluated(dataset):
    batches = data.evaluation_batches(dataset.test, mean=dataset.mean, std=dataset.std, batch_size=4)
    batches.start()
    found = []
    for step, count in enumerate(batches.counts):
        batches.fetch(step)
        found.append(batches.draw(count))
    return found


def test_an_evaluation_sees_the_same_pixels(folder, cache):
    assert_same(evaluated(load(folder, cache)), evaluated(load(folder)))


def test_training_crops_are_cut_from_the_smaller_image(folder, cache):
    dataset, plain = load(folder, cache), load(folder)
    images = torch.cat([images for images, _ in collect(dataset)])
    order, _, flips = data.epoch_plan(23, seed=3, epoch=2, padding=0, flip=True, device="cpu")
    assert not torch.equal(images, torch.cat([images for images, _ in collect(plain)]))
    for position, row in enumerate(order.tolist()):
        small = plain.train.source.tables["train"].scaled(row, SIZE)
        assert min(small.shape[:2]) == SIZE * 256 // 224
        part = crops.random_crop(small, SIZE, crops.generator(mixed_seed(3, 2), position))
        wanted = part.permute(2, 0, 1).double() / 255
        wanted = wanted.flip(2) if flips[position] else wanted
        wanted = (wanted - dataset.mean.double()[:, None, None]) / dataset.std.double()[:, None, None]
        torch.testing.assert_close(images[position].double(), wanted, rtol=1e-6, atol=1e-6)


def test_it_is_made_once_and_the_same_by_any_number_of_workers(folder, cache, tmp_path, monkeypatch):
    load(folder, tmp_path / "other", workers=2)
    for file in ("train-18.pixels", "test-18.pixels"):
        assert (tmp_path / "other" / file).read_bytes() == (cache / file).read_bytes()
    monkeypatch.setattr(crops, "read", lambda path: pytest.fail("decoded again"))
    collect(load(folder, cache))
    assert multiprocessing.active_children() == []


def test_a_flipped_bit_is_found_and_the_file_read_instead(folder, cache, monkeypatch, caplog):
    whole = collect(load(folder, cache))
    pixels = np.memmap(cache / "train-18.pixels", np.uint8, mode="r+")
    pixels[1000] ^= 4
    pixels.flush()
    with pytest.raises(
        InputError, match=r"1 of the 23 images of the cache .*train-18\.pixels are damaged .*ant/0\.jpg; .*checksum"
    ):
        collect(load(folder, cache))
    monkeypatch.setattr(imagefolder, "MOST_DAMAGED", 0.05)
    with caplog.at_level(logging.WARNING):
        assert_same(collect(load(folder, cache)), whole)
    assert "images of the cache" in caplog.text and "ant/0.jpg" in caplog.text


@pytest.mark.parametrize("file", ["train-18.npz", "train-18.pixels"])
def test_a_truncated_cache_is_said_and_made_anew(folder, cache, made, file, caplog):
    (cache / file).write_bytes((cache / file).read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert_same(collect(load(folder, cache)), collect(load(folder, made)))
    assert "train-18 is damaged" in caplog.text and "/test-18" not in caplog.text
    assert (cache / "train-18.pixels").read_bytes() == (made / "train-18.pixels").read_bytes()


def test_a_flipped_bit_of_the_index_is_found(folder, cache, caplog):
    content = bytearray((cache / "train-18.npz").read_bytes())
    content[content.index(b"starts.npy") + 200] ^= 1
    (cache / "train-18.npz").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        load(folder, cache)
    assert "train-18 is damaged" in caplog.text


def test_the_cache_of_other_files_is_refused(folder, cache, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "train/ant/0.jpg").unlink()
    before = (cache / "train-18.pixels").read_bytes()
    with pytest.raises(InputError, match=r"train-18\.\* was made of other files .*23 files.*now.*22 files.*delete it"):
        load(other, cache)
    assert (cache / "train-18.pixels").read_bytes() == before


def test_an_interruption_leaves_nothing_half_made(folder, tmp_path, monkeypatch):
    path, original, count = tmp_path / "cache", filetable.FileTable.scaled, []

    def scaled(self, row, size):
        count.append(row)
        if len(count) == 20:
            raise KeyboardInterrupt
        return original(self, row, size)

    monkeypatch.setattr(filetable.FileTable, "scaled", scaled)
    with pytest.raises(KeyboardInterrupt):
        load(folder, path)
    assert [file.name for file in path.iterdir()] == ["train-18.lock"]
    monkeypatch.undo()
    assert_same(evaluated(load(folder, path)), evaluated(load(folder)))


def test_a_finished_one_is_read_where_nobody_may_write(folder, cache, tmp_path, monkeypatch):
    whole = collect(load(folder, cache))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may always write
    monkeypatch.setattr(shared, "_alone", lambda stem: pytest.fail("a file would be written"))
    assert_same(collect(load(folder, cache)), whole)


def test_who_waits_for_another_process_says_so(folder, cache, monkeypatch, caplog):
    flock, asked = fcntl.flock, []

    def held(file, operation):
        asked.append(operation)
        if operation & fcntl.LOCK_NB:
            raise BlockingIOError
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", held)
    with caplog.at_level(logging.WARNING):
        load(folder, cache)
    assert caplog.text.count("another process makes or reads it; this one waits") == 2  # train, val
    assert asked == [fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_EX] * 2


def test_a_file_that_is_no_image_stays_one(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(imagefolder, "MOST_DAMAGED", 0.05)
    copy = shutil.copytree(folder, tmp_path / "damaged")
    (copy / "train/bee/2.jpg").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        cached, plain = collect(load(copy, tmp_path / "cache")), collect(load(copy))
    assert caplog.text.count("bee/2.jpg") == 2  # once for each data set
    for (_, labels), (_, same) in zip(cached, plain, strict=True):
        assert torch.equal(labels, same)


def test_a_disk_without_room_is_said_before_the_work(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(InputError, match=r"--data-cache .* needs more than 0 MB, which are not free there"):
        load(folder, tmp_path / "cache")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--data-cache .*file cannot be written"):
        load(folder, tmp_path / "file")
