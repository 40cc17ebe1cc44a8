"""The distances of DFA against their formulas in float64, element by element, gradients included."""

import math

import pytest
import torch
from torch import Tensor, nn

from fastfuse import models
from fastfuse.errors import InputError
from fastfuse.losses import dfa
from tests.losses.published import scramble

SHAPE = (3, 4, 5, 6)


def random_maps(count: int) -> list[Tensor]:
    return [torch.randn(SHAPE, dtype=torch.float64) for _ in range(count)]


def random_weights(count: int) -> Tensor:
    return torch.randn(count, dtype=torch.float64).softmax(0)


def random_norm(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels).double()
    scramble(norm)
    with torch.no_grad():
        norm.bias.normal_()
    return norm.eval()


def expected_below_zero(mean: float, deviation: float) -> float:
    """E[x | x < 0] by the trapezoidal rule."""
    x = torch.linspace(min(mean, 0.0) - 12 * deviation, 0, 400_001, dtype=torch.float64)
    density = torch.exp(-((x - mean) ** 2) / (2 * deviation**2))
    return (torch.trapezoid(x * density, x) / torch.trapezoid(density, x)).item()


def test_margins_are_the_mean_of_what_is_negative() -> None:
    norm = nn.BatchNorm2d(6).double()
    means, deviations = [0.0, -1.0, 0.7, 2.9, -4.0, 0.3], [1.0, 0.5, -0.4, 1.0, 0.1, 2.0]
    norm.bias.data, norm.weight.data = (torch.tensor(x, dtype=torch.float64) for x in (means, deviations))
    wanted = [expected_below_zero(m, abs(s)) for m, s in zip(means, deviations, strict=True)]
    assert dfa.margin(norm).tolist() == pytest.approx(wanted, rel=1e-6)


def test_margins_of_channels_that_are_hardly_ever_negative_are_three_deviations() -> None:
    """P(x < 0) = 0.001 at a mean of 3.0902 deviations."""
    norm = nn.BatchNorm2d(3).double()
    norm.bias.data = torch.tensor([2 * 3.0901, 2 * 3.0904, 80.0], dtype=torch.float64)
    norm.weight.data = torch.tensor([2.0, -2.0, 0.5], dtype=torch.float64)
    found = dfa.margin(norm).tolist()
    assert found[0] == pytest.approx(expected_below_zero(2 * 3.0901, 2.0), rel=1e-6)
    assert found[1:] == pytest.approx([-6.0, -1.5], rel=1e-12)


def test_margins_of_constant_channels_are_finite() -> None:
    norm = nn.BatchNorm2d(3)
    norm.weight.data, norm.bias.data = torch.zeros(3), torch.tensor([-2.0, 0.0, 3.0])
    assert dfa.margin(norm).tolist() == [-2.0, 0.0, 0.0]


def test_the_aggregate_is_the_weighted_sum_and_its_gradient_reaches_the_weights() -> None:
    maps, weights = random_maps(3), random_weights(3).requires_grad_()
    found = dfa.aggregate(maps, weights)
    torch.testing.assert_close(found, sum(weights[j] * maps[j] for j in range(3)))
    grad = torch.randn(SHAPE, dtype=torch.float64)
    (ours,) = torch.autograd.grad(found, weights, grad)
    torch.testing.assert_close(ours, torch.stack([(x * grad).sum() for x in maps]))
    per_channel = torch.randn(3, SHAPE[1], dtype=torch.float64)
    wanted = sum(per_channel[j][:, None, None] * maps[j] for j in range(3))
    torch.testing.assert_close(dfa.aggregate(maps, per_channel), wanted)


