"""Sets in an .npz file: every accepted form, and one clear line for every bad one."""

import pickle
import zipfile

import numpy as np
import pytest
import torch

from fastfuse import data
from fastfuse.data import arrays
from fastfuse.errors import InputError


def content(train=6, test=4, shape=(8, 9, 3), classes=3, **changes):
    """Arrays of a good file; None removes a key."""
    rng = np.random.default_rng(0)
    good = {
        "train_images": rng.integers(0, 256, (train, *shape), dtype=np.uint8),
        "train_labels": np.arange(train) % classes,
        "test_images": rng.integers(0, 256, (test, *shape), dtype=np.uint8),
        "test_labels": np.arange(test) % classes,
    }
    return {key: array for key, array in {**good, **changes}.items() if array is not None}


@pytest.fixture
def write(tmp_path):
    def writer(content):
        path = tmp_path / "set.npz"
        np.savez(path, **content)
        return path

    return writer


def test_rgb_is_taken_as_it_is(write):
    stored = content()
    dataset = data.load("npz", path=write(stored))
    assert torch.equal(dataset.train.images, torch.from_numpy(stored["train_images"]))
    assert dataset.test.labels.tolist() == stored["test_labels"].tolist()
    assert dataset.train.labels.dtype == torch.int64
    assert (dataset.name, dataset.padding, dataset.flip, dataset.validation) == ("npz", 4, True, None)
    assert dataset.class_names == ("0", "1", "2")
    pixels = stored["train_images"].astype(np.float64) / 255
    np.testing.assert_allclose(dataset.mean.numpy(), pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std.numpy(), pixels.std((0, 1, 2)), rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 9), (8, 9, 1)])
def test_grey_becomes_three_equal_channels(write, shape):
    stored = content(shape=shape)
    dataset = data.load("npz", path=write(stored))
    for split, key in ((dataset.train, "train_images"), (dataset.test, "test_images")):
        assert split.images.shape == (len(split), 8, 9, 3)
        for channel in range(3):
            assert np.array_equal(split.images[..., channel].numpy(), stored[key].reshape(-1, 8, 9))


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
def test_labels_as_a_column_of_any_integer_type(write, dtype):
    dataset = data.load("npz", path=write(content(train_labels=np.array([[0], [1], [2], [2], [1], [0]], dtype=dtype))))
    assert dataset.train.labels.tolist() == [0, 1, 2, 2, 1, 0]


def test_validation_split_of_the_file(write):
    stored = content()
    stored.update(val_images=stored["test_images"][:2], val_labels=np.array([2, 0]))
    path = write(stored)
    dataset = data.load("npz", path=path)
    assert dataset.validation.labels.tolist() == [2, 0]
    assert torch.equal(dataset.validation.images, dataset.test.images[:2])
    with pytest.raises(InputError, match="has a validation split already"):
        data.load("npz", path=path, val_fraction=0.2)


def test_class_names_set_the_number_of_classes(write):
    names = ["cat", "dog", "owl", "never seen"]
    dataset = data.load("npz", path=write(content(class_names=np.array(names))))
    assert dataset.class_names == tuple(names)
    assert dataset.num_classes == 4


def test_flat_images_have_deviation_one(write):
    dataset = data.load("npz", path=write(content(train_images=np.full((6, 8, 9, 3), 51, np.uint8))))
    assert dataset.std.tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(dataset.mean, torch.full((3,), 0.2))


def test_other_keys_are_left_alone(write):
    """Even pickled ones: an unknown key is never opened."""
    dataset = data.load("npz", path=write(content(notes=np.array([{}], dtype=object))))
    assert len(dataset.train) == 6


def test_column_major_arrays(write):
    stored = content()
    dataset = data.load("npz", path=write({**stored, "train_images": np.asfortranarray(stored["train_images"])}))
    assert dataset.train.images.is_contiguous()
    assert np.array_equal(dataset.train.images.numpy(), stored["train_images"])


def test_compressed_file(tmp_path):
    path = tmp_path / "set.npz"
    np.savez_compressed(path, **content())
    assert len(data.load("npz", path=path).train) == 6


def test_small_images_need_a_smaller_padding(write):
    path = write(content(shape=(4, 9)))
    with pytest.raises(InputError, match=r"crop padding 4 does not fit the 4x9 images .* --crop-padding 0\.\.3"):
        data.load("npz", path=path)
    assert data.load("npz", path=path, padding=3).padding == 3


def good(count, *tail, dtype=np.uint8):
    return np.zeros((count, *tail), dtype)


