"""Stacked networks against the same networks run one after another, in float64."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse import functional, models
from fastfuse.kernels import _dispatch
from fastfuse.nn import Networks, stack, unstack
from fastfuse.testing import assert_within_budget, in_other_orders
from tests.nn.stacking import CLASSES, check_equal, gradients, members, same, tensors, untidy

CHANNELS_LAST = torch.channels_last


def images(batch: int = 3, size: int = 9, *, replicas: int = 1, channels_last: bool = False) -> torch.Tensor:
    x = torch.randn(batch, 3 * replicas, size, size, dtype=torch.float64)
    return x.contiguous(memory_format=CHANNELS_LAST) if channels_last else x


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize(
    ("model", "batch", "size", "channels_last"),
    [
        pytest.param("resnet8", 3, 9, True, id="resnet8: norm, sum, ReLU; odd batch and size, channels-last"),
        pytest.param("wrn10_1", 3, 9, False, id="wrn10_1: biased convolutions, signed maps tapped; contiguous"),
    ],
)
def test_equals_the_loop(model, batch, size, channels_last, count):
    loop = members(model, count)
    if channels_last:
        loop = loop.to(memory_format=CHANNELS_LAST)
    check_equal(loop, images(batch, size, channels_last=channels_last))


@pytest.mark.parametrize(
    ("model", "options", "batch", "size"),
    [
        pytest.param("wrn10_2", {}, 2, 8, id="a widened network, even batch and size"),
        pytest.param(
            "wrn10_2", {"conv_bias": False, "shortcut_input": "activated"}, 3, 9, id="an activation read twice"
        ),
        pytest.param("wrn10_1", {"stride_on": "conv1", "last_norm_momentum": 0.1}, 3, 9, id="norms of one momentum"),
        pytest.param("resnet8", {}, 1, 8, id="a batch of one image"),
        pytest.param("resnet14", {}, 2, 12, id="blocks that keep their width"),
        pytest.param("resnet18", {}, 2, 27, id="max pooling whose windows overlap and reach over the edge"),
    ],
)
def test_variations_equal_the_loop(model, options, batch, size):
    check_equal(members(model, 2, **options), images(batch, size))


@pytest.mark.long
@pytest.mark.parametrize("model", ["resnet20", "wrn16_2", "resnet34"])
def test_a_real_depth_equals_the_loop(model):
    check_equal(members(model, 3), images(5, 32))


@pytest.mark.long
def test_stacked_convolutions_and_norms_run_on_the_kernels(monkeypatch):
    """Every convolution but the first, dense one is one of grouped_conv: outputs and gradients within the budget."""
    loop, x = members("resnet8", 2), images(3, 4, channels_last=True)
    launched, fwd = [], torch.ops.fastfuse.grouped_conv_fwd
    monkeypatch.setattr(torch.ops.fastfuse, "grouped_conv_fwd", lambda *a: launched.append(a[1].shape) or fwd(*a))

    def step(backend, dtype):
        monkeypatch.setattr(_dispatch, "_process_default", backend)
        grouped = copy.deepcopy(loop).to(dtype, memory_format=CHANNELS_LAST)
        grouped.arrange("grouped")
        outputs = tensors(grouped(x.to(dtype)))
        sum(y.double().square().mean() for y in outputs).backward()
        return [torch.cat([y.flatten() for y in (*outputs, *gradients(grouped).values())])]

    (ours,), (truth,) = step("triton", torch.float32), step("reference", torch.float64)
    assert len(launched) == 8, launched
    eager = [own for (own,) in in_other_orders(lambda: step("reference", torch.float32))]
    assert_within_budget(ours, truth, eager)


@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_read_their_own_images(replicas):
    loop = members("resnet8", 2 * replicas)
    x = images(replicas=replicas)
    alone = copy.deepcopy(loop)
    grouped = check_equal(loop, x, replicas=replicas)
    assert grouped.stacked.network.conv1.groups == replicas
    for r, own in enumerate(x.chunk(replicas, 1)):  # each replica as a run of its own
        single = Networks(list(alone)[2 * r : 2 * r + 2])
        grouped = check_equal(single, own)
        wanted = {f"{2 * r + int(name[0])}{name[1:]}": t for name, t in grouped.state_dict().items()}
        same(wanted, {name: t for name, t in loop.state_dict().items() if name in wanted})


def test_frozen_norms_stay_frozen():
    loop = members("resnet8", 3)
    for network in loop:
        network.layer2[0].bn1.eval()
        network.layer2[0].bn1.requires_grad_(False)
    grouped = copy.deepcopy(loop)
    grouped.arrange("grouped")
    x = images()
    same(tensors(grouped(x)), tensors(loop(x)))
    same(dict(grouped.state_dict()), dict(loop.state_dict()))
    assert [int(grouped.state_dict()[f"{i}.layer2.0.bn1.num_batches_tracked"]) for i in range(3)] == [0, 7, 14]
    assert [int(grouped.state_dict()[f"{i}.bn1.num_batches_tracked"]) for i in range(3)] == [1, 8, 15]
    plain = unstack(grouped.stacked, 1)
    norm = plain.layer2[0].bn1
    assert plain.training and not norm.training and not norm.weight.requires_grad
    assert plain.bn1.training and plain.bn1.weight.requires_grad


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def test_as_many_operations_as_one_network(monkeypatch):
    called = []

    def watched(x, norm, **options):
        called.append((options["relu"], options.get("residual") is not None))
        return op(x, norm, **options)

    op = functional.batch_norm_act
    monkeypatch.setattr(functional, "batch_norm_act", watched)
    stacked = stack(list(members("resnet8", 4)))
    assert (stacked.network.conv1.groups, stacked.network.conv1.out_channels) == (1, 4 * 16)
    assert stacked.network.layer1.get_submodule("0").conv1.groups == 4
    with Operators() as seen:
        stacked(images())
    assert seen.counts["convolution"] == 9 and seen.counts["baddbmm"] == 1
    assert seen.counts["_foreach_add_"] == 1 and seen.counts["add_"] == 0
    # Norm and ReLU, the ends of three blocks, two shortcuts.
    assert Counter(called) == {(True, False): 4, (True, True): 3, (False, False): 2}


class Tapped(nn.Module):
    """Norm and ReLU, with the value between them given back too; `kind` says how the ReLU is written."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.norm, self.kind = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), kind
        self.plain, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)

    def forward(self, x):
        before = self.conv(x)
        if self.kind == "input changed":
            normed = self.norm(before)
            return F.relu(normed + self.inplace(before))
        if self.kind == "residual changed":
            other = self.conv(x)
            normed = self.norm(before)
            other += 1.0
            return torch.relu(normed + other)
        normed = self.norm(before)
        if self.kind == "norm called twice":
            return {"sum": torch.relu(normed + self.norm(self.plain(before)))}
        if self.kind == "into the residual":
            before += normed
            return {"sum": self.plain(before), "before": before}
        if self.kind == "sum tapped":
            total = normed + before
            return {"sum": total, "relu": total.relu()}
        return normed, (self.inplace if self.kind == "in place" else self.plain)(normed)


