"""Each named deviation of the published Wide ResNets does what it says, against a forward pass written out here."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse.models import build

CHOICES = {"conv_bias": (True, False), "stride_on": ("conv2", "conv1"), "shortcut_input": ("raw", "activated")}


def normed(state: dict[str, Tensor], key: str, x: Tensor) -> Tensor:
    """Batch norm by batch statistics, as in training, then ReLU."""
    mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
    weight, bias = (state[f"{key}.{part}"][:, None, None] for part in ("weight", "bias"))
    return ((x - mean) / (variance + 1e-5).sqrt() * weight + bias).clamp(min=0)


def convolved(state: dict[str, Tensor], key: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = state[f"{key}.weight"]
    return F.conv2d(x, weight, state.get(f"{key}.bias"), stride, padding=weight.shape[-1] // 2)


def written_out(state: dict[str, Tensor], x: Tensor, depth: int, stride_on: str, shortcut_input: str) -> list[Tensor]:
    """Logits and the three taps from the state dict alone."""
    taps, x = [], convolved(state, "conv1", x)
    for stage, block in itertools.product((1, 2, 3), range((depth - 4) // 6)):
        key, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
        first, second = (stride, 1) if stride_on == "conv1" else (1, stride)
        activated = normed(state, f"{key}.bn1", x)
        hidden = convolved(state, f"{key}.conv1", activated, first)
        out = convolved(state, f"{key}.conv2", normed(state, f"{key}.bn2", hidden), second)
        if f"{key}.shortcut.0.weight" in state:
            x = convolved(state, f"{key}.shortcut.0", activated if shortcut_input == "activated" else x, stride)
        x = out + x
        taps = [*taps[: stage - 1], x]
    taps[2] = normed(state, "bn1", x)
    return [F.linear(taps[2].mean((2, 3)), state["fc.weight"], state["fc.bias"]), *taps]


@pytest.mark.parametrize(
    "name", ["wrn10_2", "wrn16_1"]
)  # a convolved first shortcut; two blocks and a plain first shortcut
@pytest.mark.parametrize("values", list(itertools.product(*CHOICES.values())), ids=str)
def test_forward_is_the_written_out_one_for_every_option(name, values):
    options = dict(zip(CHOICES, values, strict=True))
    network = build(name, 10, **options).double()
    state = {key: torch.randn_like(value) if value.dim() == 1 else value for key, value in network.state_dict().items()}
    network.load_state_dict(state)  # biases and batch-norm weights that are not 0 and 1
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    logits, features = network(images)
    depth = int(name[3:5])
    expected = written_out(state, images, depth, options["stride_on"], options["shortcut_input"])
    for actual, wanted in zip((logits, *features), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("option", "other"), [("stride_on", "conv1"), ("shortcut_input", "activated")])
def test_an_option_changes_the_values_and_no_key(option, other):
    published, changed = build("wrn10_2", 10), build("wrn10_2", 10, **{option: other})
    changed.load_state_dict(published.state_dict(), strict=True)
    images = torch.randn(2, 3, 16, 16)
    assert not torch.allclose(published(images).logits, changed(images).logits, atol=1e-3)


@pytest.mark.parametrize(("stride_on", "strided"), [("conv1", "conv1"), ("conv2", "conv2"), (None, "conv2")])
def test_stride_sits_where_asked_and_on_the_shortcut(stride_on, strided):
    network = build("wrn16_2", 10, **({"stride_on": stride_on} if stride_on else {}))
    found = {name for name, layer in network.named_modules() if getattr(layer, "stride", (1, 1)) == (2, 2)}
    assert found == {f"layer{stage}.0.{part}" for stage in (2, 3) for part in (strided, "shortcut.0")}


def test_conv_bias_is_the_only_difference_in_keys():
    biased, plain = (set(build("wrn16_2", 10, conv_bias=bias).state_dict()) for bias in (True, False))
    convolutions = {"conv1", *(f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1) for c in (1, 2))}
    convolutions |= {f"layer{stage}.0.shortcut.0" for stage in (1, 2, 3)}
    assert biased - plain == {f"{name}.bias" for name in convolutions}
    assert plain < biased


@pytest.mark.parametrize(("options", "momentum"), [({}, 0.9), ({"last_norm_momentum": 0.1}, 0.1)])
def test_last_norm_keeps_one_minus_momentum_of_the_old_mean(options, momentum):
    network = build("wrn10_1", 10, **options).double()
    seen = []
    network.bn1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.bn1.running_mean.fill_(5.0)
    network(torch.randn(4, 3, 8, 8, dtype=torch.float64))
    expected = (1 - momentum) * 5.0 + momentum * seen[0].mean((0, 2, 3))
    torch.testing.assert_close(network.bn1.running_mean, expected, rtol=1e-12, atol=1e-12)
    assert {layer.momentum for name, layer in network.named_modules() if name.endswith((".bn1", ".bn2"))} == {0.1}


def test_first_two_taps_are_signed_and_the_last_is_rectified():
    shallow, middle, deep = build("wrn16_2", 10)(torch.randn(2, 3, 32, 32)).features
    assert shallow.min() < 0 and middle.min() < 0
    assert deep.min() == 0
