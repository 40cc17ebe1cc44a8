"""CIFAR through torchvision, on a tiny tree in the published format: no network, real integrity checks."""

import hashlib
import pickle
import sys

import numpy as np
import pytest
import torch

from fastfuse import data
from fastfuse.errors import InputError

datasets = pytest.importorskip("torchvision.datasets")

CLASSES = {"cifar10": 10, "cifar100": 100}
PER_FILE = 4


def batch(kind, name, rng):
    """One pickled file as published: rows of 3072 bytes, red plane first."""
    labels = "labels" if kind is datasets.CIFAR10 else "fine_labels"
    return {"data": rng.integers(0, 256, (PER_FILE, 3072), dtype=np.uint8), labels: [3, 1, 0, 2], "batch_label": name}


@pytest.fixture(params=["cifar10", "cifar100"])
def tree(request, tmp_path, monkeypatch):
    """Name, root and the rows of each file; the md5 lists are those of the fake files."""
    name = request.param
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(file, value):
        stored = pickle.dumps(value)
        (folder / file).write_bytes(stored)
        return hashlib.md5(stored).hexdigest()

    rows = {}
    for field in ("train_list", "test_list"):
        sums = []
        for file, _ in getattr(kind, field):
            value = batch(kind, file, rng)
            rows[file] = value["data"]
            sums.append([file, write(file, value)])
        monkeypatch.setattr(kind, field, sums)
    names = [f"class {number}" for number in range(CLASSES[name])]
    meta = kind.meta
    monkeypatch.setattr(kind, "meta", {**meta, "md5": write(meta["filename"], {meta["key"]: names})})
    return name, tmp_path, rows


def test_splits_statistics_and_defaults(tree):
    name, root, rows = tree
    dataset = data.load(name, root=root)
    train_rows = np.concatenate([value for file, value in rows.items() if "test" not in file])
    wanted = train_rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    assert np.array_equal(dataset.train.images.numpy(), wanted)
    assert dataset.train.images.is_contiguous()
    assert dataset.train.labels.tolist() == [3, 1, 0, 2] * (len(rows) - 1)
    assert len(dataset.test) == PER_FILE
    assert (dataset.train.images.dtype, dataset.train.labels.dtype) == (torch.uint8, torch.int64)
    assert dataset.num_classes == CLASSES[name]
    assert dataset.class_names[3] == "class 3"
    assert (dataset.padding, dataset.flip, dataset.validation) == (4, True, None)
    published = {
        "cifar10": ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    }[name]
    assert torch.equal(dataset.mean, torch.tensor(published[0]))
    assert torch.equal(dataset.std, torch.tensor(published[1]))


def test_validation_split(tree):
    name, root, _ = tree
    if name == "cifar100":  # one image per class: any fraction that takes one takes all
        with pytest.raises(InputError, match=r"would leave class 0 \('class 0'\)"):
            data.load(name, root=root, val_fraction=0.5)
        return
    dataset = data.load(name, root=root, val_fraction=0.4)
    assert dataset.validation.labels.bincount().tolist() == [2, 2, 2, 2]
    assert dataset.train.labels.bincount().tolist() == [3, 3, 3, 3]


def test_changed_file_fails_its_checksum(tree):
    name, root, _ = tree
    (kind_folder,) = (path for path in root.iterdir() if path.is_dir())
    victim = next(path for path in kind_folder.iterdir() if "meta" not in path.name)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{name} cannot be read below .*corrupted") as caught:
        data.load(name, root=root)
    assert "\n" not in str(caught.value)


def test_file_that_is_no_pickle(tree, monkeypatch):
    """Passes the checksum, fails on reading."""
    name, root, _ = tree
    (folder,) = (path for path in root.iterdir() if path.is_dir())
    for path in folder.iterdir():
        path.write_bytes(b"junk")
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    with pytest.raises(InputError, match=f"{name} cannot be read below"):
        data.load(name, root=root)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_absent_names_root_and_the_option(name, tmp_path):
    with pytest.raises(InputError, match=f"{name} cannot be read below '{tmp_path}/nowhere'.*--download.*--data-root"):
        data.load(name, root=tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_download_that_fails(tmp_path, monkeypatch):
    asked = []

    def offline(url, *args, **kwargs):
        asked.append(url)
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", offline)
    with pytest.raises(InputError, match=r"no route to host\): check the connection"):
        data.load("cifar10", root=tmp_path, download=True)
    assert len(asked) == 1


def test_without_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match="cifar10 needs torchvision, which cannot be imported"):
        data.load("cifar10", root=tmp_path)
    assert data.load("digits").num_classes == 10
