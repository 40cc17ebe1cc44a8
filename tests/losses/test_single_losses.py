"""AttentionLoss, NormalizedLpLoss, PeerDistillationLoss: prediction first, target second and constant, `reduction=`."""

import inspect

import pytest
import torch
from torch import Tensor

from fastfuse import AttentionLoss, NormalizedLpLoss, PeerDistillationLoss
from fastfuse.errors import InputError
from tests.losses import published

BATCH = 3


def feature(*shape: int) -> Tensor:
    return torch.randn(BATCH, *(shape or (4, 5, 6)), dtype=torch.float64).requires_grad_()


def logits(*shape: int) -> Tensor:
    return (2 * torch.randn(*(shape or (BATCH, 7)), dtype=torch.float64)).requires_grad_()


def attention_distance(x: Tensor, y: Tensor) -> Tensor:
    return published.distance(published.attention(x), published.attention(y))


def l1_distance(x: Tensor, y: Tensor) -> Tensor:
    return (published.unit(x) - published.unit(y)).abs().sum() / x.numel()


def peer_kl(x: Tensor, y: Tensor) -> Tensor:
    return published.kl(x, y, 3.0)


# how it is built, the formula (a batch mean), what its prediction and target look like
CASES = {
    "attention": (AttentionLoss, {}, attention_distance, feature),
    "normalized l2": (NormalizedLpLoss, {}, published.distance, feature),
    "normalized l1": (NormalizedLpLoss, {"p": 1}, l1_distance, feature),
    "peers": (PeerDistillationLoss, {"temperature": 3.0}, peer_kl, logits),
}


@pytest.fixture(params=CASES)
def case(request) -> tuple:
    return CASES[request.param]


def test_value_and_gradient(case) -> None:
    build, options, formula, make = case
    prediction, target = make(), make()
    loss = build(**options)(prediction, target)
    wanted = formula(prediction, target.detach())
    assert loss.dim() == 0
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    (ours,), (theirs,) = (torch.autograd.grad(value, [prediction]) for value in (loss, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-14)
    assert ours.any()


def test_the_target_is_detached(case) -> None:
    build, options, _, make = case
    prediction, target = make(), make()
    build(**options)(prediction, target).backward()
    assert prediction.grad is not None and target.grad is None


def test_prediction_and_target_have_their_places(case) -> None:
    """Of two tensors only the first one learns; for KL the value tells them apart as well."""
    build, options, _, make = case
    x, y = make(), make()
    loss = build(**options)
    loss(y, x).backward()
    assert y.grad is not None and x.grad is None
    if build is PeerDistillationLoss:
        assert loss(x, y).item() != pytest.approx(loss(y, x).item(), rel=1e-6)


def test_reductions(case) -> None:
    build, options, formula, make = case
    prediction, target = make(), make()
    per_sample = build(**options, reduction="none")(prediction, target)
    assert per_sample.shape == (BATCH,)
    for b, value in enumerate(per_sample):
        alone = formula(prediction[b : b + 1], target[b : b + 1])
        assert value.item() == pytest.approx(alone.item(), rel=1e-12)
    total = build(**options, reduction="sum")(prediction, target)
    mean = build(**options, reduction="mean")(prediction, target)
    assert total.item() == pytest.approx(per_sample.sum().item(), rel=1e-12)
    assert mean.item() == pytest.approx(per_sample.mean().item(), rel=1e-12)
    assert build(**options)(prediction, target).item() == mean.item()


def test_unknown_reduction(case) -> None:
    build, options, _, make = case
    with pytest.raises(InputError, match="reduction is 'mean', 'sum' or 'none', not 'batchmean'"):
        build(**options, reduction="batchmean")(make(), make())


def test_options_are_keywords_and_the_modules_hold_nothing(case) -> None:
    build, options, _, _ = case
    with pytest.raises(TypeError):
        build(*options.values(), "mean")
    assert not build(**options).state_dict()


def test_equal_tensors_are_at_distance_zero(case) -> None:
    build, options, _, make = case
    prediction = make()
    assert build(**options)(prediction, prediction.detach()).item() == pytest.approx(0.0, abs=1e-15)


def test_attention_takes_other_channels_and_ready_maps() -> None:
    prediction, target = feature(4, 5, 6), feature(9, 5, 6)
    loss = AttentionLoss()
    value = loss(prediction, target).item()
    assert value == pytest.approx(attention_distance(prediction, target).item(), rel=1e-12)
    ready = published.attention(target).view(BATCH, 5, 6)
    assert loss(prediction, ready).item() == pytest.approx(value, rel=1e-12)
    with pytest.raises(InputError, match="batch, height and width"):
        loss(prediction, feature(4, 6, 5))


def test_normalized_lp_refuses_other_shapes_and_powers() -> None:
    with pytest.raises(InputError, match="shape"):
        NormalizedLpLoss()(feature(4, 5, 6), feature(5, 5, 6))
    with pytest.raises(InputError, match="p is 1 or 2, not 3"):
        NormalizedLpLoss(p=3)(feature(), feature())


def test_temperature_has_no_default() -> None:
    """Methods differ (2 for FFSD, 3 for FFL, 1 for the original DML): the user says which."""
    assert inspect.signature(PeerDistillationLoss).parameters["temperature"].default is inspect.Parameter.empty
    with pytest.raises(TypeError, match="temperature"):
        PeerDistillationLoss()


@pytest.mark.parametrize("temperature", [0.0, -2.0])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature must be positive"):
        PeerDistillationLoss(temperature=temperature)(logits(), logits())


@pytest.mark.parametrize("form", ["list", "tuple", "stack"])
def test_several_peers_are_averaged_as_divergences(form: str) -> None:
    """The mean of the KLs, which is not the KL from the mean."""
    prediction, peers = logits(), logits(3, BATCH, 7)
    given = {"list": list(peers.unbind(0)), "tuple": tuple(peers.unbind(0)), "stack": peers}[form]
    loss = PeerDistillationLoss(temperature=2.0)(prediction, given)
    wanted = sum(published.kl(prediction, peer, 2.0) for peer in peers) / 3
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert loss.item() != pytest.approx(published.kl(prediction, peers.mean(0), 2.0).item(), rel=1e-3)
    loss.backward()
    assert peers.grad is None and prediction.grad.any()


def test_one_peer_in_every_form() -> None:
    prediction, peer = logits(), logits()
    loss = PeerDistillationLoss(temperature=2.0)
    assert len({loss(prediction, given).item() for given in (peer, [peer], peer[None])}) == 1


def test_no_peer_is_refused() -> None:
    with pytest.raises(InputError, match="at least one peer"):
        PeerDistillationLoss(temperature=2.0)(logits(), [])
