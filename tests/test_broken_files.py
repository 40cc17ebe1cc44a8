"""Generated broken files: each is refused in one line, or is still whole; nothing else comes out and no code runs.

`FASTFUSE_BROKEN_FILES=1000` tries as many of every kind; without it each has 20.
"""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes

pytest.importorskip("hypothesis", reason="hypothesis is not installed: pip install 'fastfuse[test]'")
from hypothesis import given, settings
from hypothesis import strategies as st

from fastfuse import data
from fastfuse.config import TrainConfig
from fastfuse.data import crops
from fastfuse.errors import FastfuseError
from fastfuse.train import checkpoint
from fastfuse.train.record import RunFolder
from fastfuse.train.weights import read_weights

EXAMPLES = int(os.environ.get("FASTFUSE_BROKEN_FILES", "20"))


class Harmful:
    def __reduce__(self):
        return os.mkdir, ("this-folder-must-not-appear",)


def npz_bytes() -> bytes:
    file = io.BytesIO()
    images = np.arange(4 * 6 * 6 * 3, dtype=np.uint8).reshape(4, 6, 6, 3)
    labels = np.array([0, 1, 0, 1])
    np.savez(file, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return file.getvalue()


def checkpoint_bytes(folder: Path) -> bytes:
    checkpoint.save(folder / "whole.pt", {"position": {"step": 1}, "method": {"weight": torch.ones(3)}})
    return (folder / "whole.pt").read_bytes()


def jpeg_bytes() -> bytes:
    from torchvision.io import encode_jpeg

    return encode_jpeg((torch.arange(3 * 24 * 32) % 251).to(torch.uint8).view(3, 24, 32)).numpy().tobytes()


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def config_bytes(folder: Path) -> bytes:
    RunFolder(folder).write_config(TrainConfig())
    return (folder / "config.json").read_bytes()


@st.composite
def broken(draw: st.DrawFn, whole: bytes) -> bytes:
    """The file cut, with bytes changed, put in or taken out, or other bytes altogether."""
    content = bytearray(whole)
    kind = draw(st.sampled_from(["cut", "change", "change", "insert", "remove", "other"]))
    place = draw(st.integers(0, len(content) - 1))
    if kind == "cut":
        del content[place:]
    elif kind == "change":
        for _ in range(draw(st.integers(1, 4))):
            content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    elif kind == "insert":
        content[place:place] = draw(st.binary(min_size=1, max_size=40))
    elif kind == "remove":
        del content[place : place + draw(st.integers(1, 40))]
    else:
        malicious = [pickle.dumps(Harmful()), saved({"weight": Harmful()})]
        others = [st.binary(max_size=200), st.text(max_size=80).map(str.encode), st.sampled_from(malicious)]
        content[:] = draw(st.one_of(others))
    return bytes(content)


def read_npz(path: Path) -> None:
    assert len(data.load("npz", path=path).train) > 0


def read_checkpoint(path: Path) -> None:
    checkpoint.load(path)
    raise AssertionError("a checkpoint that is not what was written was taken")


def read_initial_weights(path: Path) -> None:
    assert isinstance(read_weights(path), dict)


def read_config(path: Path) -> None:
    assert isinstance(RunFolder(path.parent).read_config(), TrainConfig)


def read_jpeg(path: Path) -> None:
    image = crops.read(path)
    assert image.dtype == torch.uint8 and image.dim() == 3 and image.shape[2] == 3


KINDS = {
    "jpeg": ("image.jpg", lambda folder: jpeg_bytes(), read_jpeg),
    "npz": ("data.npz", lambda folder: npz_bytes(), read_npz),
    "checkpoint": ("checkpoint.pt", checkpoint_bytes, read_checkpoint),
    "weights": ("weights.safetensors", lambda folder: safetensors_bytes({"a": torch.ones(3)}), read_initial_weights),
    "config": ("config.json", config_bytes, read_config),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_refused_or_whole(kind, tmp_path, monkeypatch):
    name, make, read = KINDS[kind]
    whole, path = make(tmp_path), tmp_path / "read" / name
    path.parent.mkdir()
    monkeypatch.chdir(tmp_path)

    @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES < 100)
    @given(broken(whole))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            if content != whole:
                read(path)
        except (FastfuseError, crops.DamagedImage) as error:
            assert len(str(error).splitlines()) == 1 and str(error), "one line"

    check()
    assert not (tmp_path / "this-folder-must-not-appear").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_file_is_read(kind, tmp_path):
    name, make, read = KINDS[kind]
    path = tmp_path / "read" / name
    path.parent.mkdir()
    path.write_bytes(make(tmp_path))
    if kind == "checkpoint":
        assert checkpoint.load(path)["position"] == {"step": 1}
    else:
        read(path)
