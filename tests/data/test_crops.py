"""One image: which part of it is shown, and which pixels come out."""

import io
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastfuse.data import crops
from tests.data.jpegs import Image, picture

transforms = pytest.importorskip("torchvision.transforms", reason="no torchvision")
v2 = pytest.importorskip("torchvision.transforms.v2", reason="no torchvision")


def boxes(height: int, width: int, count: int = 4000) -> np.ndarray:
    return np.array([crops.random_box(height, width, crops.generator(7, position)) for position in range(count)])


def test_a_random_part_keeps_the_rules_of_area_and_aspect():
    height, width = 300, 500
    top, left, h, w = boxes(height, width).T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= height).all() and (left + w <= width).all()
    # Each side is rounded to a pixel, by half a pixel at most.
    assert ((h + 0.5) * (w + 0.5) >= 0.08 * height * width).all()
    assert ((h - 0.5) * (w - 0.5) <= height * width).all()
    assert ((w + 0.5) / (h - 0.5) >= 3 / 4).all() and ((w - 0.5) / (h + 0.5) <= 4 / 3).all()
    # The ends of both ranges are reached, and every place.
    assert (h * w).min() < 0.09 * height * width and (h * w).max() > 0.7 * height * width
    assert (w / h).min() < 0.77 and (w / h).max() > 1.3
    small = h < 120
    assert top[small].min() < 5 and (top + h)[small].max() > height - 5
    assert left[small].min() < 5 and (left + w)[small].max() > width - 5


def test_area_and_aspect_are_drawn_uniformly_where_everything_fits(monkeypatch):
    monkeypatch.setattr(crops, "AREA", (0.05, 0.5))  # of a square every such part fits
    _, _, h, w = boxes(1000, 1000).T
    share, aspect = h * w / 1e6, np.log(w / h) / math.log(4 / 3)
    for values, low, high in ((share, 0.05, 0.5), (aspect, -1.0, 1.0)):
        quarters = np.histogram(values, bins=4, range=(low, high))[0]
        # Each has 1000 +- 27 of 4000; five deviations.
        assert (abs(quarters - 1000) < 140).all(), quarters
    assert abs(np.corrcoef(share, aspect)[0, 1]) < 5 / math.sqrt(4000)


@pytest.mark.parametrize(("height", "width", "box"), [(10, 900, (0, 443, 10, 13)), (900, 12, (442, 0, 16, 12))])
def test_where_no_part_fits_it_is_the_centre_with_the_nearest_aspect(height, width, box, monkeypatch):
    monkeypatch.setattr(crops, "AREA", (1.0, 1.0))
    assert crops.random_box(height, width, crops.generator(0, 0)) == box


def test_draws_are_those_of_the_counter_based_generator():
    for key, position in ((0, 0), (2**64 - 1, 5), (2**63 + 12, 1_281_166)):
        theirs = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, position]))
        assert np.array_equal(crops.generator(key, position).random(9), theirs.random(9))


def test_draws_belong_to_the_position_alone():
    alone = crops.random_box(300, 500, crops.generator(3, 12))
    assert [crops.random_box(300, 500, crops.generator(3, p)) for p in range(20)][12] == alone
    assert crops.random_box(300, 500, crops.generator(4, 12)) != alone


