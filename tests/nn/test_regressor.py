"""The connector that makes maps smaller: its sizes, what it reads, how it starts."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastfuse.nn.connectors import Regressor, smallest

# from, to
PAIRS = [
    pytest.param((8, 8), (4, 4), id="half"),
    pytest.param((8, 8), (2, 2), id="a quarter"),
    pytest.param((7, 7), (4, 4), id="odd: windows overlap"),
    pytest.param((5, 5), (4, 4), id="one less"),
    pytest.param((8, 8), (3, 3), id="no divisor"),
    pytest.param((6, 9), (6, 2), id="one extent alone"),
    pytest.param((8, 8), (1, 1), id="one position"),
    pytest.param((14, 10), (7, 4), id="not square"),
]


@pytest.mark.parametrize(("size", "smaller"), PAIRS)
def test_it_gives_the_size_and_reads_every_position(size, smaller):
    regressor = Regressor(3, size, smaller).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    found = regressor(x)
    assert found.shape == (2, 3, *smaller)
    with torch.no_grad():
        regressor.conv.weight.fill_(1.0)
    (read,) = torch.autograd.grad(regressor.conv(x).sum(), x)
    assert read.min() >= 1
    assert read.max() <= 3 * math.prod(
        -(-k // s) for k, s in zip(regressor.conv.kernel_size, regressor.conv.stride, strict=True)
    )


@pytest.mark.parametrize(("size", "smaller"), [((8, 8), (4, 4)), ((9, 6), (3, 6)), ((8, 8), (1, 1))])
def test_with_equal_weights_it_is_average_pooling(size, smaller):
    regressor = Regressor(2, size, smaller).double()
    with torch.no_grad():
        regressor.conv.weight.zero_()
        for channel in range(2):
            regressor.conv.weight[channel, channel] = 1 / math.prod(regressor.conv.kernel_size)
    x = torch.randn(2, 2, *size, dtype=torch.float64)
    torch.testing.assert_close(regressor.conv(x), F.adaptive_avg_pool2d(x, smaller))


def test_a_batch_norm_without_activation_follows_and_there_is_no_bias():
    regressor = Regressor(3, (8, 8), (4, 4)).double()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    found, convolved = regressor(x), regressor.conv(x)
    mean, variance = convolved.mean((0, 2, 3), keepdim=True), convolved.var((0, 2, 3), unbiased=False, keepdim=True)
    torch.testing.assert_close(found, (convolved - mean) / (variance + 1e-5).sqrt())
    assert found.min() < 0 and regressor.conv.bias is None


def test_it_starts_normal_with_fan_out_variance():
    weight = Regressor(32, (8, 8), (4, 4)).conv.weight
    assert weight.shape == (32, 32, 2, 2)
    assert weight.std().item() / math.sqrt(2 / (4 * 32)) == pytest.approx(1, abs=5 / math.sqrt(2 * weight.numel()))


def test_the_smallest_size_takes_each_extent_for_itself():
    assert smallest([(8, 4), (4, 8), (6, 6)]) == (4, 4)
