"""The losses' equations, written out as loops over plain numbers, for what no recording covers."""

import math

import numpy as np
import pytest
import torch

from fastfuse import functional
from fastfuse.functional import ENSEMBLE
from tests.kernels.slow import agrees, draw


def slow_attention(feature):
    """[H W] values of one sample [C, H, W]; a ready map [H, W] is its own attention."""
    x = feature.numpy()
    if x.ndim == 2:
        return [float(v) for v in x.ravel()]
    channels, height, width = x.shape
    return [
        sum(float(x[c, i, j]) ** 2 for c in range(channels)) / channels for i in range(height) for j in range(width)
    ]


def slow_norm(values):
    return math.sqrt(sum(v * v for v in values))


def slow_unit(values):
    length = max(slow_norm(values), 1e-12)
    return [v / length for v in values]


def slow_mean_power(a, b, p=2):
    return sum(abs(u - v) ** p for u, v in zip(a, b, strict=True)) / len(a)


def slow_attention_mse(x, y):
    """Per sample."""
    return [
        slow_mean_power(slow_unit(slow_attention(a)), slow_unit(slow_attention(b))) for a, b in zip(x, y, strict=True)
    ]


REDUCTIONS = {"none": list, "sum": sum, "mean": lambda losses: sum(losses) / len(losses)}
reductions = pytest.mark.parametrize("reduction", REDUCTIONS)


@reductions
@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param((3, 4, 5, 3), (3, 2, 5, 3), id="channels differ"),
        pytest.param((3, 5, 3), (3, 5, 3), id="both are ready attention maps"),
        pytest.param((2, 3, 4), (2, 5, 3, 4), id="a ready map against features"),
        pytest.param((1, 1, 1, 7), (1, 1, 1, 7), id="one row, one channel, a batch of one"),
    ],
)
def test_attention_mse(x, y, reduction):
    x, y = draw(*x), draw(*y)
    agrees(functional.attention_mse(x, y, reduction=reduction), REDUCTIONS[reduction](slow_attention_mse(x, y)))


@reductions
def test_attention_mse_of_a_list(reduction):
    x, y = [draw(2, 3, 4, 3), draw(2, 2, 3)], [draw(2, 5, 4, 3), draw(2, 4, 2, 3)]
    slow = [REDUCTIONS[reduction](slow_attention_mse(a, b)) for a, b in zip(x, y, strict=True)]
    agrees(functional.attention_mse(x, y, reduction=reduction), slow)


@pytest.mark.parametrize("channels", [(4,), (2, 3), (1, 5, 2)])
def test_attention_map_is_that_of_the_concatenation(channels):
    features = [draw(2, c, 3, 5) for c in channels]
    slow = [np.reshape(slow_attention(sample), (3, 5)) for sample in torch.cat(features, 1)]
    agrees(functional.attention_map(features), slow)


@reductions
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5, 2), (2, 2, 3, 2, 2)], ids=["rows", "maps", "five dimensions"])
def test_normalized_lp(shape, p, reduction):
    x, y = draw(*shape), draw(*shape)
    slow = [slow_mean_power(*(slow_unit(v.flatten().tolist()) for v in pair), p=p) for pair in zip(x, y, strict=True)]
    agrees(functional.normalized_lp(x, y, p=p, reduction=reduction), REDUCTIONS[reduction](slow))
    agrees(functional.normalized_lp([x, x], [y, x], p=p, reduction=reduction)[0], REDUCTIONS[reduction](slow))


@reductions
@pytest.mark.parametrize("p", [1, 2])
def test_normalized_lp_joint(p, reduction):
    x, y = [draw(2, 3, 4, 3), draw(2, 4, 2, 3)], [draw(2, 3, 4, 3), draw(2, 4, 2, 3)]
    found = functional.normalized_lp_joint(x, y, p=p, reduction=reduction)
    agrees(found.feature, functional.normalized_lp(x, y, p=p, reduction=reduction))
    slow = [REDUCTIONS[reduction](slow_attention_mse(a, b)) for a, b in zip(x, y, strict=True)]
    agrees(found.attention, slow)
    alone = functional.normalized_lp_joint(x[0], y[0], p=p, reduction=reduction)
    agrees(alone.feature, found.feature[0])
    agrees(alone.attention, found.attention[0])


