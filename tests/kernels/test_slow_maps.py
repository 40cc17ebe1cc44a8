"""The operators that give maps, written out as loops over plain numbers, for what no recording covers."""

import math
from itertools import pairwise, product

import numpy as np
import pytest

from fastfuse import functional
from tests.kernels.slow import agrees, draw


@pytest.mark.parametrize("channels", [(3,), (2, 3), (1, 4, 2)])
def test_concat_conv1x1(channels):
    features, weight = [draw(2, c, 3, 4) for c in channels], draw(5, sum(channels), 1, 1)
    slow = np.zeros((2, 5, 3, 4))
    for b, o, i, j in np.ndindex(*slow.shape):
        values = [float(f[b, c, i, j]) for f in features for c in range(f.shape[1])]
        slow[b, o, i, j] = sum(float(weight[o, c, 0, 0]) * v for c, v in enumerate(values))
    agrees(functional.concat_conv1x1(features, weight), slow)


@pytest.mark.parametrize("channels", [(3,), (1, 4, 2)], ids=["one map", "three widths"])
def test_concat_conv1x1_with_scale_shift_and_statistics(channels):
    features, weight = [draw(2, c, 3, 4) for c in channels], draw(5, sum(channels), 1, 1)
    scale, shift = draw(sum(channels)), draw(sum(channels))
    slow = np.zeros((2, 5, 3, 4))
    for b, o, i, j in np.ndindex(*slow.shape):
        values = [float(f[b, c, i, j]) for f in features for c in range(f.shape[1])]
        taken = [max(float(scale[c]) * v + float(shift[c]), 0) for c, v in enumerate(values)]
        slow[b, o, i, j] = sum(float(weight[o, c, 0, 0]) * v for c, v in enumerate(taken))
    found = functional.concat_conv1x1(features, weight, scale=scale, shift=shift, statistics=True)
    agrees(found.out, slow)
    assert found.count == 24
    means = [sum(slow[:, o].ravel()) / 24 for o in range(5)]
    agrees(found.mean, means)
    agrees(found.var, [sum((v - m) ** 2 for v in slow[:, o].ravel()) / 24 for o, m in enumerate(means)])


def slow_norm(x, norm):
    """Batch norm of [B, C, H, W], and the running statistics afterwards."""
    mean, var = norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()
    out = np.zeros_like(x)
    for c in range(x.shape[1]):
        values = x[:, c].ravel()
        centre, spread = mean[c], var[c]
        if norm.training:
            count = len(values)
            centre = sum(values) / count
            spread = sum((v - centre) ** 2 for v in values) / count
            mean[c] += norm.momentum * (centre - mean[c])
            var[c] += norm.momentum * (spread * count / (count - 1) - var[c])
        out[:, c] = (x[:, c] - centre) / math.sqrt(spread + norm.eps) * float(norm.weight[c]) + float(norm.bias[c])
    return out, mean, var


def slow_norm_relu(x, norm):
    """relu(batch norm) of [B, C, H, W], and the running statistics afterwards."""
    out, mean, var = slow_norm(x, norm)
    return np.maximum(out, 0), mean, var


def random_norm(channels, training, momentum=0.1, eps=1e-5):
    return functional.BatchNorm(*draw(3, channels), draw(channels).abs() + 0.5, training, momentum, eps)


@pytest.mark.parametrize("modes", list(product([True, False], repeat=2)), ids=str)
@pytest.mark.parametrize("channels", [(3,), (1, 4, 2)], ids=["one map", "three widths"])
def test_concat_fuse(channels, modes):
    total, outputs = sum(channels), 4
    features = [draw(2, c, 3, 4) for c in channels]
    depthwise, pointwise = draw(total, 1, 3, 3), draw(outputs, total, 1, 1)
    norms = random_norm(total, modes[0], momentum=0.3), random_norm(outputs, modes[1], eps=1e-3)
    x = np.concatenate([f.numpy() for f in features], 1)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    filtered = np.zeros_like(x)
    for b, c, i, j in np.ndindex(*x.shape):
        filtered[b, c, i, j] = (padded[b, c, i : i + 3, j : j + 3] * depthwise[c, 0].numpy()).sum()
    hidden, *after1 = slow_norm_relu(filtered, norms[0])
    mixed = np.einsum("oc,bchw->bohw", pointwise[:, :, 0, 0].numpy(), hidden)
    slow, *after2 = slow_norm_relu(mixed, norms[1])
    found = functional.concat_fuse(features, depthwise, norms[0], pointwise, norms[1])
    agrees(found.fused, slow)
    agrees(found.attention, sum(slow[:, c] ** 2 for c in range(outputs)) / outputs)
    agrees(found.pooled, slow.mean((2, 3)))
    for norm, (mean, var) in zip(norms, (after1, after2), strict=True):
        agrees(norm.running_mean, mean)
        agrees(norm.running_var, var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("residual", "relu"), list(product([True, False], repeat=2)))
