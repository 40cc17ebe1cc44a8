"""Images of an .npz in parts that are small enough to be carried, and the same arrays made of them."""

import numpy as np
import pytest

from benchmarks.train import parts
from fastfuse import data
from fastfuse.errors import InputError


@pytest.fixture
def source(tmp_path):
    """120 images of noise, which WebP cannot make smaller, in classes with names."""
    generator = np.random.default_rng(0)
    arrays = {"class_names": np.array(["a", "b", "c"])}
    for split, count in (("train", 100), ("test", 20)):
        arrays[f"{split}_images"] = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(count) % 3
    np.savez(tmp_path / "images.npz", **arrays)
    return tmp_path / "images.npz"


@pytest.fixture
def split(source, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "_ROWS", 32 * 8)
    return parts.split(source, tmp_path / "carry", mib=0.1)


def test_parts_are_small_and_give_the_same_data_in_any_order(source, split, tmp_path):
    assert len(split) > 3 and all(part.stat().st_size <= 0.1 * 2**20 for part in split)
    assert all(parts.is_part(part) for part in split) and not parts.is_part(source)
    parts.join(split[::-1], tmp_path / "joined.npz")
    with np.load(source) as whole, np.load(tmp_path / "joined.npz") as joined:
        for key in whole.files:
            assert joined[key].dtype == whole[key].dtype and np.array_equal(joined[key], whole[key]), key
    first, second = (data.load("npz", path=path) for path in (source, tmp_path / "joined.npz"))
    assert first.fingerprint() == second.fingerprint() and first.class_names == second.class_names
    # What is there is not made again.
    before = (tmp_path / "joined.npz").stat().st_mtime_ns
    parts.join(split, tmp_path / "joined.npz")
    assert (tmp_path / "joined.npz").stat().st_mtime_ns == before


def test_what_cannot_be_joined_is_refused(source, split, tmp_path):
    target = tmp_path / "joined.npz"
    with pytest.raises(
        InputError, match=f"of {len(split)} parts of the data 1, 2 is missing: name all of them in --data"
    ):
        parts.join([split[0], *split[3:]], target)
    with pytest.raises(InputError, match=r"images\.npz is damaged or no part of a data set"):
        parts.join([split[0], source], target)
    with np.load(split[0]) as file:
        others = {**{key: file[key] for key in file.files}, "test_labels": np.zeros(20, np.int64)}
    np.savez(split[0], **others)
    with pytest.raises(InputError, match="do not give the data that they were made of: make them anew"):
        parts.join(split, target)
    content = bytearray(split[2].read_bytes())
    content[len(content) // 2] ^= 1
    split[2].write_bytes(content)
    with pytest.raises(InputError, match=r"images.2.npz is damaged or no part of a data set \(.*\): copy it again"):
        parts.join(split, target)
    assert not target.exists()


def test_parts_of_different_data_are_not_mixed(split, tmp_path):
    np.savez(tmp_path / "other.npz", train_labels=np.arange(3))
    (other,) = parts.split(tmp_path / "other.npz", tmp_path / "carry", mib=1)
    with pytest.raises(InputError, match="are parts of different data: name those of one"):
        parts.join([*split, other], tmp_path / "joined.npz")


def test_what_cannot_be_split_is_refused_by_the_command_in_one_line(source, tmp_path, capsys):
    assert parts.main([str(source), str(tmp_path / "carry"), "--mib", "0.01"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "images.npz: train_images/00000000 has" in said and "give --mib above 0.4" in said
    np.savez(tmp_path / "grey.npz", train_images=np.zeros((3, 8, 8), np.uint8))
    assert parts.main([str(tmp_path / "grey.npz"), str(tmp_path / "carry")]) == 2
    assert "train_images is uint8 [3, 8, 8], expected uint8 [N, H, W, 3]" in capsys.readouterr().err
    (tmp_path / "no.npz").write_bytes(b"PK")
    assert parts.main([str(tmp_path / "no.npz"), str(tmp_path / "carry")]) == 2
    assert "no.npz cannot be read as .npz" in capsys.readouterr().err
    assert not list(tmp_path.glob("carry/*.npz"))
