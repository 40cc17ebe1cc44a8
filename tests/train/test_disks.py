"""A run on a disk that is full, read-only, gone or damaged."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastfuse import cli
from fastfuse.train import files
from fastfuse.train.checkpoint import load
from fastfuse.train.record import RunFolder


def full_disk(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_disk_that_is_full_from_the_start_leaves_no_run(refused, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", full_disk)
    message = refused()
    assert "No space left on device" in message and "config.json" in message


@pytest.fixture
def filling_disk(monkeypatch):
    """A disk with no room for some of the writes of a kind of file: their numbers, from 1."""

    def fill(kind: str, numbers: range) -> None:
        writes, original = [], os.fsync

        def fsync(descriptor):
            if kind in os.readlink(f"/proc/self/fd/{descriptor}"):
                writes.append(1)
                if len(writes) in numbers:
                    full_disk()
            original(descriptor)

        monkeypatch.setattr(files.os, "fsync", fsync)

    return fill


@pytest.mark.parametrize(
    ("kind", "number"),
    [
        pytest.param("checkpoint", 2, id="the second checkpoint"),
        pytest.param("_best.safetensors", 1, id="the first best weights"),
        pytest.param("metrics", 4, id="the second epoch's table"),  # the first two files are those of no epoch
    ],
)
def test_a_disk_that_is_full_for_a_while_does_not_end_a_run(train, filling_disk, caplog, monkeypatch, kind, number):
    filling_disk(kind, range(number, number + 1))
    run = train("--epochs", 3)
    assert len(caplog.messages) == 1, "one warning"
    assert "No space left on device" in caplog.text and kind in caplog.text and "training goes on" in caplog.text
    monkeypatch.undo()
    whole = train("--epochs", 3, out="whole")
    assert run.timeless_metrics() == whole.timeless_metrics()
    assert (run.path / "metrics.csv").exists() and not list(run.path.glob("*.tmp"))
    for file in whole.path.glob("*.safetensors"):
        assert (run.path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_disk_that_stays_full_keeps_the_last_good_one(train, tiny, tmp_path, filling_disk, capsys, monkeypatch):
    filling_disk("checkpoint", range(2, 100))
    assert cli.main([*tiny, "--epochs", "3", "--out", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("fastfuse: cannot write") and "checkpoint.pt: No space left on device" in message
    assert load(tmp_path / "run" / "checkpoint.pt")["position"]["epoch"] == 1
    assert not list((tmp_path / "run").glob("*.tmp"))
    monkeypatch.undo()
    resumed = train("--epochs", 3, "--resume")
    assert resumed.timeless_metrics() == train("--epochs", 3, out="whole").timeless_metrics()


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(train, caplog):
    run, whole = train("--epochs", 3), train("--epochs", 3, out="whole")
    path = run.path / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert load(run.path / "checkpoint-1.pt")["position"]["epoch"] == 2
    again = train("--epochs", 3, "--resume")
    assert "checkpoint.pt cannot be read" in caplog.text
    assert "checkpoint-1.pt, the one before it, is used" in caplog.text
    assert again.timeless_metrics() == whole.timeless_metrics()
    ours, theirs = load(path)["method"], load(whole.path / "checkpoint.pt")["method"]
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_real_limit_on_file_sizes(tiny, tmp_path):
    # The kernel refuses to write beyond 100 kB: the configuration fits, the checkpoint does not.
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        "from fastfuse.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *tiny, "--out", str(out)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert process.returncode == 1
    *warnings, message = process.stderr.splitlines()
    assert message.startswith("fastfuse: cannot write") and "checkpoint.pt: File too large; free space" in message
    assert warnings and all("training goes on" in warning for warning in warnings)
    assert not list(out.glob("*.tmp")) and not (out / "checkpoint.pt").exists()


def test_a_disk_that_became_read_only_is_one_line(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.os, "fsync", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(files.WriteError, match=r"cannot write .*: Read-only file system; free space"):
        files.write_atomic(tmp_path / "file", lambda file: file.write(b"content"))


def test_a_run_folder_that_has_gone_is_one_line(tmp_path):
    with pytest.raises(files.WriteError, match=r"student0\.safetensors: No such file or directory"):
        RunFolder(tmp_path / "gone" / "run").write_weights("student0", {"weight": torch.ones(1)})


def test_nothing_is_written_outside_the_run_folder(train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train()
    assert [p.name for p in Path(tmp_path).iterdir()] == ["run"]
