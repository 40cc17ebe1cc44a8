"""Per-sample augmentation against numpy, one image at a time, with a padded copy that the op never makes."""

import itertools

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.errors import BackendUnavailableError, InputError

MEAN = torch.tensor([0.5071, 0.4865, 0.4409])
STD = torch.tensor([0.2673, 0.2564, 0.2762])
FORMATS = [torch.contiguous_format, torch.channels_last]


def draw(n=5, height=7, width=5, batch=12, padding=3, channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, height, width, channels), generator=generator, dtype=torch.uint8)
    indices = torch.randint(0, n, (batch,), generator=generator)
    offsets = torch.randint(0, 2 * padding + 1, (batch, 2), generator=generator)
    flips = torch.randint(0, 2, (batch,), generator=generator, dtype=torch.bool)
    return images, indices, offsets, flips


def one_by_one(images, indices, offsets, flips, *, padding, mean=MEAN, std=STD):
    """Pad, mirror, crop, normalise in float64, each sample alone: [B, C, H, W]."""
    height, width = images.shape[1:3]
    results = []
    for index, (row, column), mirrored in zip(indices.tolist(), offsets.tolist(), flips.tolist(), strict=True):
        padded = np.pad(images[index].numpy(), ((padding, padding), (padding, padding), (0, 0)), mode="reflect")
        padded = padded[:, ::-1] if mirrored else padded
        window = padded[row : row + height, column : column + width].astype(np.float64)
        results.append(((window / 255 - mean.double().numpy()) / std.double().numpy()).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(results))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize(
    ("height", "width", "padding"),
    [
        pytest.param(32, 32, 4, id="cifar"),
        pytest.param(7, 5, 3, id="odd and not square: rows and columns must not be swapped"),
        pytest.param(7, 5, 0, id="no padding: only the mirror is left"),
        pytest.param(5, 7, 4, id="the largest padding that reflects"),
        pytest.param(1, 1, 0, id="a single pixel"),
    ],
)
def test_equals_numpy_sample_by_sample(height, width, padding, memory_format):
    sample = draw(height=height, width=width, padding=padding)
    got = functional.augment(*sample, mean=MEAN, std=STD, padding=padding, memory_format=memory_format)
    assert got.dtype == torch.float32
    assert got.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(got.double(), one_by_one(*sample, padding=padding), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
def test_every_offset(mirrored):
    padding = 2
    images = draw(n=1)[0]
    offsets = torch.tensor(list(itertools.product(range(5), repeat=2)))
    sample = (images, torch.zeros(25, dtype=torch.long), offsets, torch.full((25,), mirrored))
    got = functional.augment(*sample, mean=MEAN, std=STD, padding=padding)
    torch.testing.assert_close(got.double(), one_by_one(*sample, padding=padding), rtol=1e-6, atol=1e-6)


def test_mirror_comes_before_crop():
    """A row 0 1 2 padded by 1 is 1 0 1 2 1, mirrored 1 2 1 0 1; its crop at 0 is 1 2 1. Crop first would give 1 0 1."""
    images = torch.tensor([0, 1, 2], dtype=torch.uint8).reshape(1, 1, 3, 1).expand(1, 3, 3, 1)
    got = functional.augment(
        images,
        torch.tensor([0]),
        torch.tensor([[1, 0]]),
        torch.tensor([True]),
        mean=torch.zeros(1),
        std=torch.ones(1),
        padding=1,
    )
    assert (got * 255).round().int()[0, 0, 0].tolist() == [1, 2, 1]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_normalize_has_the_bits_of_torchvision(memory_format):
    """The published recipes use ToTensor and Normalize; all 256 values in each channel."""
    transforms = pytest.importorskip("torchvision.transforms")
    image = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3)
    published = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN.tolist(), STD.tolist())])
    got = functional.normalize(image, mean=MEAN, std=STD, memory_format=memory_format)
    assert torch.equal(got[0], published(image[0].numpy()))
    assert got.is_contiguous(memory_format=memory_format)


