"""What every network promises: its size, its taps, its recorded losses, and that it stays an ordinary module."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from fastfuse.errors import InputError
from fastfuse.models import IMAGENET, NAMES, build
from tests import replay
from tests.methods.making import branched

SMALL = {
    "resnet8": lambda: build("resnet8", 10),
    "wrn10_2": lambda: build("wrn10_2", 10),
    "branched resnet8": lambda: branched("resnet8", 10, branches=2),
}
# The residual networks for small images; others have test files of their own.
STAGED = [name for name in NAMES if name.startswith(("resnet", "wrn")) and name not in IMAGENET]
SIZES = [
    pytest.param(32, id="32: CIFAR"),
    pytest.param(16, id="16: another even size"),
    pytest.param(27, id="27: odd, so strides must round up"),
]


@pytest.fixture(params=SMALL)
def network(request) -> nn.Module:
    return SMALL[request.param]().double()


def outputs(network: nn.Module, images: torch.Tensor) -> list:
    """One (logits, features) per sub-network."""
    result = network(images)
    return result if isinstance(result, list) else [result]


def flat(results: list) -> list[torch.Tensor]:
    """All tensors of `outputs`."""
    return [tensor for logits, features in results for tensor in (logits, *features)]


def conv(c_in: int, c_out: int, kernel: int, bias: bool = False) -> int:
    return kernel * kernel * c_in * c_out + bias * c_out


def resnet_parameters(depth: int, classes: int) -> int:
    n = (depth - 2) // 6
    total = conv(3, 16, 3) + 2 * 16
    for c_in, c_out in ((16, 16), (16, 32), (32, 64)):
        total += conv(c_in, c_out, 3) + (2 * n - 1) * conv(c_out, c_out, 3) + 2 * n * 2 * c_out
        total += (conv(c_in, c_out, 1) + 2 * c_out) * (c_in != c_out)
    return total + 65 * classes


def wide_parameters(depth: int, width: int, classes: int, bias: bool = True) -> int:
    n = (depth - 4) // 6
    total, c_in = conv(3, 16, 3, bias), 16
    for c_out in (16 * width, 32 * width, 64 * width):
        total += conv(c_in, c_out, 3, bias) + (2 * n - 1) * conv(c_out, c_out, 3, bias)
        total += 2 * c_in + (2 * n - 1) * 2 * c_out  # each batch norm stands before its convolution
        total += conv(c_in, c_out, 1, bias) * (c_in != c_out)
        c_in = c_out
    return total + 2 * c_in + (c_in + 1) * classes


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("name", [*STAGED, "resnet8", "wrn10_1"])
def test_parameter_count_follows_from_the_architecture(name, classes):
    numbers = [int(part) for part in name.removeprefix("resnet").removeprefix("wrn").split("_")]
    expected = resnet_parameters(*numbers, classes) if name.startswith("resnet") else wide_parameters(*numbers, classes)
    with torch.device("meta"):  # the count needs no memory
        network = build(name, classes)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_branches_add_one_last_stage_and_one_classifier_each():
    with torch.device("meta"):
        one, three = (sum(p.numel() for p in branched("resnet20", 100, branches=n).parameters()) for n in (1, 3))
    last_stage = conv(32, 64, 3) + 5 * conv(64, 64, 3) + 6 * 2 * 64 + conv(32, 64, 1) + 2 * 64
    assert one == resnet_parameters(20, 100)
    assert three == one + 2 * (last_stage + 65 * 100)


@pytest.mark.parametrize("size", SIZES)
def test_taps_are_the_three_stages_shallow_to_deep(network, size):
    for logits, features in outputs(network.eval(), torch.randn(2, 3, size, size, dtype=torch.float64)):
        assert logits.shape == (2, 10)
        sides = [size, math.ceil(size / 2), math.ceil(size / 4)]
        expected = [(2, channels, side, side) for channels, side in zip(network.feature_channels, sides, strict=True)]
        assert [tuple(feature.shape) for feature in features] == expected


def recorded(golden, name: str, network: str) -> tuple[dict, dict, torch.Tensor, torch.Tensor]:
    """Initial state of one recorded network, the first step's terms, and the first mini-batch."""
    arrays = np.load(golden / f"{name}.npz")
    state = {
        key.split("/", 2)[2]: torch.from_numpy(arrays[key]) for key in arrays if key.startswith(f"init/{network}/")
    }
    terms = json.loads((golden / f"{name}.json").read_text())["steps"][0]["terms"]
    return state, terms, torch.from_numpy(arrays["x0"]).double(), torch.from_numpy(arrays["y0"])


def assert_cross_entropy(logits, labels, expected):
    loss = nn.functional.cross_entropy(logits, labels).item()
    assert loss == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize("name", ["student0", "student1", "leader"])
def test_ffsd_recording_loads_and_gives_its_first_cross_entropy(golden, name):
    state, terms, images, labels = recorded(golden, "ffsd_resnet20_s2", name)
    backbone = {key: value for key, value in state.items() if not key.startswith("trans_fusion.")}
    network = build("resnet20", backbone["fc.bias"].numel())
    network.load_state_dict(backbone, strict=True)
    expected = terms["leader_ce"] if name == "leader" else terms["student_ce"][int(name[-1])]
    assert_cross_entropy(network.double()(images).logits, labels, expected)


