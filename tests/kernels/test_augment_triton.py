"""augment's kernel, in the interpreter where there is no GPU: the bits of the reference, element for element.

The reference runs on the CPU: eager CUDA code multiplies by 1 / 255, the published transforms and the kernel divide.
"""

import itertools

import pytest
import torch

from fastfuse import functional
from fastfuse.errors import InputError
from fastfuse.kernels.augment import triton_kernels
from fastfuse.testing import assert_within_budget

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN = torch.tensor([0.5071, 0.4865, 0.4409, 0.3], device=DEVICE)
STD = torch.tensor([0.2673, 0.2564, 0.2762, 0.4], device=DEVICE)
FORMATS = [torch.contiguous_format, torch.channels_last]
each_format = pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])


def draw(n=5, height=7, width=5, batch=6, padding=3, channels=3):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, height, width, channels), generator=generator, dtype=torch.uint8)
    indices = torch.randint(0, n, (batch,), generator=generator)
    offsets = torch.randint(0, 2 * padding + 1, (batch, 2), generator=generator)
    flips = torch.randint(0, 2, (batch,), generator=generator, dtype=torch.bool)
    return [x.to(DEVICE) for x in (images, indices, offsets, flips)]


def both(sample, *, mean=None, std=None, **options):
    """Kernel and reference on the same images, both results on the CPU."""
    channels = sample[0].shape[3]
    tensors = [*sample, MEAN[:channels] if mean is None else mean, STD[:channels] if std is None else std]

    def call(backend, *draws, mean, std):
        return functional.augment(*draws, mean=mean, std=std, backend=backend, **options).cpu()

    return [
        call(backend, *given[:4], mean=given[4], std=given[5])
        for backend, given in (("triton", tensors), ("reference", [x.cpu() for x in tensors]))
    ]


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("height", "width", "padding", "channels"),
    [
        pytest.param(32, 32, 4, 3, id="cifar"),
        pytest.param(7, 5, 3, 3, id="odd and not square: rows and columns must not be swapped"),
        pytest.param(5, 7, 4, 4, id="the largest padding that reflects; four channels"),
        pytest.param(7, 5, 0, 1, id="no padding, one channel: both formats are one"),
        pytest.param(1, 1, 0, 3, id="a single pixel"),
        pytest.param(3, 130, 2, 3, id="rows longer than a block's run"),
    ],
)
def test_has_the_bits_of_the_reference(height, width, padding, channels, dtype, memory_format, nan_filled):
    sample = draw(height=height, width=width, padding=padding, channels=channels)
    ours, eager = both(sample, padding=padding, dtype=dtype, memory_format=memory_format)
    assert torch.equal(ours, eager)
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=memory_format)


@each_format
def test_bfloat16(memory_format, nan_filled):
    """Within the error budget only: the interpreter cuts off where the hardware rounds."""
    options = {"padding": 3, "memory_format": memory_format}
    ours, eager = both(draw(), dtype=torch.bfloat16, **options)
    assert_within_budget(ours, both(draw(), dtype=torch.float64, **options)[1], eager)


@each_format
@pytest.mark.parametrize("mirrored", [False, True])
def test_every_offset(mirrored, memory_format, nan_filled):
    offsets = torch.tensor(list(itertools.product(range(5), repeat=2)), device=DEVICE)
    flips = torch.full((25,), mirrored, device=DEVICE)
    sample = [draw(n=1)[0], torch.zeros(25, dtype=torch.long, device=DEVICE), offsets, flips]
    ours, eager = both(sample, padding=2, memory_format=memory_format)
    assert torch.equal(ours, eager)


def test_every_value_of_a_byte(nan_filled):
    """256 values, each normalised in each of four channels: division must be rounded as eager rounds it."""
    image = torch.arange(256, dtype=torch.uint8, device=DEVICE).reshape(1, 16, 16, 1).expand(1, 16, 16, 4)
    centre = torch.full((1, 2), 0, device=DEVICE)
    sample = [image, torch.tensor([0], device=DEVICE), centre, torch.tensor([False], device=DEVICE)]
    ours, eager = both(sample, padding=0)
    assert torch.equal(ours, eager)
    assert len(ours[0, 0].unique()) == 256


@each_format
def test_several_blocks_in_each_direction(memory_format, monkeypatch, nan_filled):
    monkeypatch.setattr(triton_kernels, "TILE", 8)
    monkeypatch.setattr(triton_kernels, "LONGEST_RUN", 4)
    ours, eager = both(draw(batch=2), padding=3, memory_format=memory_format)
    assert torch.equal(ours, eager)


@each_format
def test_strided_views_are_read_where_they_lie(memory_format, nan_filled):
    images, indices, offsets, flips = draw(n=10)
    views = [
        images.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)[::2],
        indices.repeat_interleave(2)[::2] % 5,
        offsets.t().contiguous().t(),
        flips.repeat_interleave(3)[::3],
    ]
    spread = [x.repeat_interleave(2)[::2] for x in (MEAN[:3], STD[:3])]
    ours = both(views, mean=spread[0], std=spread[1], padding=3, memory_format=memory_format)[0]
    plain = both([x.contiguous() for x in views], padding=3, memory_format=memory_format)[1]
    assert torch.equal(ours, plain)


def test_one_statistic_for_all_channels(nan_filled):
    ours, eager = both(draw(), mean=MEAN[:1].expand(3), std=STD[:1].expand(3), padding=3)
    assert torch.equal(ours, eager)


@each_format
def test_empty_batch(memory_format):
    images, *rest = draw()
    ours = both([images, *(x[:0] for x in rest)], padding=3, memory_format=memory_format)[0]
    assert ours.shape == (0, 3, 7, 5)


def test_there_is_nothing_to_differentiate():
    ours = both(draw(), mean=MEAN[:3].clone().requires_grad_(), padding=3)[0]
    assert not ours.requires_grad


@pytest.mark.parametrize("interpreted", [True, False], ids=["kernel", "closed form"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_schema(channels, channels_last, interpreted, monkeypatch):
    """Shape, dtype and strides of the fake are those of the real output."""
    if not interpreted:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    arguments = (*draw(channels=channels), MEAN[:channels], STD[:channels], 3, torch.float16, channels_last)
    torch.library.opcheck(torch.ops.fastfuse.augment_fwd.default, arguments)


@each_format
def test_compiles_in_one_graph(memory_format):
    torch.compiler.reset()
    options = {"mean": MEAN[:3], "std": STD[:3], "padding": 3, "memory_format": memory_format, "backend": "triton"}

    def step(*tensors):
        return functional.augment(*tensors, **options)

    ours = torch.compile(step, fullgraph=True, backend="aot_eager")(*draw())
    eager = step(*draw())
    assert torch.equal(ours, eager)
    assert ours.stride() == eager.stride()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"padding": 5}, r"padding must be at least 0 and smaller than both sides of the 7x5 images"),
        ({"std": MEAN[:1]}, r"std must be torch.float32 \[3\]"),
    ],
)
def test_refusals_are_those_of_the_reference(change, message):
    with pytest.raises(InputError, match=message):
        both(draw(), **{"padding": 3, **change})
