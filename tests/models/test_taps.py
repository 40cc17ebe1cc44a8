"""Taps named by their layers, of our networks and of others'."""

import pytest
import torch

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.methods import build_method


@pytest.mark.parametrize(
    ("name", "taps", "channels"),
    [
        ("resnet8", ("layer1.0.conv1", "layer3"), (16, 64)),
        ("wrn10_1", ("layer2", "layer3"), (32, 64)),
        ("torchvision:resnet18", ("layer2.1.conv2", "layer4"), (128, 512)),
    ],
)
def test_features_are_the_maps_of_the_layers(name, taps, channels):
    torch.manual_seed(0)
    network = models.build(name, 5, taps=taps)
    torch.manual_seed(0)
    plain = models.build(name, 5)
    assert network.feature_channels == channels
    assert list(network.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(network.state_dict(), strict=True)
    images, seen = torch.randn(2, 3, 64, 64), {}
    inner = getattr(plain, "network", plain)
    for path in taps:
        inner.get_submodule(path).register_forward_hook(lambda m, a, y, path=path: seen.setdefault(path, y))
    ours, theirs = network(images), plain(images)
    assert torch.equal(ours.logits, theirs.logits)
    assert all(torch.equal(feature, seen[path]) for feature, path in zip(ours.features, taps, strict=True))


def test_a_method_takes_them_for_the_model_alone():
    method = build_method(
        "ffsd", model="resnet8", students=2, leader="resnet14", taps=("layer1", "layer2", "layer3"), num_classes=5
    )
    assert [type(network).__name__ for network in method.peers] == ["Tapped", "Tapped", "CifarResNet"]
    assert method(torch.randn(2, 3, 16, 16), torch.tensor([0, 1]), torch.tensor(0.0)).loss.isfinite()


@pytest.mark.parametrize(
    ("taps", "said"),
    [
        (("layer9",), "unknown layer of CifarResNet 'layer9': did you mean layer3"),
        (("fc",), "the layer gives .2, 5., not a map"),
        (("layer3", "layer1"), "shallow to deep"),
        (("layer1.0.relu",), "ran 2 times"),
    ],
)
def test_layers_that_cannot_be_tapped_are_named(taps, said):
    with pytest.raises(InputError, match=said):
        models.build("resnet8", 5, taps=taps)