def test_centre_crop_without_mirror_is_normalize():
    images, indices, offsets, flips = draw(padding=3)
    got = functional.augment(
        images, indices, torch.full_like(offsets, 3), torch.zeros_like(flips), mean=MEAN, std=STD, padding=3
    )
    assert torch.equal(got, functional.normalize(images[indices], mean=MEAN, std=STD))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_round_once(dtype, memory_format):
    sample = draw()
    exact = one_by_one(*sample, padding=3)
    got = functional.augment(*sample, mean=MEAN, std=STD, padding=3, dtype=dtype, memory_format=memory_format)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=memory_format)
    # Half an ulp of the result, plus fp32's own error for the 16-bit types.
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float64 else 1e-15
    torch.testing.assert_close(got.double(), exact, rtol=1.01 * rounding, atol=1e-6 if dtype != torch.float64 else 0)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_graph_break(compiler, memory_format):
    sample = draw()

    def step(*tensors):
        return functional.augment(*tensors, mean=MEAN, std=STD, padding=3, memory_format=memory_format)

    got = torch.compile(step, fullgraph=True, backend=compiler)(*sample)
    assert torch.equal(got, step(*sample))
    assert got.stride() == step(*sample).stride()


def test_needs_no_value_on_the_host():
    """On meta tensors any read of a value raises, so a pass means that no step waits for the device."""
    sample = [tensor.to("meta") for tensor in draw()]
    got = functional.augment(*sample, mean=MEAN.to("meta"), std=STD.to("meta"), padding=3)
    assert got.shape == (12, 3, 7, 5)


def test_inputs_are_left_alone_and_may_be_strided_views():
    images, indices, offsets, flips = draw(n=10)
    view = images[::2]
    before = images.clone()
    got = functional.augment(view, indices % 5, offsets, flips, mean=MEAN, std=STD, padding=3)
    same = functional.augment(view.clone(), indices % 5, offsets, flips, mean=MEAN, std=STD, padding=3)
    assert torch.equal(got, same)
    assert torch.equal(images, before)


def test_empty_batch():
    images, indices, offsets, flips = draw()
    got = functional.augment(images, indices[:0], offsets[:0], flips[:0], mean=MEAN, std=STD, padding=3)
    assert got.shape == (0, 3, 7, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(5, 7, 5, 3)}, r"images must be torch.uint8 \[N, H, W, C\] .* got torch.float32"),
        ({"images": torch.zeros(5, 7, 5, dtype=torch.uint8)}, r"images must be .* got torch.uint8 \[5, 7, 5\]"),
        ({"indices": torch.zeros(12, dtype=torch.int32)}, "indices must be torch.int64"),
        ({"offsets": torch.zeros(12, 3, dtype=torch.long)}, r"offsets must be torch.int64 \[12, 2\]"),
        ({"offsets": torch.zeros(11, 2, dtype=torch.long)}, r"offsets must be torch.int64 \[12, 2\]"),
        ({"flips": torch.zeros(12)}, r"flips must be torch.bool \[12\]"),
        ({"flips": torch.zeros(12, dtype=torch.bool, device="meta")}, "flips must be .* on cpu, got .* on meta"),
        ({"mean": torch.zeros(1)}, r"mean must be torch.float32 \[3\]"),
        ({"std": torch.ones(3, dtype=torch.float64)}, r"std must be torch.float32 \[3\]"),
        ({"padding": 5}, "padding must be at least 0 and smaller than both sides of the 7x5 images.* got 5"),
        ({"padding": -1}, "padding must be at least 0 .* got -1"),
        ({"dtype": torch.int32}, "dtype must be a floating point type, got torch.int32"),
        ({"memory_format": torch.preserve_format}, "memory_format must be .* got torch.preserve_format"),
    ],
)
def test_wrong_argument_is_named_in_one_line(change, message):
    names = ("images", "indices", "offsets", "flips")
    arguments = {**dict(zip(names, draw(), strict=True)), "mean": MEAN, "std": STD, "padding": 3, **change}
    tensors = [arguments.pop(name) for name in names]
    with pytest.raises(InputError, match=message) as caught:
        functional.augment(*tensors, **arguments)
    assert "\n" not in str(caught.value)


def test_normalize_checks_too():
    with pytest.raises(InputError, match=r"mean must be torch.float32 \[3\]"):
        functional.normalize(draw()[0], mean=torch.zeros(4), std=STD)


def test_backend_that_does_not_exist_here_is_refused():
    with pytest.raises(BackendUnavailableError, match="augment cannot run on backend 'cuda'"):
        functional.augment(*draw(), mean=MEAN, std=STD, padding=3, backend="cuda")