def decoded(image: Image.Image, form: str = "JPEG", **options: object) -> tuple[np.ndarray, torch.Tensor]:
    """What Pillow and what we make of the same file."""
    import tempfile
    from pathlib import Path

    content = io.BytesIO()
    image.save(content, form, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.jpg"  # the name says nothing about what is in it
        path.write_bytes(content.getvalue())
        return np.array(Image.open(content).convert("RGB")), crops.read(path)


@pytest.mark.parametrize("kind", ["RGB", "L", "CMYK"])
def test_jpeg_files_become_rgb(kind):
    theirs, ours = decoded(picture(np.random.default_rng(1), 37, 50).convert(kind), quality=90)
    assert ours.dtype == torch.uint8 and ours.shape == (37, 50, 3)
    assert ours.is_contiguous(), "nothing is moved before the crop"
    assert (ours.int() - torch.from_numpy(theirs).int()).abs().max() <= 1


def test_without_torchvisions_decoder_pillow_reads_jpeg_files(monkeypatch):
    monkeypatch.setattr(torch.ops, "image", object())
    monkeypatch.setattr(crops, "_simplejpeg", lambda: None)
    theirs, ours = decoded(picture(np.random.default_rng(1), 37, 50), quality=90)
    assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("size", [(37, 50), (375, 500), (1, 1)])
def test_simplejpeg_gives_the_pixels_of_torchvision(size):
    pytest.importorskip("simplejpeg", reason="no simplejpeg: pip install 'fastfuse[jpeg]'")
    for kind, subsampling, progressive in itertools.product(("RGB", "L", "CMYK"), (0, 1, 2), (False, True)):
        content = io.BytesIO()
        image = picture(np.random.default_rng(1), *size).convert(kind)
        image.save(content, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
        whole = bytearray(content.getvalue())
        ours = crops._by_simplejpeg(whole)
        # Ink becomes light by another rule there, and damaged files are for torchvision's decoder to judge.
        assert (ours is None) == (kind == "CMYK") and crops._by_simplejpeg(whole[: len(whole) // 2]) is None
        assert ours is None or torch.equal(ours, crops._by_torchvision(whole))


def test_simplejpeg_is_asked_first_and_need_not_be_there(monkeypatch):
    content = io.BytesIO()
    picture(np.random.default_rng(1), 9, 11).save(content, "JPEG")
    given, blank = bytearray(content.getvalue()), np.zeros((9, 11, 3), np.uint8)
    stand_in = SimpleNamespace(decode_jpeg_header=lambda _: (9, 11, "YCbCr", "420"), decode_jpeg=lambda _: blank)
    monkeypatch.setattr(crops, "_simplejpeg", lambda: stand_in)
    assert not crops.decoded(given).any()
    monkeypatch.setattr(crops, "_simplejpeg", lambda: None)
    assert torch.equal(crops.decoded(given), crops._by_torchvision(given))


@pytest.mark.parametrize("kind", ["RGB", "RGBA", "P", "1"])
def test_other_files_go_through_pillow(kind):
    theirs, ours = decoded(picture(np.random.default_rng(1), 9, 11).convert(kind), "PNG")
    assert np.array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("size", [(375, 500), (60, 41), (256, 256), (20, 91)])
def test_evaluation_pixels_are_those_of_torchvision(size):
    image = torch.from_numpy(np.array(picture(np.random.default_rng(2), *size)))
    ours, image = crops.centre_crop(crops.scaled(image, 224), 224).permute(2, 0, 1), image.permute(2, 0, 1)
    theirs = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(image)
    assert ours.shape == (3, 224, 224) and torch.equal(ours, theirs)
    # Those of Pillow, which the published trainer has, and of the older transforms, which resize in float32.
    older = transforms.Compose([transforms.Resize(256, antialias=True), transforms.CenterCrop(224)])
    pillow = older(transforms.ToPILImage()(image))
    for other in (torch.from_numpy(np.array(pillow)).permute(2, 0, 1), older(image)):
        assert (ours.int() - other.int()).abs().max() <= 1


def test_training_pixels_are_those_of_the_part_that_was_drawn():
    original = picture(np.random.default_rng(3), 90, 120)
    image = torch.from_numpy(np.array(original))
    for position in range(5):
        top, left, h, w = crops.random_box(90, 120, crops.generator(1, position))
        part = original.crop((left, top, left + w, top + h)).resize((32, 32), Image.Resampling.BILINEAR)
        ours = crops.random_crop(image, 32, crops.generator(1, position))
        assert (ours.int() - torch.from_numpy(np.array(part)).int()).abs().max() <= 1
