"""What cannot be stacked is named, with the strategy that works, and nothing is changed."""

import pytest
import torch
from torch import nn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.models._blocks import NetworkOutput
from fastfuse.nn import Networks, stack, unstack
from tests.nn.stacking import CLASSES, same, tensors, untidy


class Net(nn.Module):
    """A small network with one thing in it that stands in the way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.bn, self.fc = kind, nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, CLASSES)
        odd = {
            "group norm": nn.GroupNorm(2, 4),
            "norm without statistics": nn.BatchNorm2d(4, track_running_stats=False),
            "norm without weights": nn.BatchNorm2d(4, affine=False),
            "cumulative norm": nn.BatchNorm2d(4, momentum=None),
            "dropout": nn.Dropout(0.1),
            "wide flatten": nn.Flatten(0),
            "indices": nn.MaxPool2d(2, return_indices=True),
            "unused": nn.Conv2d(4, 4, 1),
            "grouped images": nn.Conv2d(3, 3, 1, groups=3),
            "linear on a map": nn.Linear(7, 7),
        }
        if kind in odd:
            self.odd = odd[kind]
        if kind == "parameter":
            self.scale = nn.Parameter(torch.ones(()))
        if kind == "shared weights":
            self.again = nn.Conv2d(3, 4, 3)
            self.again.weight = self.conv.weight

    def forward(self, x: torch.Tensor) -> NetworkOutput:
        given = x
        if self.kind == "grouped images":
            x = self.odd(x)
        y = self.bn(self.conv(x)).relu()
        if (
            self.kind in ("group norm", "dropout", "linear on a map", "wide flatten", "indices")
            or "norm w" in self.kind
        ):
            y = self.odd(y)
        change = {
            "cumulative norm": lambda: self.odd(y),
            "cat": lambda: torch.cat([y, y], 1)[:, :4],
            "view": lambda: y.view(y.shape[0], -1, 7, 7),
            "mean": lambda: y.mean(1, keepdim=True).expand_as(y),
            "parameter": lambda: y * self.scale,
            "images added": lambda: y + given[:, :1, 1:-1, 1:-1],
            "images and map": lambda: y + nn.functional.avg_pool2d(x, 3, 1),
            "shared weights": lambda: y + self.again(x),
            "values": lambda: y if y.sum() > 0 else -y,
            "mode": lambda: y if self.training else y.relu(),
        }.get(self.kind, lambda: y)
        y = change()
        flat = nn.functional.adaptive_avg_pool2d(y, 1).flatten(1)
        return NetworkOutput(self.fc(flat), (x if self.kind == "images given back" else y,))


class Mask(Net):
    """Takes a mask besides the images."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> NetworkOutput:
        return super().forward(x)


REFUSED = {
    "mask": "a network of several inputs cannot be stacked: besides the images it takes mask",
    "group norm": r"layer odd \(GroupNorm\)",
    "norm without statistics": r"layer odd \(BatchNorm2d\) cannot be stacked: the norm has no running_mean",
    "norm without weights": r"layer odd \(BatchNorm2d\) cannot be stacked: the norm has no weight",
    "cumulative norm": r"layer odd \(BatchNorm2d\) cannot be stacked: momentum=None",
    "dropout": r"layer odd \(Dropout\) cannot be stacked: .* random numbers",
    "wide flatten": r"layer odd \(Flatten\) cannot be stacked: only flatten\(1\)",
    "indices": r"layer odd \(MaxPool2d\) cannot be stacked: it gives indices",
    "unused": r"Net\.odd\.weight cannot be stacked: the traced forward does not use it",
    "grouped images": r"layer odd \(Conv2d\) cannot be stacked: it reads the images",
    "linear on a map": r"layer odd \(Linear\) cannot be stacked: it reads map",
    "cat": "the call of cat",
    "view": "the call of getattr|the call of view",
    "mean": "the call of mean",
    "parameter": "the use of parameter scale",
    "images added": "the call of getitem",
    "images and map": r"the call of add cannot be stacked: it joins values of different kinds \(images, map\)",
    "shared weights": r"Net\.again\.weight cannot be stacked: it is the same tensor as conv\.weight",
    "values": r"the forward of Net cannot be stacked: it cannot be traced",
    "mode": r"the forward of Net cannot be stacked: it is another one in evaluation",
    "images given back": "the forward of a network cannot be stacked: it gives back",
}


def test_the_small_network_itself_can_be_stacked():
    """The control of the test below."""
    loop = Networks(untidy(Net("")) for _ in range(2))
    x = torch.randn(3, 3, 9, 9, dtype=torch.float64)
    wanted = tensors(loop(x))
    loop.arrange("grouped")
    same(tensors(loop(x)), wanted)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_stacked_is_named(kind):
    own = Networks((Mask if kind == "mask" else Net)(kind) for _ in range(2))
    before = dict(own.named_parameters())
    with pytest.raises(InputError, match=f"^({REFUSED[kind]})") as caught:
        own.arrange("grouped")
    assert str(caught.value).endswith("; use --strategy loop") and "\n" not in str(caught.value)
    assert own.strategy == "loop" and all(p is before[name] for name, p in own.named_parameters())


def changed(what: str) -> nn.Module:
    network = models.build("resnet14" if what == "depth" else "wrn10_1" if what == "family" else "resnet8", CLASSES)
    if what == "classes":
        network = models.build("resnet8", CLASSES + 1)
    elif what == "stride":
        network.layer2[0].conv1.stride = (1, 1)
    elif what == "momentum":
        network.bn1.momentum = 0.3
    elif what == "dtype":
        network.fc.double()
    elif what == "mode":
        network.layer2[0].bn2.eval()
    elif what == "frozen":
        network.fc.weight.requires_grad_(False)
    elif what == "hook":
        network.layer1.register_forward_hook(lambda *_: None)
    return network


DIFFERENT = {
    "depth": "layer layer1.1.conv1",
    "family": "layer ",
    "classes": r"layer fc is Linear\(in_features=64, out_features=6",
    "stride": r"layer layer2.0.conv1 is Conv2d\(16, 32, kernel_size=\(3, 3\), stride=\(1, 1\)",
    "momentum": r"layer bn1 is BatchNorm2d\(16, eps=1e-05, momentum=0.3",
    "dtype": r"fc.weight is \[5, 64\] torch.float64",
    "mode": "layer layer2.0.bn2 is .* in evaluation mode",
    "frozen": "fc.weight is .* frozen, and .* trained there",
    "hook": "",
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_networks_that_differ_are_refused_by_name(what):
    others = [models.build("resnet8", CLASSES) for _ in range(2)]
    said = (
        "networks.1., layer layer1, .*hooks"
        if what == "hook"
        else f"networks.1. beside networks.0. .*{DIFFERENT[what]}"
    )
    with pytest.raises(InputError, match=said) as caught:
        stack([others[0], changed(what), others[1]])
    assert str(caught.value).endswith("; use --strategy loop")


def test_bad_arguments():
    own = [models.build("resnet8", CLASSES) for _ in range(3)]
    for call in (lambda: stack(own, replicas=2), lambda: stack([]), lambda: Networks(own).arrange("loop", replicas=2)):
        with pytest.raises(InputError, match="cannot be shared out among"):
            call()
    with pytest.raises(InputError, match="only what stack"):
        unstack(own[0], 0)
    with pytest.raises(InputError, match="network 3 does not exist: there are networks 0 to 2"):
        unstack(stack(own), 3)
    with pytest.raises(InputError, match="unknown strategy 'groupd': did you mean grouped"):
        Networks(own).arrange("groupd")
