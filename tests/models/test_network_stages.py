"""The stages of our networks: where each ends, and that the rest of a network runs from there."""

import pytest
import torch
from torch import Tensor, nn

from fastfuse.errors import InputError
from fastfuse.models import build

# Blocks per stage whose maps have the resolution and width of the tap; where blocks widen their stage, its last alone.
BLOCKS = {
    "resnet8": (1, 1, 1),
    "resnet20": (3, 3, 3),
    "wrn16_2": (2, 2, 2),
    "densenet10_4": (1, 1, 1),
    "googlenet": (1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
}


@pytest.fixture(params=BLOCKS)
def name(request) -> str:
    if request.param in ("resnet18", "resnet34"):
        pytest.importorskip("torchvision", reason="ImageNet's networks need torchvision")
    return request.param


def network_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = build(name, 7)
    for module in network.modules():  # norms that are more than the identity
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(tensor, 0.5, 0.3)
    return network.eval()


def images_for(name: str) -> Tensor:
    return torch.randn(2, 3, *((33, 64) if name in ("resnet18", "resnet34") else (12, 9)))


def block_outputs(network: nn.Module, images: Tensor) -> tuple[list[list[Tensor]], tuple]:
    """What every stage block gives, by stage, and what the network gives."""
    found: dict[str, Tensor] = {}

    def note(path: str) -> None:
        block = network.get_submodule(path)
        handles.append(block.register_forward_hook(lambda _, args, result: found.update({path: result})))

    handles: list = []
    for paths in network.stage_blocks:
        for path in paths:
            note(path)
    output = network(images)
    for handle in handles:
        handle.remove()
    return [[found[path] for path in paths] for paths in network.stage_blocks], output


def test_stage_blocks_have_the_resolution_and_width_of_their_tap(name: str) -> None:
    network = network_of(name)
    with torch.no_grad():
        blocks, output = block_outputs(network, images_for(name))
    assert tuple(len(stage) for stage in blocks) == BLOCKS[name]
    for stage, tap, channels in zip(blocks, output.features, network.feature_channels, strict=True):
        assert [block.shape for block in stage] == [tap.shape] * len(stage)
        assert tap.shape[1] == channels


def test_the_forward_is_what_resumes_from_the_images(name: str) -> None:
    network, images = network_of(name), images_for(name)
    with torch.no_grad():
        whole, resumed = network(images), network.resume(images, 0)
    assert torch.equal(whole.logits, resumed.logits)
    assert len(whole.features) == len(resumed.features) == len(BLOCKS[name])
    assert all(map(torch.equal, whole.features, resumed.features))


def test_behind_every_stage_the_rest_gives_the_same(name: str) -> None:
    network, images = network_of(name), images_for(name)
    with torch.no_grad():
        blocks, whole = block_outputs(network, images)
        for stage in range(1, len(blocks) + 1):
            given = blocks[stage - 1][-1]
            before = given.clone()
            rest = network.resume(given, stage)
            assert torch.equal(rest.logits, whole.logits), stage
            assert len(rest.features) == len(blocks) - stage
            assert all(map(torch.equal, rest.features, whole.features[stage:])), stage
            assert torch.equal(given, before), f"what is resumed from behind stage {stage} is overwritten"


def test_taps_before_the_last_are_what_the_last_block_gives(name: str) -> None:
    network = network_of(name)
    with torch.no_grad():
        blocks, output = block_outputs(network, images_for(name))
    assert all(torch.equal(stage[-1], tap) for stage, tap in zip(blocks[:-1], output.features[:-1], strict=True))


def test_stages_and_head_are_all_children_and_run_in_the_order_of_the_names(name: str) -> None:
    network = network_of(name)
    children = dict(network.named_children())
    named = [own for names in network.stage_modules for own in names]
    assert set(named) <= set(children)
    ran: list[str] = []
    for own, child in children.items():
        child.register_forward_hook(lambda *_, own=own: ran.append(own))
    with torch.no_grad():
        network(images_for(name))
    assert ran[: len(named)] == named
    assert ran[-1] == "fc" and set(ran) == set(children)


def test_gradients_reach_what_is_resumed_from(name: str) -> None:
    network = network_of(name)
    with torch.no_grad():
        blocks, _ = block_outputs(network, images_for(name))
    for stage, outputs in enumerate(blocks, 1):
        given = outputs[-1].clone().requires_grad_()
        network.resume(given, stage).logits.square().sum().backward()
        assert given.grad.abs().sum() > 0, stage


@pytest.mark.parametrize("stage", [-1, 4])
def test_a_stage_that_is_not_there_is_refused(stage: int) -> None:
    with pytest.raises(InputError, match=f"a network of 3 stages has no stage {stage} to resume from"):
        build("resnet8", 7).resume(torch.zeros(1, 3, 8, 8), stage)
