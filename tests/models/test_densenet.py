"""DenseNets for small images: their size, and every value against a forward pass written out here."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse.errors import InputError
from fastfuse.models import build
from tests.nn.stacking import untidy


def parameters(depth: int, growth: int, classes: int, first: int) -> int:
    """A norm stands before each convolution; 3x3 ones in the blocks, 1x1 ones that keep the width between them."""
    total, width = 3 * 9 * first, first
    for stage in range(3):
        for _ in range((depth - 4) // 3):
            total += 2 * width + 9 * width * growth
            width += growth
        total += 2 * width + (width * width if stage < 2 else 0)
    return total + (width + 1) * classes


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize(("depth", "growth"), [(40, 12), (10, 4), (100, 24)])
def test_parameter_count_follows_from_the_architecture(depth, growth, classes):
    with torch.device("meta"):
        network = build(f"densenet{depth}_{growth}", classes)
    assert sum(p.numel() for p in network.parameters()) == parameters(depth, growth, classes, 2 * growth)


def test_the_papers_own_network_is_an_option():
    """Table 2 of the paper: L = 40, k = 12 has 1.0 M parameters."""
    with torch.device("meta"):
        network = build("densenet40_12", 10, first_channels=16)
    count = sum(p.numel() for p in network.parameters())
    assert count == parameters(40, 12, 10, 16) and round(count / 1e6, 1) == 1.0
    assert network.conv1.out_channels == 16 and network.feature_channels == (160, 304, 448)


def test_taps_have_the_published_widths():
    network = build("densenet40_12", 100).eval()
    with torch.no_grad():
        features = network(torch.randn(1, 3, 32, 32)).features
    assert [tuple(f.shape[1:]) for f in features] == [(168, 32, 32), (312, 16, 16), (456, 8, 8)]
    assert network.feature_channels == (168, 312, 456)


def activated(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    """Batch norm by batch statistics, as in training, then ReLU."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    weight, bias = (state[f"{key}.{part}"][:, None, None] for part in ("weight", "bias"))
    return ((x - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)


def halved(x: Tensor) -> Tensor:
    """Mean over 2x2 windows, at an odd edge over what is there."""
    rows = torch.stack([x[:, :, i : i + 2].mean(2) for i in range(0, x.shape[2], 2)], 2)
    return torch.stack([rows[..., i : i + 2].mean(3) for i in range(0, x.shape[3], 2)], 3)


def written_out(state: dict[str, Tensor], x: Tensor, layers: int) -> list[Tensor]:
    """Logits and the three taps from the state dict alone."""
    taps, x = [], F.conv2d(x, state["conv1.weight"], padding=1)
    for stage in (1, 2, 3):
        for layer in range(layers):
            key = f"dense{stage}.{layer}"
            made = F.conv2d(activated(state, f"{key}.bn1", x), state[f"{key}.conv1.weight"], padding=1)
            x = torch.cat([x, made], 1)
        taps.append(x)
        if stage < 3:
            x = F.conv2d(activated(state, f"trans{stage}.bn1", x), state[f"trans{stage}.conv1.weight"])
            x = halved(x)
    taps[2] = activated(state, "bn", x)
    return [F.linear(taps[2].mean((2, 3)), state["fc.weight"], state["fc.bias"]), *taps]


@pytest.mark.parametrize(
    ("height", "width", "form", "options"),
    [
        pytest.param(12, 12, torch.contiguous_format, {}, id="even"),
        pytest.param(11, 14, torch.channels_last, {}, id="odd at both poolings, not square, channels-last"),
        pytest.param(9, 9, torch.contiguous_format, {"first_channels": 3}, id="another stem"),
    ],
)
def test_forward_is_the_written_out_one(height, width, form, options):
    network = untidy(build("densenet10_4", 7, **options)).to(memory_format=form)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    logits, features = network(images.contiguous(memory_format=form))
    for actual, wanted in zip(
        (logits, *features), written_out(dict(network.named_parameters()), images, 2), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)
    sides = [(math.ceil(height / step), math.ceil(width / step)) for step in (1, 2, 4)]
    assert [tuple(f.shape[1:]) for f in features] == [
        (channels, *side) for channels, side in zip(network.feature_channels, sides, strict=True)
    ]
    assert all(f.is_contiguous(memory_format=form) for f in features)


def test_gradients_through_every_tap_are_those_of_the_written_out_forward():
    """An in-place ReLU that overwrote a tapped map would show here."""
    network = untidy(build("densenet10_4", 7))
    images = torch.randn(2, 3, 10, 10, dtype=torch.float64)
    logits, features = network(images)
    weights = [torch.randn_like(x) for x in (logits, *features)]
    parameters = dict(network.named_parameters())
    found, wanted = (
        torch.autograd.grad(list(outputs), list(parameters.values()), weights)
        for outputs in ((logits, *features), written_out(parameters, images, 2))
    )
    for name, ours, right in zip(parameters, found, wanted, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-8, atol=1e-8 * right.abs().max().item(), msg=name)


def test_first_two_taps_are_signed_and_the_last_is_rectified():
    shallow, middle, deep = build("densenet10_4", 7)(torch.randn(2, 3, 16, 16)).features
    assert shallow.min() < 0 and middle.min() < 0
    assert deep.min() == 0


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        pytest.param("densenet41_12", {}, r"3n \+ 4", id="a depth that is not 3n + 4"),
        pytest.param("densenet4_12", {}, r"3n \+ 4", id="3n + 4 with n = 0"),
        pytest.param("densenet40_0", {}, "at least 1", id="no growth"),
        pytest.param("densenet40_12", {"first_channels": 0}, "first_channels must be at least 1", id="no stem"),
        pytest.param("densenet40_12", {"compression": 2}, "unknown option of densenet40_12", id="no such option"),
        pytest.param("densenet40-12", {}, "did you mean densenet40_12", id="a name with the paper's dash"),
    ],
)
def test_bad_requests_say_what_was_expected(name, options, says):
    with pytest.raises(InputError, match=says) as raised:
        build(name, 10, **options)
    assert "\n" not in str(raised.value)
