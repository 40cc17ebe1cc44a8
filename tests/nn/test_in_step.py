"""Networks whose synchronised norms share an exchange give what each gives alone."""

import copy

import pytest
import torch
from torch import nn

from fastfuse import functional
from fastfuse.kernels import _across
from fastfuse.models.cifar_resnet import CifarResNet
from fastfuse.nn import Networks
from fastfuse.nn.sync_norm import synchronise
from fastfuse.nn.transforms import DeepToShallow, transform_all
from tests.nn.test_casts import Counted


@pytest.fixture
def exchanges(monkeypatch):
    """Lengths of what is gathered; this process is all there are."""
    lengths = []

    def gathered(row):
        lengths.append(len(row))
        return row[None]

    monkeypatch.setattr(_across, "gathered", gathered)
    return lengths


def made():
    """Networks of 9 and of 15 norms, side by side."""
    torch.manual_seed(0)
    return Networks([CifarResNet(8, 3), CifarResNet(14, 3)]).double().train()


def found(networks, images):
    images = images.clone().requires_grad_()
    outputs = [value for output in networks(images) for value in (output.logits, *output.features)]
    sum(value.sin().sum() for value in outputs).backward()
    gradients = [p.grad for p in networks.parameters() if p.grad is not None]
    return [*outputs, images.grad, *gradients, *networks.buffers()]


def agree(ours, truth):
    assert len(ours) == len(truth)
    for own, expected in zip(ours, truth, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("frozen", [False, True])
def test_values_gradients_and_statistics_are_those_of_each_alone(exchanges, frozen):
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    networks = made()
    if frozen:  # one that asks nobody, beside one that does
        networks[0].layer1[0].bn1.eval()
    truth = found(copy.deepcopy(networks), images)
    synchronise(networks)
    with Counted() as seen:
        agree(found(networks, images), truth)
    assert seen.calls["_foreach_add_"] == 1  # which counts the batch
    # The longer network's 15 norms take the shorter one's along, forward and backward.
    assert len(exchanges) == 30
    channels = sum(m.num_features for m in networks.modules() if isinstance(m, nn.BatchNorm2d) and m.training)
    assert sum(exchanges) == 5 * channels


def test_a_copy_walks_through_its_own_layers(exchanges):
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    networks = made()
    truth = found(copy.deepcopy(networks), images)
    synchronise(networks)
    copied = copy.deepcopy(networks)
    before = [p.clone() for p in networks.buffers()]
    agree(found(copied, images), truth)
    assert all(torch.equal(b, p) for b, p in zip(before, networks.buffers(), strict=True)) and len(exchanges) == 30


class Drawn(nn.Module):
    """What no graph can say."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.norm(x) if float(x.sum()) > 1e9 else self.norm(-x)


@pytest.mark.parametrize("kind", ["hook", "forward"])
def test_a_network_whose_calls_are_not_known_goes_alone(exchanges, kind):
    images, seen = torch.randn(4, 3, 8, 8, dtype=torch.float64), []
    plain = [nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(2)]
    networks = Networks([*plain, Drawn()]).double().train()
    truth = copy.deepcopy(networks)(images)
    if kind == "hook":
        networks[0][1].register_forward_hook(lambda *_: seen.append(True))
    synchronise(networks)
    agree(networks(images), truth)
    assert len(exchanges) == (3 if kind == "hook" else 2)
    assert len(seen) == (kind == "hook")


def test_evaluation_and_another_arrangement_ask_as_before(exchanges):
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    networks = made()
    plain = copy.deepcopy(networks).eval()
    synchronise(networks)
    assert torch.equal(networks.eval()(images)[0].logits, plain(images)[0].logits) and not exchanges
    alike = Networks([CifarResNet(8, 3) for _ in range(2)]).double().train()
    truth = alike(images)[1].logits
    alike.arrange("grouped")
    synchronise(alike)
    torch.testing.assert_close(alike(images)[1].logits, truth, rtol=1e-9, atol=1e-10)
    assert len(exchanges) == 9


def test_transforms_share_theirs(exchanges):
    transforms = [DeepToShallow([2, 3, 4]).double(), DeepToShallow([3, 4]).double()]
    deep = [torch.randn(2, 4, 2, 2, dtype=torch.float64) for _ in transforms]
    truth = copy.deepcopy(transforms)
    expected = [maps for one, x in zip(truth, deep, strict=True) for maps in one(x)]
    synchronise(nn.ModuleList(transforms))
    ours = transform_all(transforms, deep, sizes=[None, None])
    agree([x for maps in ours for x in maps], expected)
    agree(list(nn.ModuleList(transforms).buffers()), list(nn.ModuleList(truth).buffers()))
    assert exchanges == [3 * (3 + 3), 3 * 2]


def test_half_precision_adds_one_rounding(exchanges):
    x = 3 + torch.randn(8, 2, 6, 6)
    norm = nn.BatchNorm2d(2)
    synchronise(norm)
    given = torch.randn_like(x)
    for dtype in (torch.float16, torch.bfloat16):
        own, truth = (x.to(dtype).to(kind).requires_grad_() for kind in (dtype, torch.float64))
        norm(own).backward(given.to(dtype))
        nn.functional.batch_norm(truth, None, None, training=True).backward(given.to(dtype).double())
        one = torch.finfo(dtype).eps
        torch.testing.assert_close(own.grad.double(), truth.grad, rtol=one, atol=1e-4)


def test_both_memory_formats_stay(exchanges):
    norm = functional.BatchNorm(*(torch.rand(3) for _ in range(4)), True, across=functional.Across())
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 4, 5).contiguous(memory_format=form).requires_grad_()
        out = norm(x)
        out.backward(torch.randn(2, 3, 4, 5).contiguous(memory_format=form))
        assert out.is_contiguous(memory_format=form) and x.grad.is_contiguous(memory_format=form)
