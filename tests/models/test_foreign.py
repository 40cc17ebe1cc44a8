"""Networks of others by name: their taps are chosen, methods train them, and what cannot work is refused."""

import copy
import sys
import types

import pytest
import torch
from torch import Tensor, nn

from fastfuse.config import TrainConfig
from fastfuse.data import Dataset, Split
from fastfuse.errors import InputError
from fastfuse.methods import build_method
from fastfuse.methods.branching import Branched
from fastfuse.models import build
from fastfuse.train.build import make_method, resolved, try_out
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

CLASSES = 5
HERE = __name__


class Small(nn.Module):
    """For images of 32x32 and no others; looks at values where it is told to."""

    def __init__(self, num_classes: int, looks: bool = False) -> None:
        super().__init__()
        self.looks = looks
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.stage = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.pool, self.drop, self.fc = nn.AvgPool2d(16), nn.Dropout(), nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage(self.stem(x))
        if self.looks and x.sum() > 1e9:
            return x
        return self.fc(self.drop(self.pool(x).flatten(1)))


def small(num_classes: int, looks: bool = False) -> nn.Module:
    return Small(num_classes, looks)


def ours(num_classes: int) -> nn.Module:
    return build("resnet8", num_classes)


def without_maps(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, num_classes))


def of_other_classes(num_classes: int) -> nn.Module:
    return Small(num_classes + 1)


def no_network(num_classes: int) -> int:
    return num_classes


def without_classes() -> nn.Module:
    return Small(CLASSES)


@pytest.mark.parametrize("looks", [False, True])
def test_a_factory_gives_a_tapped_network_and_trying_it_out_changes_nothing(looks):
    torch.manual_seed(0)
    network, after = build(f"{HERE}:small", CLASSES, looks=looks), torch.rand(())
    torch.manual_seed(0)
    plain, wanted = Small(CLASSES), torch.rand(())
    assert torch.equal(after, wanted)  # no random number was drawn
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in plain.state_dict().items())
    assert network.training and network.paths == ["stem", "stage"] and network.feature_channels == (4, 6)
    plain.load_state_dict(network.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32)
    logits, features = network.eval()(images)
    shallow = plain.eval().stem(images)
    for found, right in zip((logits, *features), (plain(images), shallow, plain.stage(shallow)), strict=True):
        torch.testing.assert_close(found, right)


def test_a_network_that_is_ours_stays_as_it_is():
    assert type(build(f"{HERE}:ours", CLASSES)) is type(build("resnet8", CLASSES))


def test_a_method_trains_it_and_deploys_the_plain_network():
    config = resolved(TrainConfig(method="ffsd", model=f"{HERE}:small", epochs=1))
    method = make_method(config, CLASSES).train()
    assert method.arrange("auto") == "loop"
    before = copy.deepcopy(method.state_dict())
    output = TrainStep(method, build_optimizers(method, lr=0.01), amp="off")(
        torch.randn(4, 3, 32, 32), torch.arange(4), torch.tensor(9.0)
    )
    assert all(value.isfinite() and value > 0 for value in output.terms.values()), output.terms
    after = method.state_dict()
    assert [name for name, value in after.items() if torch.equal(value, before[name])] == []
    Small(CLASSES).load_state_dict(method.deployed_state(), strict=True)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param(f"{HERE}:smal", "unknown factory in .*did you mean small", id="no such factory"),
        pytest.param("no_such_package.nets:small", "there is no module 'no_such_package'", id="no such package"),
        pytest.param(f"{HERE}:no_network", "must give a torch.nn.Module, not a int", id="no network"),
        pytest.param(f"{HERE}:without_classes", "cannot be called with num_classes=5", id="no classes"),
        pytest.param("torch:arange", "cannot be called with num_classes=5", id="a builtin"),
        pytest.param(f"{HERE}:without_maps", "makes no maps", id="no maps"),
        pytest.param(f"{HERE}:of_other_classes", r"gives \(2, 6\) in training .* not logits \(2, 5\)", id="classes"),
    ],
)
def test_what_is_no_classifier_with_maps_is_refused(name, says):
    with pytest.raises(InputError, match=says) as raised:
        build(name, CLASSES)
    assert "\n" not in str(raised.value)


def test_a_network_that_runs_on_no_blank_images_is_refused_with_its_reason(monkeypatch):
    monkeypatch.setattr(Small, "forward", lambda self, x: x.unfold(2, 500, 1))
    with pytest.raises(InputError, match=r"does not run on blank images of 224x224 or 32x32: .*500"):
        build(f"{HERE}:small", CLASSES)