def test_ffl_recording_loads_and_gives_its_first_cross_entropies(golden):
    state, terms, images, labels = recorded(golden, "ffl_resnet20", "network")
    network = branched("resnet20", state["classifiers.0.bias"].numel(), branches=2)
    replay.as_recorded(network).load_state_dict(state, strict=True)
    first, second = network.double()(images)
    assert_cross_entropy(first.logits, labels, terms["ce_sub1"])
    assert_cross_entropy(second.logits, labels, terms["ce_sub2"])


def test_convolutions_start_normal_with_fan_out_variance(network):
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 2000:
            standard = layer.weight.std().item() * math.sqrt(layer.out_channels * math.prod(layer.kernel_size) / 2)
            assert standard == pytest.approx(1, abs=5 / math.sqrt(2 * layer.weight.numel()))  # five sigma
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.weight.eq(1).all() and layer.bias.eq(0).all()


def test_channels_last_gives_the_same_values_and_keeps_its_layout(network):
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = flat(outputs(copy.deepcopy(network), images))
    last = outputs(network.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last))
    for actual, wanted in zip(flat(last), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)
    for _, features in last:
        assert all(feature.is_contiguous(memory_format=torch.channels_last) for feature in features)


def test_compiles_into_one_graph(network):
    torch._dynamo.reset()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = flat(outputs(copy.deepcopy(network), images))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    for actual, wanted in zip(flat(outputs(compiled, images)), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_gradients_through_logits_and_every_tap_are_the_derivative(network):
    """An in-place ReLU that overwrote a tapped map would show here: against central differences.

    The median over a few directions, because a step across the kink of one ReLU spoils a central difference.
    """
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    weights = [torch.randn_like(tensor) for tensor in flat(outputs(network, images))]
    parameters = dict(network.named_parameters())

    def objective(step: float, direction: dict[str, torch.Tensor]) -> torch.Tensor:
        moved = {name: value + step * direction[name] for name, value in parameters.items()}
        result = torch.func.functional_call(network, moved, images)
        tensors = flat(result if isinstance(result, list) else [result])
        return sum((weight * tensor).sum() for weight, tensor in zip(weights, tensors, strict=True))

    errors = []
    for _ in range(5):
        direction = {name: torch.randn_like(value) for name, value in parameters.items()}
        gradients = torch.autograd.grad(objective(0.0, direction), list(parameters.values()))
        slope = sum((gradient * direction[name]).sum() for name, gradient in zip(parameters, gradients, strict=True))
        with torch.no_grad():
            central = (objective(1e-8, direction) - objective(-1e-8, direction)) / 2e-8
        errors.append((central / slope - 1).abs().item())
    assert sorted(errors)[2] < 1e-6


def test_nothing_stays_on_the_module(network):
    def inventory() -> list[tuple[str, set[str], int]]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return [
            (name, set(vars(module)), sum(len(getattr(module, kind)) for kind in hooks))
            for name, module in network.named_modules()
        ]

    before = inventory()
    flat(outputs(network, torch.randn(2, 3, 8, 8, dtype=torch.float64)))[0].sum().backward()
    assert inventory() == before
    assert all(hooks == 0 for _, _, hooks in before)
    held = [value for module in network.modules() for value in vars(module).values()]
    assert not any(isinstance(value, torch.Tensor) for value in held)


def test_a_deep_copy_is_independent(network):
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    outputs(network, images)[0].logits.sum().backward()
    twin = copy.deepcopy(network)
    expected = [tensor.clone() for tensor in flat(outputs(twin.eval(), images))]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    for actual, wanted in zip(flat(outputs(twin, images)), expected, strict=True):
        assert torch.equal(actual, wanted) and wanted.abs().sum() > 0


@pytest.mark.parametrize(
    ("name", "classes", "options", "says"),
    [
        pytest.param("resnet33", 10, {}, "6n \\+ 2", id="a depth that is not 6n + 2"),
        pytest.param("resnet2", 10, {}, "6n \\+ 2", id="6n + 2 with n = 0"),
        pytest.param("wrn15_2", 10, {}, "6n \\+ 4", id="a depth that is not 6n + 4"),
        pytest.param("wrn4_2", 10, {}, "6n \\+ 4", id="6n + 4 with n = 0"),
        pytest.param("wrn16_0", 10, {}, "at least 1", id="no width"),
        pytest.param("restnet20", 10, {}, "did you mean resnet20", id="a misspelt name"),
        pytest.param("wrn16-2", 10, {}, "did you mean wrn16_2", id="a name with the paper's dash"),
        pytest.param("lenet", 10, {}, "known: .*resnet20", id="another family: all names are listed"),
        pytest.param("resnet20", 0, {}, "at least 1", id="no classes"),
        pytest.param("resnet20", 10, {"conv_bias": True}, "conv_bias", id="an option of the other family"),
        pytest.param("wrn16_2", 10, {"stride_on": "conv3"}, "'conv1' or 'conv2'", id="a value that is no choice"),
        pytest.param("wrn16_2", 10, {"shortcut_input": "both"}, "'raw' or 'activated'", id="no such shortcut input"),
        pytest.param("wrn16_2", 10, {"stride": "conv2"}, "stride_on", id="a misspelt option"),
    ],
)
def test_bad_requests_say_what_was_expected(name, classes, options, says):
    with pytest.raises(InputError, match=says) as raised:
        build(name, classes, **options)
    assert "\n" not in str(raised.value)
