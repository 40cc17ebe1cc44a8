"""Exact identities that kernels rely on: closed-form gradients, concatenations never built, values at the edges."""

import pytest
import torch
from torch.nn import functional as F

from fastfuse import functional
from fastfuse.testing import relative_l2
from tests.kernels.slow import draw

BOUND = 1e-12


def gradient(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def unit(x):
    x = x.flatten(1)
    return x / x.norm(dim=1, keepdim=True)


def through_norm(upstream, x):
    """Gradient of a function of x / |x| with respect to x, both [B, N]: radial part removed, divided by |x|."""
    xh = unit(x)
    return (upstream - (upstream * xh).sum(1, keepdim=True) * xh) / x.norm(dim=1, keepdim=True)


def to_feature(map_gradient, feature):
    """dL/dF = dL/da * 2 F / C."""
    batch, channels, height, width = feature.shape
    return map_gradient.view(batch, 1, height, width) * 2 * feature / channels


def test_attention_gradient():
    x, y = draw(2, 5, 4, 3).requires_grad_(), draw(2, 3, 4, 3).requires_grad_()
    ax, ay = (functional.attention_map(f).detach().flatten(1) for f in (x, y))
    error = 2 / (2 * 12) * (unit(ax) - unit(ay))
    found = gradient(functional.attention_mse(x, y), x, y)
    assert relative_l2(found[0], to_feature(through_norm(error, ax), x)) <= BOUND
    assert relative_l2(found[1], to_feature(through_norm(-error, ay), y)) <= BOUND


@pytest.mark.parametrize("p", [1, 2])
def test_normalized_lp_gradient(p):
    x, y = draw(2, 5, 4, 3).requires_grad_(), draw(2, 5, 4, 3)
    error = unit(x.detach()) - unit(y)
    upstream = (error.sign() if p == 1 else 2 * error) / error.numel()
    expected = through_norm(upstream, x.detach().flatten(1)).view_as(x)
    assert relative_l2(gradient(functional.normalized_lp(x, y, p=p), x)[0], expected) <= BOUND


@pytest.mark.parametrize("mode", ["published", "normalized"])
def test_diversity_gradient_and_expanded_form(mode):
    x, y = draw(2, 5, 4, 3).requires_grad_(), draw(2, 3, 4, 3)
    ax, ay = (functional.attention_map(f).detach().flatten(1) for f in (x, y))
    shift = (functional.diversity_target(y, mode=mode) - y)[:, 0].flatten(1) * 3 / ay.norm(dim=1, keepdim=True)
    target = unit(ay) + shift
    loss = functional.diversity_loss(x, y, mode=mode)
    expanded = (1 - 2 * (unit(ax) * target).sum(1) + target.square().sum(1)) / 12
    assert relative_l2(loss, expanded.mean()) <= BOUND
    expected = to_feature(through_norm(-2 / (2 * 12) * target, ax), x)
    assert relative_l2(gradient(loss, x)[0], expected) <= BOUND


@pytest.mark.parametrize("heads", [2, 4])
def test_peer_gradient_needs_only_the_mean_of_the_teachers(heads):
    logits, labels, temperature = draw(heads, 3, 5).requires_grad_(), torch.tensor([0, 4, 2]), 3.0
    found = functional.peer_kl_ce(logits, labels, temperature=temperature)
    soft = (logits.detach() / temperature).softmax(2)
    others = (soft.sum(0) - soft) / (heads - 1)
    expected = logits.detach().softmax(2) - F.one_hot(labels, 5) + temperature * (soft - others)
    total = found.cross_entropy.sum() + found.divergence.sum()
    assert relative_l2(gradient(total, logits)[0], expected / 3) <= BOUND


@pytest.mark.parametrize("over", ["positions", "channels"])
def test_feature_kl_gradients(over):
    features, target = draw(2, 3, 4, 5, 2).requires_grad_(), draw(3, 4, 5, 2).requires_grad_()
    temperature = 2.5
    dims, count = ((-2, -1), 3 * 4) if over == "positions" else ((-3,), 3 * 5 * 2)
    log_p, log_q = (x.detach() / temperature for x in (features, target))
    log_p, log_q = (x - x.logsumexp(dims, keepdim=True) for x in (log_p, log_q))
    ratio = log_q - log_p
    divergence = (log_q.exp() * ratio).sum(dims, keepdim=True)
    found = gradient(functional.feature_kl(features, target, temperature=temperature, over=over), features, target)
    assert relative_l2(found[0], temperature * (log_p.exp() - log_q.exp()) / count) <= BOUND
    assert relative_l2(found[1], temperature * (log_q.exp() * (ratio - divergence)).sum(0) / count) <= BOUND


def test_feature_mse_gradients():
    features, target = draw(3, 2, 4, 5, 2).requires_grad_(), draw(2, 4, 5, 2).requires_grad_()
    found = gradient(functional.feature_mse(features, target), features, target)
    expected = 2 * (features.detach() - target.detach()) / target.numel()
    assert relative_l2(found[0], expected) <= BOUND
    assert relative_l2(found[1], -expected.sum(0)) <= BOUND


def test_attention_of_several_maps_is_that_of_their_concatenation():
    features = [draw(2, c, 4, 3).requires_grad_() for c in (1, 5, 2)]
    weights = draw(2, 4, 3)
    parts, whole = functional.attention_map(features), functional.attention_map(torch.cat(features, 1))
    assert relative_l2(parts, whole) <= BOUND
    gradients = [gradient((a * weights).sum(), *features) for a in (parts, whole)]
    for ours, expected in zip(*gradients, strict=True):
        assert relative_l2(ours, expected) <= BOUND


@pytest.mark.parametrize("training", [True, False])
def test_fusion_is_a_sum_over_students(training):
    """Depthwise convolution, norm and ReLU act per channel, and a 1x1 convolution is a sum over its inputs' groups."""
    features = [draw(2, c, 4, 3) for c in (2, 3)]
    depthwise, pointwise = draw(5, 1, 3, 3), draw(4, 5, 1, 1)
    fields = torch.cat([draw(3, 5), draw(1, 5).abs()]), torch.cat([draw(3, 4), draw(1, 4).abs()])
    total = 0
    for feature, channels in zip(features, (slice(0, 2), slice(2, 5)), strict=True):
        own = functional.BatchNorm(*fields[0][:, channels].clone(), training)
        hidden = own(F.conv2d(feature, depthwise[channels], padding=1, groups=feature.shape[1])).relu()
        total = total + functional.concat_conv1x1([hidden], pointwise[:, channels])
    expected = functional.BatchNorm(*fields[1].clone(), training)(total).relu()
    norms = [functional.BatchNorm(*f.clone(), training) for f in fields]
    found = functional.concat_fuse(features, depthwise, norms[0], pointwise, norms[1])
    assert relative_l2(found.fused, expected) <= BOUND


def test_both_distances_from_three_sums_per_position():
    """|x|^2 = C sum a_x, x.y = sum d: one reading of both maps serves the feature and the attention distance."""
    x, y = draw(3, 5, 4, 2), draw(3, 5, 4, 2)
    ax, ay = (functional.attention_map(f).flatten(1) for f in (x, y))
    product = (x * y).sum((1, 2, 3))
    cosine = product / (5 * (ax.sum(1) * ay.sum(1)).sqrt())
    assert relative_l2(functional.normalized_lp(x, y, reduction="none"), (2 - 2 * cosine) / 40) <= BOUND
    cosine = (unit(ax) * unit(ay)).sum(1)
    assert relative_l2(functional.attention_mse(x, y, reduction="none"), (2 - 2 * cosine) / 8) <= BOUND


def test_extremes_of_the_distances():
    x = draw(2, 3, 4, 2)
    assert functional.normalized_lp(x, 3 * x).item() <= 1e-30  # the length does not count
    assert relative_l2(functional.normalized_lp(x, -x), torch.tensor(4 / 24)) <= 1e-7
    left, right = torch.zeros(2, 3, 4, 2), torch.zeros(2, 3, 4, 2)
    left[..., 0], right[..., 1] = 1, 1
    assert relative_l2(functional.attention_mse(left, right), torch.tensor(2 / 8)) <= 1e-7


@pytest.mark.parametrize("distance", [functional.attention_mse, functional.normalized_lp])
def test_all_zero_samples(distance):
    x, y = draw(3, 2, 4, 2), draw(3, 2, 4, 2)
    x[0], x[1], y[1] = 0, 0, 0
    found = distance(x, y, reduction="none")
    elements = 8 if distance is functional.attention_mse else 16
    assert found[0].item() == pytest.approx(1 / elements, rel=1e-14)
    assert found[1].item() == 0


def test_no_gradient_through_the_attention_of_zeros():
    x, y = draw(3, 2, 4, 2), draw(3, 2, 4, 2)
    x[0] = 0
    for loss in (functional.attention_mse, functional.diversity_loss):
        found = gradient(loss(x.requires_grad_(), y), x)[0]
        assert (found[0] == 0).all()
        assert found[1:].isfinite().all() and (found[1:] != 0).any()


@pytest.mark.parametrize("distance", [functional.attention_mse, functional.normalized_lp])
def test_nearly_equal_maps_do_not_cancel(distance):
    """In float32, 2 - 2 cos is off by 1e-4 or more here; sums of squared differences are not."""
    x = 1 + draw(4, 3, 8, 8).abs()
    y = x * (1 + 3e-3 * draw(4, 3, 8, 8))
    x, y = (v.float().double() for v in (x, y))
    assert relative_l2(distance(x.float(), y.float()), distance(x, y)) <= 1e-5


def test_detached_arguments_get_no_gradient():
    x, y, logits = (draw(*s).requires_grad_() for s in ((2, 3, 4, 3), (2, 3, 4, 3), (3, 4, 5)))
    functional.diversity_loss(x, y).backward()
    assert x.grad is not None and y.grad is None
    assert not functional.diversity_target(y).requires_grad
    prediction, peer = (draw(4, 5).requires_grad_() for _ in range(2))
    functional.peer_kl(prediction, [peer], temperature=2.0).backward()
    assert prediction.grad is not None and peer.grad is None
    teachers = [[functional.ENSEMBLE, 1], [0], [0]]
    divergence = functional.peer_kl_ce(logits, torch.zeros(4, dtype=torch.long), temperature=2.0, teachers=teachers)[1]
    found = gradient(divergence[0], logits)[0]
    assert (found[0] != 0).any() and (found[1:] == 0).all()


@pytest.mark.parametrize("loss", [functional.attention_mse, functional.normalized_lp])
def test_distances_are_symmetric_and_so_are_their_gradients(loss):
    x, y = draw(2, 3, 4, 3).requires_grad_(), draw(2, 3, 4, 3).requires_grad_()
    there, back = gradient(loss(x, y), x, y), gradient(loss(y, x), x, y)
    for a, b in zip(there, back, strict=True):
        assert relative_l2(a, b) <= BOUND


def test_detached_features_train_the_fusion_module_alike():
    """FFSD detaches the maps, FFL does not: the parameters' gradients are the same."""
    found = []
    for wanted in (True, False):
        torch.manual_seed(0)
        features = [draw(2, 2, 4, 3).requires_grad_(wanted) for _ in range(2)]
        weights = draw(4, 1, 3, 3).requires_grad_(), draw(3, 4, 1, 1).requires_grad_()
        norms = [functional.BatchNorm(*draw(3, c), torch.ones(c).double(), True) for c in (4, 3)]
        fused = functional.concat_fuse(features, weights[0], norms[0], weights[1], norms[1])
        (fused.attention.sum() + fused.pooled.square().sum()).backward()
        assert [f.grad is not None for f in features] == [wanted] * 2
        found.append([w.grad for w in weights])
    for a, b in zip(*found, strict=True):
        assert relative_l2(a, b) <= BOUND


def test_lengths_below_1e_12_count_as_1e_12():
    tiny, ordinary = torch.tensor([[[3e-12, 4e-12], [1e-13, 0]], [[3.0, 4.0], [0, 1]]], dtype=torch.float64)
    found = functional.normalized_lp(tiny, ordinary, reduction="none")
    assert found[0].item() <= 1e-24
    assert found[1].item() == pytest.approx((0.1**2 + 1) / 2, rel=1e-14)
