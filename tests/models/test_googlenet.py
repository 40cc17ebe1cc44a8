"""GoogLeNet for small images: its size, and every value against a forward pass written out here."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse.errors import InputError
from fastfuse.models import build
from tests.nn.stacking import untidy

# Szegedy et al., 2015, table 1: what a module reads, and its #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj.
TABLE = {
    "3a": (192, 64, 96, 128, 16, 32, 32),
    "3b": (256, 128, 128, 192, 32, 96, 64),
    "4a": (480, 192, 96, 208, 16, 48, 64),
    "4b": (512, 160, 112, 224, 24, 64, 64),
    "4c": (512, 128, 128, 256, 24, 64, 64),
    "4d": (512, 112, 144, 288, 32, 64, 64),
    "4e": (528, 256, 160, 320, 32, 128, 128),
    "5a": (832, 256, 160, 320, 32, 128, 128),
    "5b": (832, 384, 192, 384, 48, 128, 128),
}
MODULES = {f"stage{int(name[0]) - 2}.{'abcde'.index(name[1])}": name for name in TABLE}


def convolutions(split: bool) -> list[tuple[int, int, int]]:
    """(channels in, channels out, kernel) of every convolution."""
    found = [(3, 192, 3)]
    for c_in, one, before3, three, before5, five, projected in TABLE.values():
        found += [(c_in, one, 1), (c_in, before3, 1), (before3, three, 3), (c_in, before5, 1), (c_in, projected, 1)]
        found += [(before5, five, 3), (five, five, 3)] if split else [(before5, five, 5)]
    return found


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_parameter_count_follows_from_the_papers_table(bias, split, classes):
    given = {} if bias and split else {"conv_bias": bias, "split_5x5": split}  # the published form needs no option
    with torch.device("meta"):
        network = build("googlenet", classes, **given)
    layers = convolutions(split)
    expected = sum(k * k * c_in * c_out + (2 + bias) * c_out for c_in, c_out, k in layers) + 1025 * classes
    assert sum(p.numel() for p in network.parameters()) == expected


def activated(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    """The convolution `key`, then batch norm by batch statistics, as in training, and ReLU."""
    name, index = key.rsplit(".", 1)
    weight = state[f"{key}.weight"]
    x = F.conv2d(x, weight, state.get(f"{key}.bias"), padding=weight.shape[-1] // 2)
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    scale, shift = (state[f"{name}.{int(index) + 1}.{part}"][:, None, None] for part in ("weight", "bias"))
    return ((x - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)


def largest(x: Tensor, stride: int) -> Tensor:
    """The maximum over the 3x3 neighbourhood of every position, or of every second one."""
    padded = F.pad(x, (1, 1, 1, 1), value=-math.inf)
    windows = padded.unfold(2, 3, stride).unfold(3, 3, stride)
    return windows.amax((-2, -1))


def written_out(state: dict[str, Tensor], x: Tensor, split: bool) -> list[Tensor]:
    """Logits and the three taps from the state dict alone."""
    taps, x = [], activated(state, "stem.0", x)
    for key, name in MODULES.items():
        if name in ("4a", "5a"):
            x = largest(x, 2)
        three = activated(state, f"{key}.branch3x3.3", activated(state, f"{key}.branch3x3.0", x))
        five = x
        for index in (0, 3, 6)[: 3 if split else 2]:
            five = activated(state, f"{key}.branch5x5.{index}", five)
        projected = activated(state, f"{key}.branch_pool.1", largest(x, 1))
        x = torch.cat([activated(state, f"{key}.branch1x1.0", x), three, five, projected], 1)
        if name in ("3b", "4e", "5b"):
            taps.append(x)
    return [F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"]), *taps]


@pytest.mark.parametrize(
    ("height", "width", "form", "options"),
    [
        pytest.param(8, 8, torch.contiguous_format, {}, id="even"),
        pytest.param(7, 11, torch.channels_last, {}, id="odd at both poolings, not square, channels-last"),
        pytest.param(9, 9, torch.contiguous_format, {"split_5x5": False, "conv_bias": False}, id="the paper's 5x5"),
    ],
)
def test_forward_and_gradients_are_the_written_out_ones(height, width, form, options):
    """Gradients through every tap: an in-place ReLU that overwrote a tapped map would show here."""
    network = untidy(build("googlenet", 7, **options)).to(memory_format=form)
    parameters = dict(network.named_parameters())
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    logits, features = network(images.contiguous(memory_format=form))
    outputs = (logits, *features), written_out(parameters, images, options.get("split_5x5", True))
    for actual, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)
    sides = [(math.ceil(height / step), math.ceil(width / step)) for step in (1, 2, 4)]
    shapes = [(channels, *side) for channels, side in zip((480, 832, 1024), sides, strict=True)]
    assert [tuple(f.shape[1:]) for f in features] == shapes and network.feature_channels == (480, 832, 1024)
    assert all(f.is_contiguous(memory_format=form) for f in features)
    weights = [torch.randn_like(x) for x in outputs[0]]
    # A bias before a batch norm has no gradient but rounding.
    own = {key: p for key, p in parameters.items() if p.dim() == 4 or key.startswith("fc") or key[-1:] == "t"}
    found, right = (torch.autograd.grad(list(given), list(own.values()), weights) for given in outputs)
    for key, ours, wanted in zip(own, found, right, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-7, atol=1e-7 * wanted.abs().max().item(), msg=key)


def test_all_taps_are_rectified():
    for feature in build("googlenet", 7)(torch.randn(2, 3, 8, 8)).features:
        assert feature.min() == 0 and feature.max() > 0


def test_dropout_is_off_as_published_and_on_where_asked():
    images = torch.randn(2, 3, 8, 8)
    published, asked = build("googlenet", 7), build("googlenet", 7, dropout=0.4)
    assert torch.equal(published(images).logits, published(images).logits)
    assert not torch.equal(asked(images).logits, asked(images).logits)
    asked.eval()
    assert torch.equal(asked(images).logits, asked(images).logits)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        pytest.param("googlenet", {"dropout": 1.0}, "dropout must be from 0 to below 1, not 1.0", id="all dropped"),
        pytest.param("googlenet", {"split": True}, "did you mean split_5x5", id="a misspelt option"),
        pytest.param("goolenet", {}, "did you mean googlenet", id="a misspelt name"),
    ],
)
def test_bad_requests_say_what_was_expected(name, options, says):
    with pytest.raises(InputError, match=says) as raised:
        build(name, 10, **options)
    assert "\n" not in str(raised.value)