BAD = [
    (
        "missing key",
        {"test_labels": None},
        r"key test_labels is missing, found \['test_images', 'train_images', 'train_labels'\]",
    ),
    ("pickled images", {"train_images": np.array([{}] * 6, dtype=object)}, "train_images cannot be read .*pickle"),
    ("pickled names", {"class_names": np.array(["a", 1, 2], dtype=object)}, "class_names cannot be read .*pickle"),
    ("float images", {"test_images": good(4, 8, 9, 3, dtype=np.float32)}, "test_images has type float32, .* uint8"),
    ("flat images", {"train_images": good(6, 72)}, r"train_images has shape \[6, 72\], expected \[N, H, W\]"),
    ("channels first", {"train_images": good(6, 3, 8, 9)}, r"train_images has shape \[6, 3, 8, 9\], expected .*N, H"),
    ("alpha channel", {"test_images": good(4, 8, 9, 4)}, r"test_images has shape \[4, 8, 9, 4\]"),
    ("volumes", {"train_images": good(6, 8, 9, 9, 3)}, r"train_images has shape \[6, 8, 9, 9, 3\]"),
    ("no image", {"test_images": good(0, 8, 9, 3), "test_labels": good(0, dtype=np.int64)}, "at least one image"),
    ("no width", {"test_images": good(4, 8, 0, 3)}, r"test_images has shape \[4, 8, 0, 3\]"),
    ("other side", {"test_images": good(4, 8, 8, 3)}, r"test_images are \[8, 8, 3\] .* train_images \[8, 9, 3\]"),
    ("grey and RGB", {"test_images": good(4, 8, 9)}, r"test_images are \[8, 9, 1\] .* train_images \[8, 9, 3\]"),
    ("too few labels", {"train_labels": good(5, dtype=np.int64)}, r"train_labels has shape \[5\], expected \[6\]"),
    ("multi-label", {"train_labels": good(6, 14, dtype=np.int64)}, r"train_labels has shape \[6, 14\], expected \[6\]"),
    ("float labels", {"test_labels": good(4, dtype=np.float64)}, "test_labels has type float64, expected integers"),
    ("bool labels", {"test_labels": good(4, dtype=np.bool_)}, "test_labels has type bool, expected integers"),
    ("negative label", {"train_labels": np.array([0, 1, 2, -1, 0, 1])}, r"train_labels holds -1, expected 0\.\.2"),
    (
        "test label unknown to training",
        {"test_labels": np.array([0, 1, 2, 3])},
        r"test_labels holds 3, .*largest train",
    ),
    (
        "label beyond the names",
        {"class_names": np.array(["a", "b"])},
        r"train_labels holds 2, .* length of class_names",
    ),
    (
        "label beyond int64",
        {"test_labels": np.array([0, 1, 2, 2**64 - 1], np.uint64)},
        "test_labels holds 18446744073709",
    ),
    ("identifiers", {"train_labels": np.arange(6) + 10**12}, "train_labels holds 1000000000005, .* below 100000"),
    ("only negative", {"train_labels": np.full(6, -1)}, "train_labels holds -1"),
    ("val_images alone", {"val_images": good(2, 8, 9, 3)}, "val_images without val_labels: add val_labels or remove"),
    ("val_labels alone", {"val_labels": np.array([0])}, "val_labels without val_images"),
    ("numbers as names", {"class_names": np.arange(3)}, "class_names has type int64 .* expected strings"),
    ("one string as names", {"class_names": np.array("abc")}, r"class_names has type <U3 and shape \[\]"),
    ("no names", {"class_names": np.array([], dtype="<U1")}, r"class_names .* shape \[0\], expected strings"),
]


@pytest.mark.parametrize(("changes", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_content_names_file_and_key(write, changes, message):
    path = write(content(**changes))
    with pytest.raises(InputError, match=message) as caught:
        data.load("npz", path=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_label_of_the_validation_split_is_checked(write):
    stored = content()
    with pytest.raises(InputError, match="val_labels holds 7"):
        data.load("npz", path=write({**stored, "val_images": stored["test_images"], "val_labels": np.full(4, 7)}))


def test_no_path():
    with pytest.raises(InputError, match="needs a file: give its path with --data-path"):
        data.load("npz")


def one_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def truncated(path):
    np.savez(path, **content())
    path.write_bytes(path.read_bytes()[:-500])


def flipped_bytes(path):
    np.savez_compressed(path, **content())
    whole = bytearray(path.read_bytes())
    whole[300:340] = bytes(40)
    path.write_bytes(whole)


def not_arrays(path):
    with zipfile.ZipFile(path, "w") as archive:
        for key in arrays.REQUIRED:
            archive.writestr(key, "text")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda path: None, "no such file", id="missing"),
        pytest.param(lambda path: path.mkdir(), "cannot be read", id="a folder"),
        pytest.param(lambda path: path.write_bytes(b""), "not an .npz file", id="empty"),
        pytest.param(lambda path: path.write_text("hello"), "not an .npz file", id="text"),
        pytest.param(lambda path: path.write_bytes(pickle.dumps({})), "not an .npz file", id="a pickle"),
        pytest.param(one_array, "one bare array, expected an .npz file", id="npy"),
        pytest.param(truncated, "not an .npz file", id="cut short"),
        pytest.param(flipped_bytes, "train_images (is damaged|cannot be read)", id="damaged inside"),
        pytest.param(not_arrays, "train_images is not an array but raw bytes", id="a zip of something else"),
    ],
)
def test_bad_file_is_one_line(tmp_path, make, message):
    path = tmp_path / "set.npz"
    make(path)
    with pytest.raises(InputError, match=message) as caught:
        data.load("npz", path=path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_code_is_never_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "set.npz"
    np.savez(path, **content(train_images=np.array([Trap()], dtype=object)))
    with pytest.raises(InputError, match="never pickled objects"):
        data.load("npz", path=path)
    assert not (tmp_path / "ran").exists()
