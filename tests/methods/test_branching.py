"""Sub-networks on a shared trunk: each is its plain network, whatever the family and wherever the branches begin."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.methods.branching import Branched
from fastfuse.models import build
from tests.methods.making import branched
from tests.models.test_network_stages import images_for
from tests.nn.stacking import same, untidy

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
        plain.load_state_dict(network.state_of(branch), strict=True)
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
        own.load_state_dict(network.state_of(i), strict=True)
        own(images).logits.square().sum().backward()
    sum(output.logits.square().sum() for output in network(images)).backward()
    for key, parameter in network.trunk[0].named_parameters():
        wanted = sum(own.get_parameter(key).grad for own in plain)
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-9, atol=1e-10)
    for i, branch in enumerate(network.branches):
        for key, parameter in branch.named_parameters():
            torch.testing.assert_close(parameter.grad, plain[i].get_parameter(key).grad, rtol=1e-9, atol=1e-10)


def test_the_first_branch_starts_as_the_plain_network_of_the_same_seed() -> None:
    torch.manual_seed(5)
    plain = build("resnet8", CLASSES).state_dict()
    torch.manual_seed(5)
    own = branched("resnet8", CLASSES, branches=3).state_of(0)
    assert own.keys() == plain.keys() and all(torch.equal(own[key], plain[key]) for key in plain)


def test_options_reach_the_networks() -> None:
    network = branched("wrn10_1", CLASSES, branches=2, conv_bias=False, last_norm_momentum=0.1)
    assert network.trunk[0].conv1.bias is None
    assert [branch.bn1.momentum for branch in network.branches] == [0.1, 0.1]


@pytest.mark.parametrize("index", [2, -3])
def test_a_sub_network_that_is_not_there_is_named(index: int) -> None:
    with pytest.raises(InputError, match=f"network {index} does not exist: there are networks 0 to 1"):
        branched("resnet8", CLASSES, branches=2).state_of(index)


@pytest.mark.parametrize("stage", [0, 3, -1])
def test_a_stage_that_leaves_nothing_to_share_or_to_branch_is_refused(stage: int) -> None:
    with pytest.raises(InputError, match=f"--branch-stage must be 1 to 2 for a network of 3 stages, not {stage}"):
        branched("resnet8", CLASSES, branches=2, stage=stage)


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


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize(("name", "stage"), [("resnet8", None), ("wrn10_1", 1), ("wrn10_1", None)])
def test_stacked_trunks_and_branches_are_those_of_the_loop(name: str, stage: int | None, replicas: int) -> None:
    """Outputs, gradients, statistics; branches of a wide network begin with a norm of what they share."""
    # A bias ahead of a batch norm has no gradient but rounding.
    options = {"conv_bias": False} if name.startswith("wrn") else {}
    own = [untidy(branched(name, CLASSES, branches=2, stage=stage, **options)) for _ in range(replicas)]
    loop, grouped = (Branched.of_replicas(copy.deepcopy(own)) for _ in range(2))
    assert loop.arrange("loop", replicas=replicas) == "loop"
    assert grouped.arrange("grouped", replicas=replicas) == "grouped"
    images = torch.randn(3, 3 * replicas, 9, 9, dtype=torch.float64)
    found = [network(images) for network in (grouped, loop)]
    for ours, wanted in zip(*found, strict=True):
        same(flat(ours), flat(wanted))
    for each in found:
        sum((i + 1) * x.square().sum() for i, output in enumerate(each) for x in flat(output)).backward()
    gradients = {}
    for parameter_name, parameter in grouped.named_parameters():
        gradients |= grouped.split(parameter_name, parameter.grad)
    same(gradients, {n: p.grad for n, p in loop.named_parameters()})
    same(dict(grouped.state_dict()), dict(loop.state_dict()))
    for index in range(2 * replicas):
        plain = build(name, CLASSES, **options).double()
        plain.load_state_dict(grouped.state_of(index), strict=True)
        own_images = images.chunk(replicas, 1)[index // 2]
        same(flat(plain.eval()(own_images)), flat(loop.eval()(images)[index]))


def test_what_one_part_cannot_do_leaves_both_as_they_were() -> None:
    network = branched("resnet8", CLASSES, branches=2)
    network.trunk[0].conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="has hooks; use --strategy loop"):
        network.arrange("grouped")
    assert network.trunk.strategy == network.branches.strategy == "loop"
    assert len(network(torch.randn(2, 3, 8, 8))) == 2
