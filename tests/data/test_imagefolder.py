"""A folder of images: splits, labels and pixels as they lie there; damaged files, wrong folders."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastfuse import cli, data
from fastfuse.errors import InputError
from fastfuse.train import checkpoint

Image = pytest.importorskip("PIL.Image", reason="no Pillow, which comes with torchvision")


def write(root: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8)) -> dict[str, np.ndarray]:
    """PNG files by split/class, of random pixels; what was written, by path."""
    generator, written = np.random.default_rng(0), {}
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            written[f"{folder}/{i}.png"] = pixels
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return written


SPLITS = {"train/cat": 3, "train/dog": 2, "test/cat": 1, "test/dog": 1}


def test_pixels_labels_and_classes_are_those_of_the_files(tmp_path):
    written = write(tmp_path, SPLITS | {"valid/cat": 1, "valid/dog": 2})
    dataset = data.load("imagefolder", root=tmp_path, image_size=8)
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1] and dataset.train.labels.dtype == torch.int64
    assert dataset.validation.labels.tolist() == [0, 1, 1]
    for split, name in ((dataset.train, "train"), (dataset.test, "test"), (dataset.validation, "valid")):
        wanted = [pixels for path, pixels in sorted(written.items()) if path.startswith(name)]
        assert np.array_equal(split.images.numpy(), np.stack(wanted)) and split.images.is_contiguous()
    flat = np.stack([p for path, p in written.items() if path.startswith("train")]).reshape(-1, 3) / 255
    torch.testing.assert_close(dataset.mean.double().numpy(), flat.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(dataset.std.double().numpy(), flat.std(0), rtol=0, atol=1e-6)
    assert (dataset.padding, dataset.flip, dataset.image_size) == (1, True, (8, 8))


def test_without_a_test_folder_the_validation_folder_takes_its_place(tmp_path):
    write(tmp_path, {"train/a": 1, "val/a": 2})
    dataset = data.load("imagefolder", root=tmp_path, image_size=8)
    assert len(dataset.test) == 2 and dataset.validation is None


def test_larger_images_are_resized_and_cropped_at_their_centre(tmp_path):
    write(tmp_path, {"train/a": 1, "test/a": 1}, size=(16, 40))
    half = np.zeros((16, 40, 3), np.uint8)
    half[:, 12:28] = 200  # the middle, which the crop keeps
    Image.fromarray(half).save(tmp_path / "train/a/0.png")
    dataset = data.load("imagefolder", root=tmp_path, image_size=8)
    assert dataset.train.images.shape == (1, 8, 8, 3)
    assert (dataset.train.images[:, :, 1:-1] == 200).all()


def test_a_few_damaged_files_are_named_and_left_out(tmp_path, caplog):
    write(tmp_path, {"train/a": 120, "train/b": 1, "test/a": 1, "test/b": 1})
    (tmp_path / "train/a/5.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        dataset = data.load("imagefolder", root=tmp_path, image_size=8)
    assert len(dataset.train) == 120 and "5.png" in caplog.text and "1 damaged" in caplog.text
    for i in range(3):
        (tmp_path / f"train/a/{i}.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"4 of 121 files below .*train are damaged or no images .*0\.png.*remove"):
        data.load("imagefolder", root=tmp_path, image_size=8)


@pytest.mark.parametrize(
    ("counts", "options", "said"),
    [
        (SPLITS, {"image_size": None}, "--data imagefolder needs --data-root.*--image-size"),
        (SPLITS, {"root": None}, "--data imagefolder needs --data-root"),
        (SPLITS, {"image_size": 0}, "--image-size must be at least 1"),
        ({"test/a": 1}, {}, "train cannot be read as a folder of classes.*--data-root"),
        ({"train/a": 1}, {}, "test cannot be read as a folder of classes"),
        ({"train/a": 1, "train/b": 0, "test/a": 1}, {}, "train cannot be read.*Found no valid file for the classes b"),
        (SPLITS | {"valid/cat": 1, "valid/cow": 1}, {}, r"valid has other classes than the training images .cow, dog"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, counts, options, said):
    write(tmp_path, counts)
    with pytest.raises(InputError, match=said):
        data.load("imagefolder", **{"root": tmp_path, "image_size": 8, **options})


def test_other_data_take_no_size():
    with pytest.raises(InputError, match="digits takes no --image-size"):
        data.load("digits", image_size=8)


def test_a_run_trains_on_it(tmp_path, capsys):
    write(tmp_path / "images", {f"{split}/{name}": 6 for split in ("train", "test") for name in "ab"})
    options = "--method independent --students 1 --model resnet8 --epochs 1 --batch-size 4 --device cpu --quiet"
    options += f" --data imagefolder --data-root {tmp_path / 'images'} --image-size 8 --out {tmp_path / 'run'}"
    assert cli.main(["train", *options.split()]) == 0
    assert cli.main(["eval", str(tmp_path / "run"), "--json"]) == 0


def test_weights_found_on_other_data_are_used(tmp_path, capsys):
    """As DFA does with CINIC-10: searched where there are few classes, used on folders as they are unpacked."""
    generator, small = np.random.default_rng(1), tmp_path / "small.npz"
    images, labels = generator.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), np.arange(24) % 3
    np.savez(small, train_images=images, train_labels=labels, test_images=images[:6], test_labels=labels[:6])
    root = tmp_path / "cinic"
    write(root, {f"{split}/{name}": 4 for split in ("train", "valid", "test") for name in "abcd"})
    options = "--model resnet14 --epochs 1 --batch-size 8 --device cpu --quiet --teacher-epochs 1"
    searched, used = tmp_path / "searched", tmp_path / "used"
    first = f"--method dfa-search --data npz --data-path {small} --out {searched}"
    assert cli.main(["train", *options.split(), *first.split()]) == 0
    weights = searched / "aggregation.json"
    own = f"--data imagefolder --data-root {root} --image-size 8 --aggregation-file {weights} --out {used}"
    assert cli.main(["train", "--method", "dfa", *options.split(), *own.split()]) == 0
    assert sorted(path.name for path in used.iterdir() if path.is_dir()) == ["teachers"], "nothing is searched again"
    config, summary = (json.loads((used / name).read_text()) for name in ("config.json", "summary.json"))
    assert config["aggregation_file"] == str(weights)
    assert summary["best_chosen_on"] == "validation", "valid/ is there beside test/"
    assert load_file(used / "student0.safetensors")["fc.weight"].shape == (4, 64)
    found = [weight for group in json.loads(weights.read_text())["groups"] for weight in group["weights"]]
    read = checkpoint.load(used / "checkpoint.pt")["method"]["weights"]
    assert torch.equal(read, torch.tensor(found)) and len(set(found)) > 1, "they are not the uniform ones"
    capsys.readouterr()