@pytest.mark.parametrize("count", [1, 3])
def test_l2_is_the_mean_square_of_the_difference(count: int) -> None:
    maps, target = random_maps(count), random_maps(1)[0].requires_grad_()
    weights = random_weights(count).requires_grad_()
    ours = dfa.group_distance(maps, weights, target, group=0)
    difference = sum(weights[j] * maps[j] for j in range(count)) - target
    wanted = (difference * difference).sum() / math.prod(SHAPE)
    torch.testing.assert_close(ours, wanted)
    for a, b in zip(*(torch.autograd.grad(loss, (weights, target)) for loss in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("count", [1, 3])
def test_margin_distance_equals_the_formula(count: int) -> None:
    """Element by element; a student below the margin, between it and 0, and above all occur."""
    norms = [random_norm(SHAPE[1]) for _ in range(count)]
    maps, weights = random_maps(count), random_weights(count)
    target = (2 * random_maps(1)[0]).requires_grad_()
    ours = dfa.MarginDistance(norms, channels=SHAPE[1], count=count).double()(maps, weights, target, group=0)

    aggregate = sum(weights[j] * norms[j](maps[j]) for j in range(count)).detach()
    channel_margins = [
        sum(
            weights[j].item() * expected_or_three(norms[j].bias[c].item(), norms[j].weight[c].item())
            for j in range(count)
        )
        for c in range(SHAPE[1])
    ]
    total, grad, kinds = 0.0, torch.zeros(SHAPE, dtype=torch.float64), set()
    for b, c, h, w in torch.cartesian_prod(*(torch.arange(n) for n in SHAPE)).tolist():
        least = channel_margins[c]
        wanted, own = max(aggregate[b, c, h, w].item(), least), target[b, c, h, w].item()
        counted = own > wanted or wanted > 0
        kinds.add((counted, wanted > 0, wanted == least))
        if counted:
            total += (own - wanted) ** 2 / 1000 / SHAPE[0]
            grad[b, c, h, w] = 2 * (own - wanted) / 1000 / SHAPE[0]
    assert len(kinds) >= 4, "all cases of the loss occur"
    assert ours.item() == pytest.approx(total, rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(ours, target)[0], grad, rtol=1e-5, atol=1e-9)


def expected_or_three(mean: float, deviation: float) -> float:
    below = 0.5 * math.erfc(mean / abs(deviation) / math.sqrt(2))
    return expected_below_zero(mean, abs(deviation)) if below > 0.001 else -3 * abs(deviation)


def test_margin_distance_of_rectified_maps_has_margin_zero() -> None:
    maps, weights, target = [x.relu() for x in random_maps(2)], random_weights(2), random_maps(1)[0]
    ours = dfa.MarginDistance(None, channels=SHAPE[1], count=2).double()(maps, weights, target, group=0)
    wanted = weights[0] * maps[0] + weights[1] * maps[1]
    counted = (target > wanted) | (wanted > 0)
    torch.testing.assert_close(ours, ((target - wanted) ** 2)[counted].sum() / 1000 / SHAPE[0])


def test_half_precision_is_summed_in_float32() -> None:
    maps, weights, target = random_maps(2), random_weights(2), random_maps(1)[0]
    distance = dfa.MarginDistance([random_norm(SHAPE[1]).float() for _ in range(2)], channels=SHAPE[1], count=2)
    half = distance([x.bfloat16() for x in maps], weights.float(), target.bfloat16(), group=0)
    single = distance([x.bfloat16().float() for x in maps], weights.float(), target.bfloat16().float(), group=0)
    assert half.dtype == torch.float32 and torch.equal(half, single)


def test_margin_distances_of_a_teacher() -> None:
    """Of a wide ResNet the norms behind its blocks, of a ResNet none; what they hold is no part of state dicts."""
    wide = scramble(models.build("wrn16_1", 3)).eval()
    found = dfa.margin_distances(wide)
    assert [list(x.margins.shape) for x in found] == [[2, 16], [2, 32], [2, 64]]
    x = torch.randn(2, 32, 4, 4)
    for j, norm in enumerate((wide.layer2[1].bn1, wide.layer3[0].bn1)):
        scale, shift = (v[j][:, None, None] for v in (found[1].scale, found[1].shift))
        torch.testing.assert_close(x * scale + shift, norm(x))
        assert torch.equal(found[1].margins[j], dfa.margin(norm))
    assert not found.state_dict()
    assert not any(x.margins.any() or (x.scale != 1).any() for x in dfa.margin_distances(models.build("resnet8", 3)))


@pytest.mark.parametrize("distance", [dfa.group_distance, dfa.MarginDistance(None, channels=4, count=2)])
def test_maps_of_another_resolution_are_refused(distance) -> None:
    maps = [torch.zeros(2, 4, 8, 8)] * 2
    with pytest.raises(InputError, match=r"group 3: the teacher's maps are \[8, 8\] and the student's \[4, 4\]"):
        distance(maps, torch.tensor([0.5, 0.5]), torch.zeros(2, 4, 4, 4), group=2)
