"""Checkpoints as files: checksum, the ones before, writing beside the training."""

import errno
import logging
import random
import threading
from pathlib import Path

import pytest
import torch

from fastfuse.errors import CheckpointError
from fastfuse.train import checkpoint
from fastfuse.train.checkpoint import DamagedCheckpointError, load, load_newest, save
from fastfuse.train.files import WriteError
from fastfuse.train.saving import CheckpointWriter


def state(number: int) -> dict:
    return {"position": {"step": number}, "method": {"weight": torch.full((3, 5), float(number))}}


def steps(path: Path) -> dict[str, int]:
    return {file.name: load(file)["position"]["step"] for file in checkpoint.kept(path)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.pt"


def test_what_is_saved_is_loaded(path):
    save(path, state(7))
    assert torch.equal(load(path)["method"]["weight"], torch.full((3, 5), 7.0))
    assert torch.load(path, weights_only=True)["position"] == {"step": 7}, "torch alone reads it as well"


def test_any_flipped_bit_is_found(path):
    save(path, state(1))
    whole = path.read_bytes()
    draw = random.Random(1)
    # Every bit of the trailer and of the archive's directory before it, and others at random.
    places = [*range(len(whole) - 200, len(whole)), *draw.sample(range(len(whole) - 200), 200)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError, match=r"checkpoint\.pt cannot be read"):
            load(path)


def test_any_truncation_is_found(path):
    save(path, state(1))
    whole = path.read_bytes()
    for length in [*range(0, 60), *range(60, len(whole) - 60, 97), *range(len(whole) - 60, len(whole))]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedCheckpointError):
            load(path)


def test_an_archive_without_checksum_is_not_trusted(path):
    torch.save({"format": checkpoint.FORMAT, "version": checkpoint.VERSION, **state(1)}, path)
    with pytest.raises(DamagedCheckpointError, match="checksum is missing"):
        load(path)


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "a file system without"])
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_the_last_ones_are_kept(path, keep, links, monkeypatch):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(Path, "hardlink_to", refuse)
    for number in range(7):
        save(path, state(number), keep=keep)
        names = ["checkpoint.pt", "checkpoint-1.pt", "checkpoint-2.pt", "checkpoint-3.pt"][: min(keep, number + 1)]
        assert steps(path) == {name: number - i for i, name in enumerate(names)}
    assert len(list(path.parent.iterdir())) == keep, "nothing else stays behind"
    save(path, state(7), keep=1)
    assert steps(path) == {"checkpoint.pt": 7}, "fewer are kept from now on"


def test_a_damaged_one_is_reported_and_the_one_before_is_used(path, caplog):
    for number in range(3):
        save(path, state(number), keep=3)
    with path.open("r+b") as file:
        file.seek(300)
        file.write(b"\x00\xff")
    path.with_name("checkpoint-1.pt").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert load_newest(path)["position"] == {"step": 0}
    assert len(caplog.messages) == 2
    assert all("checkpoint-2.pt, the one before it, is used" in message for message in caplog.messages)
    path.with_name("checkpoint-2.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint\.pt cannot be read"):
        load_newest(path)


def test_the_newest_may_be_missing(path):
    for number in range(2):
        save(path, state(number), keep=2)
    path.unlink()
    assert load_newest(path)["position"] == {"step": 0}
    path.with_name("checkpoint-1.pt").unlink()
    with pytest.raises(CheckpointError):
        load_newest(path)


def test_another_version_is_no_damage(path):
    for number in range(2):
        save(path, state(number), keep=2)
    save(path, {**state(2), "version": 99}, keep=2)
    with pytest.raises(CheckpointError, match="version 99"):
        load_newest(path)


def full_disk(*_arguments, **_options):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_all_as_they_were(path, monkeypatch):
    for number in range(3):
        save(path, state(number), keep=3)
    before = steps(path)
    monkeypatch.setattr(torch, "save", full_disk)
    for _ in range(3):
        with pytest.raises(WriteError, match="No space left"):
            save(path, state(9), keep=3)
    assert steps(path) == before and len(list(path.parent.iterdir())) == 3


def test_the_writer_writes_a_copy_while_others_go_on(path, monkeypatch):
    begun, go_on = threading.Event(), threading.Event()
    original = torch.save

    def slow(value, file):
        begun.set()
        assert go_on.wait(30)
        original(value, file)

    monkeypatch.setattr(torch, "save", slow)
    writer, trained = CheckpointWriter(path, keep=1), state(1)
    writer.save(trained)
    assert begun.wait(30) and not path.exists()
    trained["method"]["weight"].fill_(-1)
    go_on.set()
    writer.finish()
    assert torch.equal(load(path)["method"]["weight"], torch.ones(3, 5))


def test_the_writer_tells_of_a_failure_and_tries_again(path, monkeypatch):
    writer = CheckpointWriter(path, keep=2)
    writer.save(state(1))
    writer.finish()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full_disk)
        writer.save(state(2))
        with pytest.raises(WriteError, match="No space left"):
            writer.finish()
        writer.finish()  # told once
        writer.save(state(3))
        writer._pending.exception(30)
    with pytest.raises(WriteError, match="No space left"):
        writer.save(state(4))
    writer.finish()
    assert steps(path) == {"checkpoint.pt": 4, "checkpoint-1.pt": 1}


def test_what_ends_a_run_waits_for_the_writer(path, monkeypatch, caplog):
    with pytest.raises(KeyError), CheckpointWriter(path, keep=1) as writer:
        writer.save(state(1))
        raise KeyError
    assert steps(path) == {"checkpoint.pt": 1}
    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(KeyError), CheckpointWriter(path, keep=1) as writer:
        writer.save(state(2))
        raise KeyError
    assert "No space left" in caplog.text
    with pytest.raises(WriteError, match="No space left"), CheckpointWriter(path, keep=1) as writer:
        writer.save(state(2))
    assert steps(path) == {"checkpoint.pt": 1}
