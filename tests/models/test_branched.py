"""Sub-networks on a shared trunk: each is its plain network, whatever the family and wherever the branches begin."""

import pytest
import torch
from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models import branched, build
from fastfuse.models.branching import Branched
from tests.models.test_network_stages import images_for

CLASSES = 7
FORMS = [
    *[("resnet8", stage) for stage in (None, 1, 2)],
    *[("wrn16_2", stage) for stage in (1, 2)],
    *[("densenet10_4", stage) for stage in (1, 2)],
    *[("googlenet", stage) for stage in (1, 2)],  # its pooling serves in trunk and branches
    *[("resnet18", stage) for stage in (1, 3)],
]


@pytest.fixture(params=FORMS, ids=str)
def form(request) -> tuple[str, int | None]:
    if request.param[0] == "resnet18":
        pytest.importorskip("torchvision", reason="ImageNet's networks need torchvision")
    return request.param


def flat(output: tuple) -> list[Tensor]:
    return [output.logits, *output.features]


def test_a_branch_is_the_plain_network(form) -> None:
    name, stage = form
    torch.manual_seed(1)
    network, images = branched(name, CLASSES, branches=2, stage=stage), images_for(name)
    network(images)  # running statistics that differ from the initial ones
    outputs = network.eval()(images)
    assert len(outputs) == 2 and not torch.equal(outputs[0].logits, outputs[1].logits)
    for branch, output in enumerate(outputs):
        plain = build(name, CLASSES)
        plain.load_state_dict(network.plain_state_dict(branch), strict=True)
        for ours, wanted in zip(flat(output), flat(plain.eval()(images)), strict=True):
            assert torch.equal(ours, wanted)


def test_each_parameter_exists_once_where_it_is_shared_and_once_per_branch_elsewhere(form) -> None:
    name, stage = form
    with torch.device("meta"):
        plain = build(name, CLASSES)
        network = branched(name, CLASSES, branches=3, stage=stage)
    shared = {own for names in plain.stage_modules[: stage or len(plain.stage_modules) - 1] for own in names}
    counts = dict.fromkeys((True, False), 0)
    for key, parameter in plain.named_parameters():
        counts[key.partition(".")[0] in shared] += parameter.numel()
    assert sum(p.numel() for p in network.parameters()) == counts[True] + 3 * counts[False]
    assert counts[True] > 0 and counts[False] > 0
    assert network.feature_channels == tuple(plain.feature_channels)


@pytest.mark.parametrize("stage", [1, 2])
def test_branches_share_the_maps_of_the_trunk_and_no_others(stage: int) -> None:
    first, second = branched("resnet8", CLASSES, branches=2, stage=stage)(torch.randn(2, 3, 16, 16))
    assert [a is b for a, b in zip(first.features, second.features, strict=True)] == [i < stage for i in range(3)]
    assert not any(torch.equal(a, b) for a, b in zip(first.features[stage:], second.features[stage:], strict=True))


def test_the_gradient_of_the_trunk_is_the_sum_over_branches() -> None:
    """Against whole networks, each with the trunk's weights: what the chain rule says of shared weights."""
    network = branched("resnet8", CLASSES, branches=2, stage=1).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    plain = [build("resnet8", CLASSES).double() for _ in range(2)]
    for i, own in enumerate(plain):
        own.load_state_dict(network.plain_state_dict(i), strict=True)
        own(images).logits.square().sum().backward()
    sum(output.logits.square().sum() for output in network(images)).backward()
    for key, parameter in network.trunk.named_parameters():
        wanted = sum(own.get_parameter(key).grad for own in plain)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-10)
    for i, branch in enumerate(network.branches):
        for key, parameter in branch.named_parameters():
            torch.testing.assert_close(parameter.grad, plain[i].get_parameter(key).grad, rtol=1e-9, atol=1e-10)


def test_the_first_branch_starts_as_the_plain_network_of_the_same_seed() -> None:
    torch.manual_seed(5)
    plain = build("resnet8", CLASSES).state_dict()
    torch.manual_seed(5)
    own = branched("resnet8", CLASSES, branches=3).plain_state_dict(0)
    assert own.keys() == plain.keys() and all(torch.equal(own[key], plain[key]) for key in plain)


def test_options_reach_the_networks() -> None:
    network = branched("wrn10_1", CLASSES, branches=2, conv_bias=False, last_norm_momentum=0.1)
    assert network.trunk["conv1"].bias is None
    assert [branch.bn1.momentum for branch in network.branches] == [0.1, 0.1]


@pytest.mark.parametrize("branch", [2, -1])
def test_a_branch_that_is_not_there_is_named(branch: int) -> None:
    with pytest.raises(InputError, match=f"branch {branch} does not exist: there are branches 0 to 1"):
        branched("resnet8", CLASSES, branches=2).plain_state_dict(branch)


@pytest.mark.parametrize("stage", [0, 3, -1])
def test_a_stage_that_leaves_nothing_to_share_or_to_branch_is_refused(stage: int) -> None:
    with pytest.raises(InputError, match=f"--branch-stage must be 1 to 2 for a network of 3 stages, not {stage}"):
        branched("resnet8", CLASSES, branches=2, stage=stage)


@pytest.mark.parametrize(
    ("name", "branches", "says"),
    [
        pytest.param("resnet8", 0, "branches must be at least 1, not 0", id="no branch"),
        pytest.param("resnet9", 2, r"6n \+ 2", id="a name that is refused without branches too"),
        pytest.param("wrn16-2", 2, "did you mean wrn16_2", id="a misspelt name"),
    ],
)
def test_bad_requests_say_what_was_expected(name: str, branches: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        branched(name, CLASSES, branches=branches)


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: build("resnet14", CLASSES), id="another depth"),
        pytest.param(lambda: build("wrn10_1", CLASSES), id="another family"),
        pytest.param(lambda: nn.Conv2d(3, 7, 1), id="no network of ours"),
    ],
)
def test_networks_with_other_trunks_are_refused(other) -> None:
    with pytest.raises(InputError, match="of one architecture; choose one --model, or for ffl --sharing separate"):
        Branched([build("resnet8", CLASSES), other()])


def test_networks_without_stages_say_what_to_do() -> None:
    with pytest.raises(InputError, match=r"^Conv2d has no stages that branches could share; .*--sharing separate"):
        Branched([nn.Conv2d(3, 7, 1)])
    with pytest.raises(InputError, match="at least one network"):
        Branched([])
