"""FFSD's terms and gradients against the equations, network by network; its warm-up; what each weight weighs."""

import math

import pytest
import torch
from torch import Tensor

from fastfuse import FusionLoss
from tests.losses import batches, published

BOUND = 1e-10
EQUAL = [4, 6, 8]
HYPER = {
    "temperature": 2.0,
    # Of one order, so that an error in any term shows in the gradients.
    "lambda_diversity": 0.3,
    "lambda_fusion": 10.0,
    "lambda_self_distillation": 20.0,
    "diversity_mode": "published",
}
# students' channels, leader's, size of the deepest map, deviations of hyper-parameters, transforms trained elsewhere
CASES = {
    "published: two students of three stages": ([EQUAL] * 2, EQUAL, 2, {}, {}),
    "three students: a chain of diversity, peers averaged": ([EQUAL] * 3, EQUAL, 2, {}, {}),
    "four students": ([[3, 4]] * 4, [3, 4], 3, {}, {}),
    "nine positions, three below the threshold": ([EQUAL] * 2, EQUAL, 3, {}, {}),
    "maps that are not square": ([EQUAL] * 2, EQUAL, (2, 3), {}, {}),
    "last maps only: no self-distillation": ([8, 8], 8, 4, {}, {}),
    "no leader": ([EQUAL] * 2, None, 2, {}, {}),
    "no leader, last maps only, three students": ([8, 8, 8], None, 4, {}, {}),
    "other channels per student: transforms learn from the student whose map they read": (
        [[4, 6, 8], [3, 5, 9], [2, 6, 4]],
        [5, 7, 6],
        2,
        {},
        {1: 0, 2: 1},
    ),
    "equal last widths, other shallow ones: transforms learn from their own student": (
        [[4, 6, 8], [3, 5, 8]],
        EQUAL,
        2,
        {},
        {},
    ),
    "normalized diversity": ([EQUAL] * 2, EQUAL, 3, {"diversity_mode": "normalized"}, {}),
    "another temperature": ([EQUAL] * 2, EQUAL, 2, {"temperature": 3.7}, {}),
}


def prepared(case: str, **deviations: float) -> tuple[FusionLoss, dict]:
    """The loss of a case with batch norms that each count, and a batch."""
    students, leader, deep, changed, _ = CASES[case]
    loss = FusionLoss(
        students, batches.CLASSES, method="ffsd", leader_channels=leader, **(HYPER | changed | deviations)
    )
    return published.scramble(loss.double()), batches.arguments(students, leader, deep=deep)


def network_of(leaf: str) -> str:
    """Which network of the published order an argument or parameter belongs to."""
    head, _, rest = leaf.partition(".")
    if head == "trans_fusion":
        return "leader"
    if head == "transforms":
        name = rest.partition(".")[0]
        return "transform_leader" if name == "leader" else name.replace("student", "transform")
    return head


