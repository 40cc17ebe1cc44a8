"""Students, leader and teacher of different architectures in one method."""

import pytest
import torch
from torch import Tensor, nn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.methods import Method, build_method
from fastfuse.models._blocks import NetworkOutput
from fastfuse.nn.connectors import Connector, Regressor
from fastfuse.train.optim import build_optimizers
from fastfuse.train.step import TrainStep

CLASSES = 5
# method, students, further networks and options, the deployed network's name
MIXED = {
    "ffsd": (["resnet8", "wrn10_2"], {"leader": "resnet14"}, "resnet14"),
    "ffsd, three widths": (["wrn10_1", "resnet8", "wrn10_2"], {"leader": "wrn10_2"}, "wrn10_2"),
    "ffl": (["resnet8", "wrn10_2"], {"sharing": "separate"}, "resnet8"),
    "ffl, other depths": (["resnet8", "resnet14", "densenet10_4"], {"sharing": "separate"}, "resnet8"),
    "dml": (["wrn10_1", "resnet8"], {}, "wrn10_1"),
    "ffcl": (["resnet8"], {"teacher_model": "wrn10_2"}, "resnet8"),
    "ffcl, two students": (["resnet8", "wrn10_1"], {"teacher_model": "resnet14"}, "resnet8"),
    "ffcl, every stage": (["resnet8"], {"teacher_model": "wrn10_2", "fused_stages": 3}, "resnet8"),
    "ffcl, squares of two stages": (
        ["resnet8", "densenet10_4"],
        {"teacher_model": "wrn10_1", "fused_stages": 2, "feature_distance": "mse"},
        "resnet8",
    ),
    "independent": (["resnet8", "wrn10_1"], {}, "resnet8"),
}


def make(case: str, **options: object) -> Method:
    students, given, _ = MIXED[case]
    name = case.partition(",")[0]
    return build_method(name, students=students, num_classes=CLASSES, **given, **options).double().train()


def batch(size: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    return images, torch.randint(CLASSES, (4,)), torch.tensor(3.0, dtype=torch.float64)


@pytest.mark.parametrize("case", MIXED)
def test_everything_is_trained_and_the_named_network_deployed(case: str) -> None:
    method = make(case)
    images, labels, progress = batch()
    step = TrainStep(method, build_optimizers(method))
    losses = [step(images, labels, progress).loss for _ in range(3)]
    assert all(loss.isfinite() for loss in losses)
    assert [name for name, p in method.named_parameters() if p.grad is None or not p.grad.any()] == []
    plain = models.build(MIXED[case][2], CLASSES).double()
    plain.load_state_dict(method.deployed_state(), strict=True)
    method.eval()
    with torch.no_grad():
        predicted = method.predict(images)[method.deployed]
        torch.testing.assert_close(plain.eval()(images).logits, predicted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", MIXED)
def test_the_forward_is_one_graph(case: str) -> None:
    method = make(case)
    given = batch()
    torch._dynamo.reset()
    compiled = torch.compile(method, fullgraph=True, backend="eager")
    assert torch.isfinite(compiled(*given).loss)


class Small(nn.Module):
    """Three stages; the last map is a quarter, a half or an eighth as large as the images."""

    feature_channels = (4, 6, 8)

    def __init__(self, last_stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, 2, padding=1)
        self.conv3 = nn.Conv2d(6, 8, 3, last_stride, padding=1)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, images: Tensor) -> NetworkOutput:
        first = torch.relu(self.conv1(images))
        second = torch.relu(self.conv2(first))
        third = torch.relu(self.conv3(second))
        return NetworkOutput(self.fc(third.mean((2, 3))), (first, second, third))


@pytest.mark.parametrize(
    ("name", "options", "strides", "regressed"),
    [
        ("ffl", {"sharing": "separate"}, (2, 1), ["student1"]),
        ("ffl", {"sharing": "separate"}, (2, 2), []),
        ("ffcl", {}, (1, 2), ["student0"]),
        ("ffcl", {"fused_stages": 3}, (1, 2), ["student0"]),  # its shallower maps have one size
        ("ffsd", {}, (1, 2), ["student0"]),
        ("ffsd", {}, (2, 2), []),
    ],
)
def test_connectors_appear_where_sizes_differ_and_nowhere_else(name, options, strides, regressed) -> None:
    from fastfuse.methods import METHODS

    makers = [lambda stride=stride: Small(stride) for stride in strides]
    extra = {"ffsd": {"leader": lambda: Small(2)}, "ffcl": {"teacher": makers.pop()} if name == "ffcl" else {}}
    method = METHODS[name](makers, CLASSES, image_size=16, **extra.get(name, {}), **options).double().train()
    assert sorted(method.criterion.regressors) == regressed
    own = [type(m) for m in method.modules() if isinstance(m, Connector)]
    assert own == [Regressor] * len(regressed)
    images, labels, progress = batch()
    method(images, labels, progress).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in method.criterion.regressors.parameters())
    assert method.eval().predict(images)["fusion"].shape == (4, CLASSES)


def test_options_of_a_family_go_to_its_members() -> None:
    method = build_method(
        "dml", students=["wrn10_1", "resnet8"], num_classes=CLASSES, model_options={"conv_bias": False}
    )
    assert method.peers[0].conv1.bias is None


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("dml", {"students": ["resnet8", "resnet8x"]}, "unknown model 'resnet8x'"),
        ("dml", {"students": 2}, "model must be given"),
        ("dml", {"students": ["resnet8"] * 2, "leader": "resnet8"}, "dml has no leader"),
        ("ffsd", {"students": ["resnet8"] * 2, "teacher_model": "resnet8"}, "ffsd has no teacher"),
        ("ffsd", {"students": ["resnet8", "resnet18"]}, "equally many stages"),
        ("ffl", {"students": ["resnet8", "wrn10_1"]}, "separate"),
    ],
)
def test_what_cannot_be_mixed_is_said(name: str, given: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_method(name, num_classes=CLASSES, **given)


def test_stacking_networks_that_differ_says_what_differs() -> None:
    with pytest.raises(InputError, match=r"networks.1. beside networks.0."):
        make("dml").arrange("grouped")
    assert make("dml").arrange("auto") == "loop"