def test_batch_norm_act(residual, relu, training):
    networks, width = 3, 2
    x, shortcut = draw(2, networks * width, 3, 4), draw(2, networks * width, 3, 4)
    norm = random_norm(networks * width, training, momentum=0.3, eps=1e-3)
    slow, mean, var = slow_norm(x.numpy(), norm)
    slow = slow + shortcut.numpy() if residual else slow
    slow = np.maximum(slow, 0) if relu else slow
    found = functional.batch_norm_act(
        x, norm, residual=shortcut if residual else None, relu=relu, attention_groups=networks
    )
    agrees(found.out, slow)
    own = [[slow[b, s * width : (s + 1) * width] for b in range(2)] for s in range(networks)]
    agrees(found.attention, [[sum(plane**2 for plane in planes) / width for planes in batch] for batch in own])
    agrees(norm.running_mean, mean)
    agrees(norm.running_var, var)


def slow_transposed(x, weight, size):
    """The four-phase form of a stride-2 transposed 3x3 convolution, cut to a size of 2 n or 2 n - 1 per axis."""
    batch, _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))
    out = np.zeros((batch, weight.shape[1], 2 * height, 2 * width))
    # Per output parity: (kernel index, offset of the input) along one axis.
    taps = {0: [(1, 0)], 1: [(2, 0), (0, 1)]}
    for i, j, rows, columns in product(range(height), range(width), (0, 1), (0, 1)):
        for (a, di), (b, dj) in product(taps[rows], taps[columns]):
            pixel = padded[:, :, i + di, j + dj]
            out[:, :, 2 * i + rows, 2 * j + columns] += pixel @ weight[:, :, a, b]
    return out[:, :, : size[0], : size[1]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("deep", "sizes"),
    [
        pytest.param((3, 2), None, id="doubled"),
        pytest.param((14, 14), [(27, 28)], id="27 from 14 on one axis only"),
        pytest.param((14, 14), [(28, 27)], id="27 from 14 on the other"),
        pytest.param((7, 7), [(27, 27), (14, 14)], id="27 from 14 from 7"),
        pytest.param((3, 2), [(9, 8), (5, 4)], id="both cut, then rows cut"),
        pytest.param((1, 1), [(1, 2), (1, 1)], id="a single pixel that stays single"),
    ],
)
def test_deep_to_shallow(deep, sizes, training):
    channels = [3, 2, 4][: 1 + (len(sizes) if sizes else 2)]
    x = draw(2, channels[0], *deep)
    pairs = list(pairwise(channels))
    stages = [functional.Stage(draw(a, b, 3, 3), random_norm(b, training)) for a, b in pairs]
    wanted = sizes[::-1] if sizes else [(2 * deep[0], 2 * deep[1]), (4 * deep[0], 4 * deep[1])]
    slow, afterwards, y = [], [], x.numpy()
    for stage, size in zip(stages, wanted, strict=True):
        y, *after = slow_norm_relu(slow_transposed(y, stage.weight.numpy(), size), stage.norm)
        slow.insert(0, y)
        afterwards.append(after)
    found = functional.deep_to_shallow(x, stages, sizes=sizes)
    assert [tuple(m.shape[2:]) for m in found] == [tuple(size) for size in wanted[::-1]]
    for ours, expected in zip(found, slow, strict=True):
        agrees(ours, expected)
    for stage, (mean, var) in zip(stages, afterwards, strict=True):
        agrees(stage.norm.running_mean, mean)
        agrees(stage.norm.running_var, var)


def test_concat_fuse_gives_only_what_is_asked_for():
    features, depthwise, pointwise = [draw(2, 3, 4, 4)], draw(3, 1, 3, 3), draw(5, 3, 1, 1)
    norms = random_norm(3, False), random_norm(5, False)
    asked = {}
    for attention, pooled in product([True, False], repeat=2):
        found = functional.concat_fuse(
            features, depthwise, norms[0], pointwise, norms[1], attention=attention, pooled=pooled
        )
        assert (found.attention is not None, found.pooled is not None) == (attention, pooled)
        asked[attention, pooled] = found.fused
    assert all((fused == asked[True, True]).all() for fused in asked.values())