def gradients(loss: FusionLoss, given: dict, **options: float) -> dict[str, Tensor | None]:
    """Of the one summed loss, for every argument and parameter."""
    leaves = batches.leaves(given) | dict(loss.named_parameters())
    found = torch.autograd.grad(loss(**given, **options).loss, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_terms_gradients_and_statistics_equal_the_published_order(case: str) -> None:
    loss, given = prepared(case)
    _, _, _, changed, trained_on = CASES[case]
    state = published.trainable_copy(loss)
    terms = published.ffsd(state, HYPER | changed, **given, factor=math.exp(-1.8), trained_on=trained_on)
    leaves = batches.leaves(given) | {name: t for name, t in state.items() if t.requires_grad}
    output = loss(**given, progress=1)

    wanted = published.flat(terms)
    assert set(output.terms) == set(wanted)
    assert all(output.terms[name].dim() == 0 for name in wanted)
    assert batches.differing(output.terms, {name: term.detach() for name, term in wanted.items()}) == {}
    assert batches.error(output.loss.detach(), sum(wanted.values()).detach()) <= BOUND

    ours = dict(zip(leaves, _grads(output.loss, batches.leaves(given) | dict(loss.named_parameters())), strict=True))
    for network, own in terms.items():
        mine = {name: leaf for name, leaf in leaves.items() if network_of(name) == network}
        published_gradients = dict(zip(mine, _grads(sum(own.values()), mine), strict=True))
        assert batches.differing(ours, published_gradients) == {}, f"{network}'s own loss alone gives other gradients"
        foreign = {name: leaf for name, leaf in leaves.items() if name not in mine}
        assert not any(g is not None and g.any() for g in _grads(sum(own.values()), foreign)), network
    assert {network_of(name) for name in leaves} == set(terms)

    buffers = dict(loss.named_buffers())
    statistics = {name: tensor for name, tensor in state.items() if "running" in name}
    assert statistics
    assert batches.differing(buffers, statistics) == {}
    # Once each: the making of targets in eval mode does not count.
    assert {int(b) for n, b in buffers.items() if n.endswith("num_batches_tracked")} == {1}


def _grads(total: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(total, list(leaves.values()), allow_unused=True, retain_graph=True)


def test_defaults_are_the_published_ones() -> None:
    assert FusionLoss([8, 8], 5, method="ffsd").hyperparameters == {
        "temperature": 2.0,
        "rampup_epochs": 5,
        "lambda_diversity": 1e-5,
        "lambda_fusion": 10.0,
        "lambda_self_distillation": 1000.0,
        "diversity_mode": "published",
    }


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(1, 0.0408), (2, 0.1653), (3, 0.4493), (4, 0.8187), (5, 1.0), (6, 1.0), (200, 1.0)],
)
def test_warm_up_weighs_the_lambdas_and_nothing_else(epoch: int, factor: float) -> None:
    """The published program counts its epochs from 1; progress counts epochs done."""
    loss, given = prepared("published: two students of three stages")
    state = {name: t.clone() for name, t in loss.state_dict().items()}
    full = loss(**given).terms
    exact = math.exp(-5 * (1 - min(epoch, 5) / 5) ** 2)
    assert exact == pytest.approx(factor, abs=5e-5)
    for progress in (epoch - 1, float(epoch - 1), torch.tensor(float(epoch - 1), dtype=torch.float64)):
        loss.load_state_dict(state)
        terms = loss(**given, progress=progress).terms
        for name, term in terms.items():
            weight = 1.0 if name.endswith(("_ce", "_kl", "_dml")) else exact
            assert term.item() == pytest.approx(weight * full[name].item(), rel=1e-12), (name, type(progress))
    single = loss(**given, progress=torch.tensor(float(epoch - 1))).terms["leader_fusion"]
    assert single.item() == pytest.approx(exact * full["leader_fusion"].item(), rel=1e-5)


@pytest.mark.parametrize(("rampup", "progress"), [(0, 0), (0, torch.tensor(0.0)), (5, None)])
def test_no_ramp(rampup: float, progress: float | Tensor | None) -> None:
    loss, given = prepared("published: two students of three stages", rampup_epochs=rampup)
    state = {name: t.clone() for name, t in loss.state_dict().items()}
    without = loss(**given).terms
    loss.load_state_dict(state)
    assert {n: t.item() for n, t in loss(**given, progress=progress).terms.items()} == {
        n: t.item() for n, t in without.items()
    }


WEIGHED = {
    "lambda_diversity": {"student1.maps.0", "student1.maps.1", "student1.maps.2"},
    "lambda_fusion": {"leader.maps.0", "leader.maps.1", "leader.maps.2", "trans_fusion"},
    "lambda_self_distillation": {"transforms"},
    "feature_weight": {"student0.maps.2", "student1.maps.2", "connectors"},
}


@pytest.mark.parametrize("name", WEIGHED)
def test_a_weight_of_zero_changes_its_own_gradients_only(name: str) -> None:
    students, leader = [EQUAL, [4, 6, 7]], [4, 6, 9]
    torch.manual_seed(1)
    given = batches.arguments(students, leader)
    found = []
    for deviation in ({}, {name: 0.0}):
        torch.manual_seed(2)
        settings = HYPER | {"feature": "mse", "feature_weight": 3.0} | deviation
        loss = FusionLoss(students, batches.CLASSES, leader_channels=leader, **settings).double()
        found.append(gradients(published.scramble(loss), given))
    with_it, without = found
    changed = set(batches.differing(without, with_it, 1e-12))
    expected = {leaf for leaf in with_it if any(leaf.startswith(prefix) for prefix in WEIGHED[name])}
    assert changed == expected
    owned = [leaf for leaf in expected if leaf.startswith(("trans_fusion", "transforms", "connectors"))]
    assert not any(without[leaf] is not None and without[leaf].any() for leaf in owned)