@pytest.mark.parametrize(
    "kind",
    ["plain", "in place", "sum tapped", "input changed", "residual changed", "into the residual", "norm called twice"],
)
def test_values_that_others_read_are_not_fused_away(kind):
    loop = Networks(untidy(Tapped(kind)) for _ in range(3))
    grouped = copy.deepcopy(loop)
    grouped.arrange("grouped")
    x = images()
    with torch.no_grad():
        found, wanted = grouped(x), loop(x)
    for ours, theirs in zip(found, wanted, strict=True):
        assert type(ours) is type(theirs)
        same(*(y if isinstance(y, dict) else list(y) for y in (ours, theirs)))
    same(dict(grouped.state_dict()), dict(loop.state_dict()))


class Perceptron(nn.Module):
    """Max-pooling, flatten of a whole map, two linear layers (one without bias), a norm called twice; a bare tensor."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(3, 4, 3, padding="same"),
            nn.Conv2d(4, 4, 3, 1, 1, groups=2, padding_mode="circular"),
        )
        self.norm, self.pool, self.drop = nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Dropout(0.0)
        self.flatten, self.hidden, self.out = nn.Flatten(), nn.Linear(4 * 3 * 3, 6, bias=False), nn.Linear(6, CLASSES)

    def forward(self, x):
        y = self.pool(F.leaky_relu(self.norm(self.conv1(x)), 0.2))
        y = F.max_pool2d(torch.relu(self.norm(self.conv2(y))), 3, 1, 0)
        return self.out(self.drop(self.hidden(self.flatten(y))).relu())


def test_other_layers_equal_the_loop():
    loop = Networks(untidy(Perceptron()) for _ in range(3))
    grouped = copy.deepcopy(loop)
    grouped.arrange("grouped")
    x = images(4, 10)
    found, wanted = grouped(x), loop(x)
    same(found, wanted)
    same(dict(grouped.state_dict()), dict(loop.state_dict()))
    assert grouped.state_dict()["1.norm.num_batches_tracked"] == 2


@pytest.mark.long
def test_networks_of_other_makers_are_stacked():
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    taps = {"layer3": "middle", "fc": "logits"}
    loop = [untidy(torchvision.models.resnet18(num_classes=CLASSES)) for _ in range(2)]
    x = images(2, 33)
    grouped = Networks(create_feature_extractor(copy.deepcopy(network), taps) for network in loop)
    grouped.arrange("grouped")
    for found, network in zip(grouped(x), loop, strict=True):
        same(found, create_feature_extractor(network, taps)(x))


def test_features_are_views_of_one_stacked_map():
    grouped = members("resnet8", 3)
    grouped.arrange("grouped")
    outputs = grouped(images(channels_last=True))
    for stage in range(3):
        maps = [output.features[stage] for output in outputs]
        assert len({m.untyped_storage().data_ptr() for m in maps}) == 1
        assert len({m.grad_fn for m in maps}) == 1, "one node of the backward for all networks"
    assert type(outputs[0]) is type(models.build("resnet8", CLASSES)(images().float()))


def test_half_precision_as_the_loop_has_it():
    loop = members("resnet8", 2).float()
    grouped = copy.deepcopy(loop)
    grouped.arrange("grouped")
    x = images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, wanted = (tensors(each(x)) for each in (grouped, loop))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype == torch.bfloat16
        # A few roundings of bfloat16: eager rounds between norm, sum and ReLU.
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


def test_compiles_without_a_break():
    grouped = members("resnet8", 2)
    grouped.arrange("grouped")
    x, eager = images(), copy.deepcopy(grouped)
    same(tensors(torch.compile(grouped, fullgraph=True, backend="eager")(x)), tensors(eager(x)))
    same(dict(grouped.state_dict()), dict(eager.state_dict()))
