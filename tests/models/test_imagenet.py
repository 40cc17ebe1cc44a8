"""The ImageNet ResNets are torchvision's with their stages tapped, and methods run on four stages."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from fastfuse.errors import InputError
from fastfuse.methods import build_method
from fastfuse.models import build
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep
from tests.nn.stacking import untidy

torchvision = pytest.importorskip("torchvision")

STAGES = ("layer1", "layer2", "layer3", "layer4")
CHANNELS = (64, 128, 256, 512)
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
CLASSES = 7


def parameters(blocks: tuple[int, ...], classes: int) -> int:
    """Basic blocks of two 3x3 convolutions and norms; a 1x1 shortcut with a norm where the width changes."""
    total, c_in = 7 * 7 * 3 * 64 + 2 * 64, 64
    for n, c_out in zip(blocks, CHANNELS, strict=True):
        total += 9 * c_in * c_out + (2 * n - 1) * 9 * c_out * c_out + 2 * n * 2 * c_out
        total += (c_in * c_out + 2 * c_out) * (c_in != c_out)
        c_in = c_out
    return total + (c_in + 1) * classes


@pytest.mark.parametrize(("name", "published"), [("resnet18", 11_689_512), ("resnet34", 21_797_672)])
def test_parameter_count_follows_from_the_architecture(name, published):
    for classes in (1000, CLASSES):
        with torch.device("meta"):
            network = build(name, classes)
        assert sum(p.numel() for p in network.parameters()) == parameters(BLOCKS[name], classes)
    assert parameters(BLOCKS[name], 1000) == published


def torchvisions(name: str, images: torch.Tensor, network: nn.Module) -> list[torch.Tensor]:
    """Logits and the stages' maps of a torchvision network, copied as they are made: changes in place would show."""
    taps: list[torch.Tensor] = []
    for stage in STAGES:
        network.get_submodule(stage).register_forward_hook(lambda _, __, y: taps.append(y.clone()))
    return [network(images), *taps]


@pytest.mark.parametrize(
    ("name", "height", "width", "training", "form"),
    [
        pytest.param("resnet18", 64, 64, True, torch.contiguous_format, id="resnet18, even, batch statistics"),
        pytest.param("resnet18", 45, 71, True, torch.channels_last, id="resnet18, odd, not square, channels-last"),
        pytest.param("resnet34", 33, 33, False, torch.channels_last, id="resnet34, odd, running statistics"),
    ],
)
def test_logits_and_taps_are_torchvisions(name, height, width, training, form):
    network = untidy(build(name, CLASSES)).train(training)
    theirs = torchvision.models.get_model(name, num_classes=CLASSES).double()
    theirs.load_state_dict(network.state_dict(), strict=True)
    theirs.train(training)
    images = torch.randn(3, 3, height, width, dtype=torch.float64)
    wanted = torchvisions(name, images, theirs)
    logits, maps = network.to(memory_format=form)(images.contiguous(memory_format=form))
    for found, right in zip((logits, *maps), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)
    sides = [(math.ceil(height / step), math.ceil(width / step)) for step in (4, 8, 16, 32)]
    shapes = [(3, channels, *side) for channels, side in zip(network.feature_channels, sides, strict=True)]
    assert [tuple(m.shape) for m in maps] == shapes and network.feature_channels == CHANNELS
    assert all(m.is_contiguous(memory_format=form) for m in maps)
    # The statistics of a training batch, and back into an ordinary network of ours.
    build(name, CLASSES).load_state_dict(theirs.state_dict(), strict=True)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(network.state_dict()[key], value, rtol=1e-10, atol=1e-10)


def test_gradients_through_every_tap_are_torchvisions():
    network = untidy(build("resnet18", CLASSES))
    theirs = torchvision.models.resnet18(num_classes=CLASSES).double()
    theirs.load_state_dict(network.state_dict())
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    logits, maps = network(images)
    weights = [torch.randn_like(x) for x in (logits, *maps)]
    for outputs in ((logits, *maps), torchvisions("resnet18", images, theirs)):
        torch.autograd.backward(list(outputs), weights)
    for (key, ours), right in zip(network.named_parameters(), theirs.parameters(), strict=True):
        bound = 1e-10 * right.grad.abs().max().item()
        torch.testing.assert_close(ours.grad, right.grad, rtol=0, atol=bound, msg=key)


def test_starts_as_torchvision_does():
    torch.manual_seed(3)
    ours = build("resnet18", CLASSES).state_dict()
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=CLASSES).state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("size", [64, pytest.param(33, id="33: maps that do not double")])
def test_ffsd_trains_on_four_stages(size):
    torch.manual_seed(0)
    method = build_method("ffsd", model="resnet18", students=2, num_classes=CLASSES).train()
    stages = {name: [s.deconv.weight.shape[:2] for s in t.stages] for name, t in method.criterion.transforms.items()}
    assert stages == {name: [(512, 256), (256, 128), (128, 64)] for name in ("student1", "leader")}
    before = copy.deepcopy(method.state_dict())
    step = TrainStep(method, build_optimizers(method, lr=0.01), amp="off")
    output = step(torch.randn(4, 3, size, size), torch.arange(4), torch.tensor(9.0))
    assert all(value.isfinite() and value > 0 for value in output.terms.values()), output.terms
    still = [name for name, value in method.state_dict().items() if torch.equal(value, before[name])]
    assert still == []


@pytest.mark.parametrize("size", [32, 64])
def test_methods_without_diversity_train_on_small_images_too(size):
    method = build_method("dml", model="resnet18", students=2, num_classes=CLASSES).train()
    output = method(torch.randn(4, 3, size, size), torch.arange(4), torch.tensor(0.0))
    output.loss.backward()
    assert output.loss.isfinite() and all(p.grad.any() for p in method.parameters())


def test_diversity_of_a_last_map_of_one_position_is_refused():
    """Its threshold is the value at rank H W / 3, which a map of one position does not have."""
    method = build_method("ffsd", model="resnet18", students=2, num_classes=CLASSES).train()
    with pytest.raises(InputError, match=r"512, 1, 1.* at least 3 positions; use larger images"):
        method(torch.randn(4, 3, 32, 32), torch.arange(4), torch.tensor(2.0))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        pytest.param("resnet18", {"conv_bias": True}, "resnet18 has no option conv_bias", id="an option of others"),
        pytest.param("resnet36", {}, r"6n \+ 2.*; those of ImageNet are 18 and 34", id="a depth of neither family"),
        pytest.param("resnet_18", {}, "did you mean .*resnet18", id="misspelt"),
    ],
)
def test_bad_requests_say_what_was_expected(name, options, says):
    with pytest.raises(InputError, match=says):
        build(name, CLASSES, **options)


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match=r"resnet34 needs torchvision, which cannot be imported.*resnet32"):
        build("resnet34", CLASSES)
    assert build("resnet8", CLASSES).feature_channels == (16, 32, 64)