def slow_shift(sample, mode):
    """t, yh and |att(y)| of one sample."""
    values = slow_attention(sample)
    unit, length = slow_unit(values), slow_norm(values)
    n = length if mode == "published" else 1.0
    tau = sorted(unit)[len(unit) // 3 - 1]
    return [n - v if v > tau else v if v < tau else n / 2 for v in unit], unit, length


@reductions
@pytest.mark.parametrize("mode", ["published", "normalized"])
@pytest.mark.parametrize(
    ("x", "y"),
    [
        pytest.param((2, 4, 5, 3), (2, 3, 5, 3), id="channels differ"),
        pytest.param((2, 5, 7), (2, 3, 5, 7), id="x is a ready map, odd sides"),
        pytest.param((2, 4, 5), (2, 4, 5), id="both are ready maps"),
        pytest.param((1, 2, 1, 3), (1, 2, 1, 3), id="three positions, the fewest: k = 1"),
    ],
)
def test_diversity_loss(x, y, mode, reduction):
    x, y = draw(*x), draw(*y)
    slow = [slow_mean_power(slow_unit(slow_attention(a)), slow_shift(b, mode)[0]) for a, b in zip(x, y, strict=True)]
    agrees(functional.diversity_loss(x, y, mode=mode, reduction=reduction), REDUCTIONS[reduction](slow))


@pytest.mark.parametrize("mode", ["published", "normalized"])
@pytest.mark.parametrize("tied", [False, True], ids=["no ties", "several values equal to the threshold"])
def test_diversity_target(mode, tied):
    y = draw(2, 3, 4, 5)
    if tied:
        y[:, :, 1:3] = 0.1
        y[:, :, 0, 0] = 0
    slow = y.numpy().copy()
    for sample in slow:
        target, unit, length = slow_shift(torch.from_numpy(sample), mode)
        if tied:
            assert sum(t == (length if mode == "published" else 1.0) / 2 for t in target) > 1
        shift = [(t - u) * length / sample.shape[0] for t, u in zip(target, unit, strict=True)]
        sample += np.reshape(shift, sample.shape[1:])
    agrees(functional.diversity_target(y, mode=mode), slow)


def slow_softmax(row, temperature):
    powers = [math.exp((v - max(row)) / temperature) for v in row]
    return [v / sum(powers) for v in powers]


def slow_divergence(row, teacher, temperature, epsilon=0.0):
    """T^2 KL of one sample, the target shifted by epsilon and not renormalised."""
    p, q = slow_softmax(row, temperature), [v + epsilon for v in slow_softmax(teacher, temperature)]
    return temperature**2 * sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize(
    ("heads", "options"),
    [
        pytest.param(1, {}, id="one head has nobody to learn from"),
        pytest.param(3, {}, id="everyone from all others"),
        pytest.param(3, {"teachers": [[1, 2], [], [0]]}, id="named teachers, one head without"),
        pytest.param(3, {"teachers": [[2], [2], [ENSEMBLE]], "ensemble": [0, 1]}, id="FFL: fused head from two"),
        pytest.param(2, {"teachers": [[ENSEMBLE], [0, ENSEMBLE]]}, id="an ensemble of all, the head itself among them"),
        pytest.param(3, {"target_epsilon": 1e-3}, id="an offset of the targets"),
        pytest.param(2, {"label_smoothing": 0.2}, id="smoothed labels"),
        pytest.param(2, {"weights": torch.tensor([[9, 0.5, 9], [2, 9, 9]])}, id="a weight for every edge"),
    ],
)
def test_peer_kl_ce(heads, options):
    batch, classes, temperature = 4, 5, 3.0
    logits, labels = draw(heads, batch, classes) * 3, torch.tensor([0, 4, 2, 2])
    rows = logits.tolist()
    teachers = options.get("teachers") or [[j for j in range(heads) if j != i] for i in range(heads)]
    members = options.get("ensemble", range(heads))
    mean_row = [[sum(rows[i][b][k] for i in members) / len(members) for k in range(classes)] for b in range(batch)]
    cross_entropy, divergence, correct = [], [], []

    def weight(head, teacher, own):
        return options["weights"][head, teacher].item() if "weights" in options else 1 / len(own)

    for i, own in enumerate(teachers):
        smoothing = options.get("label_smoothing", 0.0)
        wanted = [[(1 - smoothing) * (k == y) + smoothing / classes for k in range(classes)] for y in labels.tolist()]
        log_p = [[math.log(p) for p in slow_softmax(row, 1.0)] for row in rows[i]]
        losses = [-sum(w * p for w, p in zip(*pair, strict=True)) for pair in zip(wanted, log_p, strict=True)]
        cross_entropy.append(sum(losses) / batch)
        correct.append(sum(row.index(max(row)) == y for row, y in zip(rows[i], labels.tolist(), strict=True)))
        losses = [
            slow_divergence(rows[i][b], mean_row[b] if j == ENSEMBLE else rows[j][b], temperature,
                            options.get("target_epsilon", 0.0)) * weight(i, j, own)
            for j in own for b in range(batch)
        ]  # fmt: skip
        divergence.append(sum(losses) / batch)
    for form in (logits, list(logits)):
        found = functional.peer_kl_ce(form, labels, temperature=temperature, **options)
        agrees(found.cross_entropy, cross_entropy)
        agrees(found.divergence, divergence)
        assert found.correct.tolist() == correct


@reductions
@pytest.mark.parametrize("stacked", [False, True])
def test_peer_kl(stacked, reduction):
    prediction, peers = draw(3, 4), draw(2, 3, 4)
    slow = [
        sum(slow_divergence(row.tolist(), p[b].tolist(), 2.0) for p in peers) / 2 for b, row in enumerate(prediction)
    ]
    found = functional.peer_kl(prediction, peers if stacked else list(peers), temperature=2.0, reduction=reduction)
    agrees(found, REDUCTIONS[reduction](slow))


FORMS = [
    pytest.param(lambda f, t: (f, t[0]), id="one target for all"),
    pytest.param(lambda f, t: (f, t), id="a target each"),
    pytest.param(lambda f, t: (torch.stack(f), t[0]), id="students stacked"),
]


@pytest.mark.parametrize("form", FORMS)
def test_feature_mse(form):
    given, target = form([draw(2, 3, 4, 2) for _ in range(3)], [draw(2, 3, 4, 2) for _ in range(3)])
    slow = 0.0
    for s, feature in enumerate(given):
        goal = target if isinstance(target, torch.Tensor) else target[s]
        slow += slow_mean_power(feature.flatten().tolist(), goal.flatten().tolist())
    agrees(functional.feature_mse(given, target), slow)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("count", [1, 3])
def test_aggregate_distance(count, reduction):
    maps, weights, target = draw(count, 2, 3, 4, 2), draw(count), draw(2, 3, 4, 2)
    rows = [x.flatten().tolist() for x in (*maps, target)]
    *rows, goal = rows
    slow = sum(
        (sum(float(w) * row[i] for w, row in zip(weights, rows, strict=True)) - value) ** 2
        for i, value in enumerate(goal)
    )
    slow /= len(goal) if reduction == "mean" else 1
    agrees(functional.aggregate_distance(maps, weights, target, reduction=reduction), slow)


@pytest.mark.parametrize("over", ["positions", "channels"])
@pytest.mark.parametrize("form", FORMS)
def test_feature_kl(form, over):
    given, target = form([draw(2, 3, 4, 2) for _ in range(3)], [draw(2, 3, 4, 2) for _ in range(3)])
    slow = 0.0
    for s, feature in enumerate(given):
        goal = target if isinstance(target, torch.Tensor) else target[s]
        rows = [x.flatten(2) if over == "positions" else x.flatten(2).transpose(1, 2) for x in (feature, goal)]
        rows = [x.flatten(0, 1).tolist() for x in rows]
        slow += sum(slow_divergence(a, b, 2.5) for a, b in zip(*rows, strict=True)) / len(rows[0])
    agrees(functional.feature_kl(given, target, temperature=2.5, over=over), slow)