def test_images_that_do_not_suit_a_network_are_refused_before_training():
    method = make_method(resolved(TrainConfig(method="dml", model=f"{HERE}:small")), CLASSES)
    images, labels = torch.zeros(4, 20, 20, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    split, three = Split(images, labels), torch.ones(3)  # its pooling wants maps of 16x16
    dataset = Dataset("blank", split, split, None, tuple("abcde"), three, three, padding=0, flip=False)
    with pytest.raises(InputError, match=r"images of 20x20 do not suit this method and model: .*too small"):
        try_out(method, dataset, 4)


def test_there_are_no_stages_to_share():
    with pytest.raises(InputError, match=r"has no stages .*--sharing separate"):
        Branched([build(f"{HERE}:small", CLASSES) for _ in range(2)])


@pytest.fixture
def torchvisions() -> types.ModuleType:
    return pytest.importorskip("torchvision").models


def test_stages_of_torchvision_are_tapped_and_keys_are_its_own(torchvisions):
    network = build("torchvision:shufflenet_v2_x0_5", CLASSES)
    assert network.paths == ["conv1", "maxpool", "stage2", "stage3", "conv5"]
    images = torch.randn(2, 3, 64, 64)
    features = network(images).features
    sides = [(channels, side) for channels, side in zip(network.feature_channels, (32, 16, 8, 4, 2), strict=True)]
    assert [(f.shape[1], f.shape[2]) for f in features] == sides
    plain = torchvisions.shufflenet_v2_x0_5(num_classes=CLASSES)
    plain.load_state_dict(network.state_dict(), strict=True)
    torch.testing.assert_close(plain.eval()(images), network.eval()(images).logits)


def test_networks_with_other_results_in_training_need_an_option(torchvisions):
    with pytest.raises(InputError, match="gives GoogLeNetOutputs in training"):
        build("torchvision:googlenet", CLASSES, init_weights=False)
    network = build("torchvision:googlenet", CLASSES, init_weights=False, aux_logits=False)
    assert network.feature_channels == (64, 192, 480, 832, 1024)


def test_an_unknown_name_of_torchvision_lists_the_near_ones_and_not_all(torchvisions):
    with pytest.raises(InputError, match=r"did you mean resnet18 .* and \d+ more$"):
        build("torchvision:resnt18", CLASSES)


def test_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(InputError, match="torchvision:vgg11 needs torchvision, which cannot be imported"):
        build("torchvision:vgg11", CLASSES)


class Timms(nn.Module):
    """What is used of a network of timm: intermediate maps by index, and the head by itself."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        strides, widths = (1, 2, 1, 2, 8), (3, 4, 5, 6, 7, 8)
        self.stages = nn.ModuleList(nn.Conv2d(widths[i], widths[i + 1], s, stride=s) for i, s in enumerate(strides))
        self.head = nn.Linear(8, num_classes)

    def forward_head(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_intermediates(x)[0])

    def forward_intermediates(self, x: Tensor, indices: list[int] | None = None) -> tuple[Tensor, list[Tensor]]:
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if indices is None or i in indices:
                maps.append(x)
        return x.relu(), maps


@pytest.fixture
def timm(monkeypatch) -> types.SimpleNamespace:
    """A stand-in for the library."""
    module = types.ModuleType("timm")
    module.list_models = lambda: ["small_net", "other"]
    module.create_model = lambda name, num_classes: Timms(num_classes)
    monkeypatch.setitem(sys.modules, "timm", module)
    return module


def test_a_network_of_timm_gives_its_own_maps(timm):
    """Of the maps of half the resolution the second counts."""
    network = build("timm:small_net", CLASSES)
    assert network.indices == [0, 2, 3, 4] and network.feature_channels == (4, 6, 7, 8)
    images = torch.randn(2, 3, 64, 64)
    twin = copy.deepcopy(network)
    logits, features = torch.compile(twin, fullgraph=True, backend="eager")(images)
    plain = Timms(CLASSES)
    plain.load_state_dict(network.state_dict(), strict=True)
    maps = plain.forward_intermediates(images)[1]
    for found, right in zip((logits, *features), (plain(images), *(maps[i] for i in (0, 2, 3, 4))), strict=True):
        torch.testing.assert_close(found, right)


def test_an_unknown_network_of_timm_lists_the_near_ones(timm):
    with pytest.raises(InputError, match="unknown network of timm 'smal_net': did you mean small_net"):
        build("timm:smal_net", CLASSES)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"timm:small_net needs timm.*pip install timm"):
        build_method("dml", model="timm:small_net", students=2, num_classes=CLASSES)
