"""Staged networks in parts: the same maps, logits and keys as the whole network, with no hooks."""

import copy

import pytest
import torch
from torch import nn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.models.extract import extract
from fastfuse.models.stages import BlockMaps, check_stages, front, norms_behind
from fastfuse.nn import Networks
from fastfuse.nn.folding import folded
from tests.losses import published

NAMES = ["resnet14", "wrn16_1", "densenet13_4", "googlenet"]


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return published.scramble(models.build(name, 4).double()).eval()


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
def test_maps_are_those_of_hooks(name: str) -> None:
    network = build(name)
    blocks = BlockMaps(network)
    assert blocks.paths == [path for stage in network.stage_blocks for path in stage]
    wanted, ours = extract(network, blocks.paths)(IMAGES), blocks(IMAGES)
    assert torch.equal(ours.logits, wanted.logits.logits)
    assert len(ours.features) == len(blocks.paths)
    assert all(torch.equal(a, b) for a, b in zip(ours.features, wanted.features, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_raw_taps_are_the_maps_of_the_last_blocks(name: str) -> None:
    network = build(name)
    wanted = extract(network, [stage[-1] for stage in network.stage_blocks])(IMAGES)
    network.raw_taps = True
    found = network(IMAGES)
    assert torch.equal(found.logits, wanted.logits.logits)
    assert all(torch.equal(a, b) for a, b in zip(found.features, wanted.features, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_front_and_rest_make_the_whole(name: str) -> None:
    network = build(name)
    network.raw_taps = True
    whole, maps = network(IMAGES)
    for stage in range(1, 4):
        x = front(network, IMAGES, stage)
        assert torch.equal(x, maps[stage - 1])
        torch.testing.assert_close(network.resume(x, stage).logits, whole, rtol=1e-12, atol=1e-12)


def test_raw_taps_of_stacked_networks() -> None:
    plain = build("wrn10_1")
    plain.raw_taps = True
    other, state = copy.deepcopy(plain), plain.state_dict()
    published.scramble(other)
    networks = Networks([plain, other])
    alone = networks(IMAGES)
    networks.arrange("grouped")
    for i, together in enumerate(networks(IMAGES)):
        torch.testing.assert_close(together.logits, alone[i].logits)
        for a, b in zip(together.features, alone[i].features, strict=True):
            torch.testing.assert_close(a, b)
    kept = networks.state_of(0)
    assert list(kept) == list(state) and all(torch.equal(kept[key], state[key]) for key in state)


def test_norms_can_be_folded() -> None:
    network = BlockMaps(build("resnet14"))
    found = folded(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in found.modules())
    torch.testing.assert_close(found(IMAGES).logits, network(IMAGES).logits)
    for a, b in zip(found(IMAGES).features, network(IMAGES).features, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["wrn16_1", "densenet13_4"])
def test_norms_behind_read_the_blocks(name: str) -> None:
    network = build(name)
    read: dict[nn.Module, torch.Tensor] = {}
    for norm in (n for stage in norms_behind(network) for n in stage):
        norm.register_forward_pre_hook(lambda module, args: read.__setitem__(module, args[0].clone()))
    maps = BlockMaps(network)(IMAGES).features
    norms = [norm for stage in norms_behind(network) for norm in stage]
    assert len(norms) == len(maps) == len(set(norms))
    assert all(torch.equal(read[norm], x) for norm, x in zip(norms, maps, strict=True))


def test_blocks_that_end_with_a_relu_have_no_norm_behind() -> None:
    for name in ("resnet14", "googlenet"):
        network = build(name)
        assert norms_behind(network) is None
        assert all((x >= 0).all() for x in BlockMaps(network)(IMAGES).features)


def test_a_network_without_stages_is_refused() -> None:
    check_stages(build("resnet14"), "student")
    with pytest.raises(InputError, match=r"the teacher \(Sequential\) has no stages of blocks: choose"):
        check_stages(nn.Sequential(nn.Conv2d(3, 4, 1)), "teacher")
